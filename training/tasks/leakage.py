"""How much of the held-out text also stands, word for word, in the training text."""

from collections import Counter
from collections.abc import Iterable

from service.errors import InvalidInputError

LEAKAGE_WINDOW = 80  # characters
LEAKAGE_LIMIT = 0.01  # share of windows; a prepared domain above it is refused


def normalize_whitespace(text: str) -> str:
    """Turn every run of white space into one space, so that re-wrapped copies are found too."""
    return " ".join(text.split())


def cut_windows(text: str, window: int = LEAKAGE_WINDOW) -> list[str]:
    """Cut a document into whole, adjacent windows of `window` characters, white space normalised.

    A document shorter than one window is one window; an empty one has none.
    """
    text = normalize_whitespace(text)
    if len(text) < window:
        return [text] if text else []
    return [text[start : start + window] for start in range(0, len(text) - window + 1, window)]


def find_leaks(train: Iterable[str], windows: Iterable[str]) -> set[str]:
    """Return those windows that occur verbatim inside some training document.

    Training documents are compared one by one, at every offset. Time is linear in their
    characters (about 1 s for 3 MB), whatever the number of windows of one length.
    """
    wanted = set(windows)
    widths = sorted({len(window) for window in wanted})
    found: set[str] = set()
    for document in train:
        text = normalize_whitespace(document)
        for width in widths:
            ends = range(width, len(text) + 1)
            found.update(wanted.intersection(text[end - width : end] for end in ends))
    return found


def measure_leakage(
    train: Iterable[str], test: Iterable[str], window: int = LEAKAGE_WINDOW
) -> float:
    """Return the share (0 to 1) of held-out windows that stand verbatim in the training text.

    Every held-out document is cut into adjacent windows of `window` characters after white-space
    normalisation; repeated windows count as often as they occur. 0 where there is no held-out text.

    Raises:
        InvalidInputError: `window` is not positive.
    """
    if window < 1:
        raise InvalidInputError(f"window is {window}; it must be at least 1 character")
    counts = Counter(piece for document in test for piece in cut_windows(document, window))
    found = find_leaks(train, counts)
    return sum(counts[piece] for piece in found) / counts.total() if counts else 0.0
