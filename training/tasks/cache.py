"""Where downloaded and prepared data lies, and how a file gets there whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE_DIR_VARIABLE = "ICM_LORA_CACHE_DIR"


def default_cache_dir() -> Path:
    """Return the folder for downloads and prepared data; it need not exist yet.

    `ICM_LORA_CACHE_DIR` where it is set and not empty, else `~/.cache/icm-lora`. This is the
    only place of the training code that reads that variable.
    """
    configured = os.environ.get(CACHE_DIR_VARIABLE, "")
    return Path(configured) if configured else Path.home() / ".cache" / "icm-lora"


@contextmanager
def open_scratch_dir(parent: Path) -> Iterator[Path]:
    """Yield an empty folder inside `parent` that is removed afterwards.

    It lies on the same file system as its parent, so that `os.replace` out of it is atomic.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=parent) as scratch:
        yield Path(scratch)


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader, or a kill, sees the old file or the new, never a part."""
    with open_scratch_dir(path.parent) as scratch:
        partial = scratch / path.name
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
