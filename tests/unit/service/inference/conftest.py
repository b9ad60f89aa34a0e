"""The text engine with random weights that tests of a module share."""

from pathlib import Path

import pytest

from tests.fixtures.tiny_engine import EngineKit, build_engine, load_random_base


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def kit(cache: Path) -> EngineKit:
    return build_engine(load_random_base(cache))
