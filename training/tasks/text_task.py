"""One text task, and the wordings that describe it."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import InvalidInputError, InvalidTaskDataError


@dataclass(frozen=True, slots=True)
class Wordings:
    """What a task is called in tables, and in people's words.

    Attributes:
        title: what tables and figures call it.
        descriptions: wordings that the generator is trained on.
        heldout_descriptions: wordings that it is never trained on; evaluation uses the first.
    """

    title: str
    descriptions: tuple[str, ...]
    heldout_descriptions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TextTask:
    """One task: people's words for it, documents to learn it from and documents to measure it on.

    Attributes:
        name: identifier in snake_case, e.g. "recipes".
        title: what tables and figures call it.
        descriptions: wordings that the generator is trained on.
        heldout_descriptions: wordings that it is never trained on; evaluation uses the first.
        train: training documents.
        test: held-out documents.
        family: tasks that could be guessed from each other share it; "" where none is known.
    """

    name: str
    title: str
    descriptions: tuple[str, ...]
    heldout_descriptions: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    family: str = ""

    def __post_init__(self) -> None:
        """Check that nothing is missing and that the held-out wordings are indeed held out."""
        for field in ("name", "title", "descriptions", "heldout_descriptions", "train", "test"):
            value = getattr(self, field)
            texts = (value,) if isinstance(value, str) else value
            if not texts or any(not text.strip() for text in texts):
                raise InvalidTaskDataError(
                    f"text task {self.name!r}: {field} is empty or holds an empty text"
                )
        check_wordings(f"text task {self.name!r}", self.descriptions, self.heldout_descriptions)


def build_task(
    name: str, wordings: Wordings, train: Iterable[str], test: Iterable[str], family: str = ""
) -> TextTask:
    """Join a task's wordings with its documents, and its family where one is known.

    Raises:
        InvalidTaskDataError: one of its fields is empty.
    """
    return TextTask(
        name=name,
        title=wordings.title,
        descriptions=wordings.descriptions,
        heldout_descriptions=wordings.heldout_descriptions,
        train=tuple(train),
        test=tuple(test),
        family=family,
    )


def check_wordings(
    place: str, descriptions: Sequence[str], heldout_descriptions: Sequence[str]
) -> None:
    """Check that held-out wordings are indeed held out; `place` says in errors whose they are.

    Raises:
        InvalidTaskDataError: a wording is both a training and a held-out one.
    """
    seen = {normalize_wording(wording) for wording in descriptions}
    for wording in heldout_descriptions:
        if normalize_wording(wording) in seen:
            raise InvalidTaskDataError(
                f"{place}: {wording!r} is both a training and a held-out description; "
                "word the held-out one differently"
            )


def normalize_wording(wording: str) -> str:
    """Lower the case and keep letters and digits only: what makes two wordings the same."""
    letters = (char if char.isalnum() else " " for char in wording.lower())
    return " ".join("".join(letters).split())


def parse_wordings(table: Mapping[str, Any], place: str) -> Wordings:
    """Check a TOML table and return it as wordings; `place` says in errors where it stands.

    Raises:
        InvalidTaskDataError: a key is missing, unknown or of the wrong type.
    """
    keys = {"title", "descriptions", "heldout_descriptions"}
    if set(table) != keys:
        raise InvalidTaskDataError(f"{place} must have exactly the keys {', '.join(sorted(keys))}")
    for key in ("descriptions", "heldout_descriptions"):
        if not isinstance(table[key], list) or any(not isinstance(w, str) for w in table[key]):
            raise InvalidTaskDataError(f"{place}: {key} must be a list of strings")
    if not isinstance(table["title"], str):
        raise InvalidTaskDataError(f"{place}: title must be a string")
    return Wordings(
        title=table["title"],
        descriptions=tuple(table["descriptions"]),
        heldout_descriptions=tuple(table["heldout_descriptions"]),
    )


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InvalidTaskDataError: it is not there, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidTaskDataError(f"{path} is not there; it names and describes tasks") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidTaskDataError(f"{path} is not valid TOML: {error}") from error


def read_wordings(path: Path) -> dict[str, Wordings]:
    """Read a TOML file with one table a task: title, descriptions, heldout_descriptions.

    Raises:
        InvalidTaskDataError: it is not there, not TOML, or a table is wrong.
    """
    tables = read_toml(path)
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise InvalidTaskDataError(f"{path}: {name} stands outside a table such as [recipes]")
    return {name: parse_wordings(table, f"{path}: [{name}]") for name, table in tables.items()}


def select_names(known: Sequence[str], names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the wanted names, all known ones where None.

    Raises:
        InvalidInputError: a name that is not known, or twice the same; known ones are listed.
    """
    wanted = tuple(known) if names is None else tuple(names)
    unknown = [name for name in wanted if name not in known]
    if unknown or len(set(wanted)) != len(wanted):
        problem = f"unknown task {', '.join(map(repr, unknown))}" if unknown else "repeated"
        raise InvalidInputError(f"{problem} in {list(wanted)}; known: {', '.join(known)}")
    return wanted
