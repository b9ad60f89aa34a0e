"""The text engine whose tokens each name the next, so that tests know what is answered."""

from pathlib import Path

import pytest

from tests.fixtures.tiny_engine import EngineKit, build_engine, load_chained_base


@pytest.fixture(scope="module")
def kit(cache: Path) -> EngineKit:
    return build_engine(load_chained_base(cache))
