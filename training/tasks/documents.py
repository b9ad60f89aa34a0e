"""From raw documents to a split: clean, cut into passages, drop copies, hold out, cap."""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from training.tasks.leakage import cut_windows, find_leaks, normalize_whitespace

MAX_PASSAGE_CHARS = 8_000
MIN_PASSAGE_CHARS = 200
MAX_TRAIN_CHARS = 3_000_000
MAX_TEST_CHARS = 400_000
MAX_QUOTED_SHARE = 0.1  # of a held-out passage's windows that may stand in the training text


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the unit of the source that it belongs to (a novel, a thread, a title...).

    The unit is what a split keeps together: all of its documents are trained on, or none.
    """

    unit: str
    text: str


@dataclass(frozen=True, slots=True)
class Split:
    """Training and held-out passages, both in an order that is random but always the same.

    Attributes:
        train: training passages.
        test: held-out passages.
        num_quoting: held-out passages that were dropped because they quote training passages.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    num_quoting: int = 0


def draw_fraction(key: str) -> float:
    """Return a number in [0, 1) that depends on the key alone: the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def hold_out_share(share: float) -> Callable[[str], bool]:
    """Return a rule that holds out about `share` of the units, chosen by their names' hashes."""
    return lambda unit: draw_fraction(unit) < share


def hold_out_units(*units: str) -> Callable[[str], bool]:
    """Return a rule that holds out exactly these units."""
    return frozenset(units).__contains__


def split_documents(
    documents: Iterable[Document],
    is_held_out: Callable[[str], bool],
    max_quoted_share: float = MAX_QUOTED_SHARE,
) -> Split:
    """Split by unit, cut into passages, drop copies and cap both sides.

    A passage that occurs twice is kept once, on the held-out side where it is on both. Whatever
    the caps leave out is spread over the source, because they apply after shuffling. Held-out
    passages that quote the training text are then dropped (a news item mailed to two threads,
    two titles of one recipe), so that what is left measures style and not memory.
    """
    sides: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for document in documents:
        side = sides[is_held_out(document.unit)]
        for passage in cut_passages(document.text):
            side.setdefault(normalize_whitespace(passage), passage)
    test = _cap(sides[True], MAX_TEST_CHARS)
    train = _cap({k: v for k, v in sides[False].items() if k not in sides[True]}, MAX_TRAIN_CHARS)
    kept = drop_quoting(test, train, max_quoted_share)
    return Split(train=tuple(train), test=tuple(kept), num_quoting=len(test) - len(kept))


def drop_quoting(test: list[str], train: list[str], share: float = MAX_QUOTED_SHARE) -> list[str]:
    """Drop the held-out passages of which more than `share` stands verbatim in training."""
    found = find_leaks(train, {window for passage in test for window in cut_windows(passage)})
    kept = []
    for passage in test:
        windows = cut_windows(passage)
        if sum(window in found for window in windows) <= share * len(windows):
            kept.append(passage)
    return kept


def cut_passages(text: str) -> list[str]:
    """Cut a document at blank lines into passages of at most `MAX_PASSAGE_CHARS` where it can.

    A single paragraph longer than that stays whole. Passages shorter than `MIN_PASSAGE_CHARS`
    carry too little to learn from or to measure on, and are dropped.
    """
    text = clean_text(text)
    count = -(-len(text) // MAX_PASSAGE_CHARS)
    target = len(text) / count if count else 0.0
    passages: list[str] = []
    current: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        if current and size + len(paragraph) > target * 1.1:
            passages.append("\n\n".join(current))
            current, size = [], 0
        current.append(paragraph)
        size += len(paragraph) + 2
    passages.append("\n\n".join(current))
    stripped = (passage.strip("\n") for passage in passages)
    return [passage for passage in stripped if len(passage) >= MIN_PASSAGE_CHARS]


def clean_text(text: str) -> str:
    """Unify line ends, drop control characters and trailing blanks, keep at most 2 blank lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufeff\u200b]", "", text.replace("\f", "\n"))
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


def _cap(passages: dict[str, str], max_chars: int) -> list[str]:
    """Shuffle by hash, then keep the first passages that together stay below `max_chars`."""
    kept, size = [], 0
    for key in sorted(passages, key=draw_fraction):
        if size + len(passages[key]) <= max_chars:
            kept.append(passages[key])
            size += len(passages[key])
    return kept
