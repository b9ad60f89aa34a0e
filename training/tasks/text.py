"""The sources that text tasks can come from.

    "domains"      the twelve real domains, fetched and prepared on first use
    "families"     56 tasks in 12 families, fetched and prepared on first use
    "smoke"        four small tasks made from the running interpreter, without any network
    "folder:PATH"  a folder of text files: one sub-folder a task
    "jsonl:PATH"   a file of rows {"task", "split", "text"} and a `tasks.toml` beside it
    "hub:PATH"     a TOML file that names a hub data set and its tasks (needs the extra `hub`)

Whatever the source, what comes out is the same: a tuple of `TextTask`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from service.errors import InvalidRecipeError
from training.tasks.smoke_texts import load_smoke_texts
from training.tasks.text_domains import load_domains
from training.tasks.text_families import load_families
from training.tasks.text_files import load_folder, load_jsonl
from training.tasks.text_hub import load_hub
from training.tasks.text_task import TextTask

__all__ = ["SOURCES", "TextTask", "load_text_tasks"]

SOURCES = ("domains", "families", "smoke", "folder:PATH", "jsonl:PATH", "hub:PATH")


def load_text_tasks(
    source: str,
    names: Sequence[str] | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] = lambda _line: None,
) -> tuple[TextTask, ...]:
    """Load the tasks of a source, in the order of `names`, or all of them in the source's order.

    Args:
        source: one of `SOURCES`, with what follows the colon filled in.
        names: tasks to load; all where None.
        cache_dir: folder for fetched and prepared data; `default_cache_dir()` where None.
        progress: called with a line of text at each step of a long preparation.

    Raises:
        InvalidRecipeError: an unknown source.
        InvalidInputError: an unknown task name; the message lists the known ones.
        InvalidTaskDataError: documents or wordings are missing or malformed.
        MissingDependencyError: a client or package that this source needs is not installed.
    """
    kind, _, place = source.partition(":")
    path = Path(place).expanduser()
    match kind, bool(place):
        case "domains", False:
            return load_domains(names, cache_dir, progress)
        case "families", False:
            return load_families(names, cache_dir, progress)
        case "smoke", False:
            return load_smoke_texts(names)
        case "folder", True:
            return load_folder(path, names)
        case "jsonl", True:
            return load_jsonl(path, names)
        case "hub", True:
            return load_hub(path, names)
        case _:
            raise InvalidRecipeError(
                f"unknown source of text tasks {source!r}; use one of: {', '.join(SOURCES)}"
            )
