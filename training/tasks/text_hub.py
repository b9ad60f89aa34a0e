"""Text tasks from a data set of a model hub, streamed (optional extra `hub`).

A TOML file says what the columns mean, so that any data set with a label a row will do:

    dataset = "owner/name"
    task_column = "meta.pile_set_name"   # a dot goes into a nested column
    text_column = "text"
    train_split = "train"
    test_split = "test"

    [tasks.arxiv]
    label = "ArXiv"                      # the value of task_column
    title = "arXiv"
    descriptions = ["..."]
    heldout_descriptions = ["..."]
"""

import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from service.errors import InvalidTaskDataError, MissingDependencyError
from training.tasks.documents import MAX_TEST_CHARS, MAX_TRAIN_CHARS
from training.tasks.text_task import (
    TextTask,
    build_task,
    parse_wordings,
    read_toml,
    select_names,
)

COLUMN_KEYS = ("dataset", "task_column", "text_column", "train_split", "test_split")


def load_hub(path: Path, names: Sequence[str] | None = None) -> tuple[TextTask, ...]:
    """Stream a hub data set until each task has enough text on both sides.

    Raises:
        InvalidInputError: an unknown task name.
        InvalidTaskDataError: the file is wrong, a column is missing, or a task has no rows.
        MissingDependencyError: the `datasets` package is not installed.
    """
    config = read_toml(path)
    if set(config) != {*COLUMN_KEYS, "tasks"} or not isinstance(config["tasks"], Mapping):
        raise InvalidTaskDataError(
            f"{path} must have exactly the keys {', '.join(COLUMN_KEYS)} and tables [tasks.NAME]"
        )
    if not all(isinstance(table, Mapping) for table in config["tasks"].values()):
        raise InvalidTaskDataError(f"{path}: each task must be a table [tasks.NAME]")
    tables = {name: dict(table) for name, table in config["tasks"].items()}
    labels = {name: tables[name].pop("label", None) for name in tables}
    if None in labels.values():
        raise InvalidTaskDataError(f"{path}: each [tasks.NAME] needs a label")
    wanted = select_names(tuple(tables), names)
    wordings = {name: parse_wordings(tables[name], f"{path}: [tasks.{name}]") for name in wanted}
    task_of_label = {labels[name]: name for name in wanted}
    sides = []
    for key, max_chars in (("train_split", MAX_TRAIN_CHARS), ("test_split", MAX_TEST_CHARS)):
        rows = _stream_rows(config["dataset"], config[key])
        sides.append(collect_texts(rows, config, task_of_label, max_chars))
    train, test = sides
    return tuple(build_task(name, wordings[name], train[name], test[name]) for name in wanted)


def collect_texts(
    rows: Iterable[Mapping[str, Any]],
    config: Mapping[str, str],
    task_of_label: Mapping[str, str],
    max_chars: int,
) -> dict[str, list[str]]:
    """Collect each task's texts until it has `max_chars` characters; stop when all have them.

    Raises:
        InvalidTaskDataError: a row has no such columns.
    """
    texts: dict[str, list[str]] = {name: [] for name in task_of_label.values()}
    missing_chars = dict.fromkeys(texts, max_chars)
    for row in rows:
        name = task_of_label.get(str(_read_column(row, config["task_column"])))
        if name is None or missing_chars[name] <= 0:
            continue
        text = str(_read_column(row, config["text_column"]))
        texts[name].append(text)
        missing_chars[name] -= len(text)
        if max(missing_chars.values()) <= 0:
            break
    return texts


def _read_column(row: Mapping[str, Any], column: str) -> object:
    value: object = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise InvalidTaskDataError(
                f"the data set has no column {column!r}; its columns are {', '.join(row)}"
            )
        value = value[part]
    return value


def _stream_rows(dataset: str, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise MissingDependencyError(
            "hub data sets need the optional package 'datasets': pip install 'icm-lora[hub]'"
        ) from error
    rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(dataset, split=split, streaming=True)
    return rows
