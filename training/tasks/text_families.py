"""The many text tasks that unseen-task evaluation draws on, in families.

A family is what leave-one-out must leave out as a whole where a task could be guessed from its
siblings: languages of one encyclopedia, books of one Bible, genres of one corpus. Tasks that share
an archive are one family: how it was edited is half of what there is to be learned of it. Family,
title, words and the texts' licence stand in `text_families.toml`, the texts in `family_texts.py`.
Tasks that are also among the twelve domains have the domain's texts and words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import InvalidTaskDataError
from training.tasks.cache import default_cache_dir
from training.tasks.family_texts import FAMILY_TEXTS
from training.tasks.prepared_texts import prepare_corpora, read_prepared
from training.tasks.text_task import (
    TextTask,
    Wordings,
    build_task,
    parse_wordings,
    read_toml,
    read_wordings,
    select_names,
)

MIN_TRAIN_CHARS = 60_000
MIN_TEST_CHARS = 15_000


def load_families(
    names: Sequence[str] | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] = print,
) -> tuple[TextTask, ...]:
    """Prepare the tasks' texts where needed, and return them with their wordings and families.

    Raises: see `prepare_families`.
    """
    cache_dir = cache_dir or default_cache_dir()
    tables = read_families()
    tasks = []
    for name in prepare_families(cache_dir, names, progress):
        split = read_prepared(cache_dir, name)
        table = tables[name]
        tasks.append(build_task(name, table.wordings, split.train, split.test, table.family))
    return tuple(tasks)


def prepare_families(
    cache_dir: Path | None = None,
    names: Sequence[str] | None = None,
    progress: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Fetch and prepare the tasks' texts, those that are not yet; return the headers by name.

    Args:
        cache_dir: folder for archives and prepared files; `default_cache_dir()` where None.
        names: tasks; all where None.
        progress: called with a line of text at each step.

    Raises:
        InvalidInputError: an unknown name.
        MissingDependencyError: see `prepare_corpora`.
        InvalidTaskDataError: see `prepare_corpora`; or a task has too little text.
    """
    wanted = {name: FAMILY_TEXTS[name] for name in select_names(tuple(FAMILY_TEXTS), names)}
    headers = prepare_corpora(wanted, cache_dir or default_cache_dir(), progress)
    for name, header in headers.items():
        sizes = header["train_chars"], header["test_chars"]
        if sizes[0] < MIN_TRAIN_CHARS or sizes[1] < MIN_TEST_CHARS:
            raise InvalidTaskDataError(
                f"{name}: {sizes[0]:,} characters to train on and {sizes[1]:,} held out; at least "
                f"{MIN_TRAIN_CHARS:,} and {MIN_TEST_CHARS:,} are needed: its package has changed"
            )
    return headers


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """What `text_families.toml` says of a task.

    Attributes:
        family: name of its family.
        licence: of its texts.
        wordings: its title and words.
    """

    family: str
    licence: str
    wordings: Wordings


def read_families() -> dict[str, TaskRecord]:
    """Read the families, licences and words of all tasks; fetches nothing.

    Raises:
        InvalidTaskDataError: a table of the file is wrong.
    """
    path = Path(__file__).with_name("text_families.toml")
    domains = read_wordings(path.with_name("text_domains.toml"))
    records = {}
    for name, table in read_toml(path).items():
        place = f"{path}: [{name}]"
        words = {key: table[key] for key in table if key not in ("family", "licence")}
        if not all(isinstance(table.get(key), str) for key in ("family", "licence")):
            raise InvalidTaskDataError(f"{place}: family and licence must be strings")
        if not words and name not in domains:
            raise InvalidTaskDataError(f"{place}: there are no words, and no domain has that name")
        wordings = parse_wordings(words, place) if words else domains[name]
        records[name] = TaskRecord(table["family"], table["licence"], wordings)
    return records
