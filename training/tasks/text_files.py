"""Text tasks from a person's own files: a folder of text files, or JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path

from service.errors import InvalidTaskDataError
from training.tasks.documents import draw_fraction
from training.tasks.text_task import (
    TextTask,
    build_task,
    parse_wordings,
    read_toml,
    read_wordings,
    select_names,
)

TEST_SHARE = 0.2  # of a folder's documents, where the folder does not say which are held out


def load_folder(root: Path, names: Sequence[str] | None = None) -> tuple[TextTask, ...]:
    """Load one task per sub-folder that holds a `task.toml`.

    Documents are `train/*.txt` and `test/*.txt`. Where there are no such sub-folders, they are
    `*.txt`, and a fifth of them (at least one, chosen by the hash of the file name) is held out.

    Raises:
        InvalidInputError: an unknown task name.
        InvalidTaskDataError: no tasks, no documents, or a wrong `task.toml`.
    """
    folders = {path.parent.name: path.parent for path in sorted(root.glob("*/task.toml"))}
    if not folders:
        raise InvalidTaskDataError(
            f"{root} holds no tasks: make one sub-folder a task, with task.toml and *.txt files"
        )
    tasks = []
    for name in select_names(tuple(folders), names):
        folder = folders[name]
        wordings = parse_wordings(read_toml(folder / "task.toml"), str(folder / "task.toml"))
        train, test = _split_folder(folder)
        tasks.append(build_task(name, wordings, map(_read_text, train), map(_read_text, test)))
    return tuple(tasks)


def load_jsonl(path: Path, names: Sequence[str] | None = None) -> tuple[TextTask, ...]:
    """Load tasks from rows `{"task": ..., "split": "train" | "test", "text": ...}`.

    `tasks.toml` beside the file has one table a task: title, descriptions, heldout_descriptions.

    Raises:
        InvalidInputError: an unknown task name.
        InvalidTaskDataError: a file is missing, a row is malformed, or a task has no documents.
    """
    wordings = read_wordings(path.parent / "tasks.toml")
    documents: dict[tuple[str, str], list[str]] = {}
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            task, split, text = _parse_row(line, f"{path}, line {number}")
            if task not in wordings:
                raise InvalidTaskDataError(
                    f"{path}, line {number}: task {task!r} is not described in tasks.toml"
                )
            documents.setdefault((task, split), []).append(text)
    return tuple(
        build_task(
            name,
            wordings[name],
            documents.get((name, "train"), ()),
            documents.get((name, "test"), ()),
        )
        for name in select_names(tuple(wordings), names)
    )


def _split_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files to train on and those held out, each sorted by name."""
    train, test = sorted(folder.glob("train/*.txt")), sorted(folder.glob("test/*.txt"))
    loose = sorted(folder.glob("*.txt"))
    if train and test and not loose:
        return train, test
    if train or test or len(loose) < 2:
        raise InvalidTaskDataError(
            f"{folder}: put text files into train/ and test/, or at least two beside task.toml, "
            "not both"
        )
    shuffled = sorted(loose, key=lambda path: draw_fraction(path.name))
    num_test = max(1, round(TEST_SHARE * len(loose)))
    return sorted(shuffled[num_test:]), sorted(shuffled[:num_test])


def _parse_row(line: str, place: str) -> tuple[str, str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidTaskDataError(f"{place}: not JSON: {error}") from error
    if (
        not isinstance(row, dict)
        or set(row) != {"task", "split", "text"}
        or not all(isinstance(value, str) for value in row.values())
        or row["split"] not in ("train", "test")
    ):
        raise InvalidTaskDataError(
            f"{place}: a row must be an object with the strings task, split (train or test), text"
        )
    return row["task"], row["split"], row["text"]


def _read_text(path: Path) -> str:
    """Read UTF-8 text.

    Raises:
        InvalidTaskDataError: the file is missing or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InvalidTaskDataError(f"{path} is not there") from error
    except UnicodeDecodeError as error:
        raise InvalidTaskDataError(f"{path} is not UTF-8 text: {error}") from error
