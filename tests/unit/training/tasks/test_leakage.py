"""Leakage: hand-made cases, and a brute-force reference."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import InvalidInputError
from training.tasks.leakage import cut_windows, measure_leakage

SMALL_TEXTS = st.lists(st.text(alphabet="ab \n", max_size=30), max_size=4)


def measure_by_search(train: list[str], test: list[str], window: int) -> float:
    pieces = []
    for document in test:
        words = " ".join(document.split())
        if words and len(words) < window:
            pieces.append(words)
        pieces += [words[i : i + window] for i in range(0, len(words) - window + 1, window)]
    leaked = [p for p in pieces if any(p in " ".join(document.split()) for document in train)]
    return len(leaked) / len(pieces) if pieces else 0.0


@settings(deadline=None)
@given(SMALL_TEXTS, SMALL_TEXTS, st.integers(1, 12))
def test_equals_plain_search(train: list[str], test: list[str], window: int) -> None:
    assert measure_leakage(train, test, window) == pytest.approx(
        measure_by_search(train, test, window)
    )


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=200).filter(str.strip), min_size=1, max_size=3))
def test_a_text_leaks_wholly_into_itself(documents: list[str]) -> None:
    assert measure_leakage(documents, documents) == 1.0


def test_is_found_at_any_offset_and_however_wrapped() -> None:
    sentence = "It is a truth universally acknowledged, that a single man wants a wife. " * 2
    secret = " ".join(sentence.split())[:80]
    train = ["some words before: " + secret.replace(" ", "\n  ") + " and after"]
    assert measure_leakage(train, [secret]) == 1.0
    assert measure_leakage(train, [secret.upper()]) == 0.0


def test_counts_half_of_a_document() -> None:
    known, new = "k" * 80, "n" * 80
    assert measure_leakage([known], [known + new]) == 0.5


def test_does_not_match_across_two_training_documents() -> None:
    assert measure_leakage(["a" * 40, "b" * 40], ["a" * 40 + "b" * 40]) == 0.0


def test_nothing_held_out_leaks_nothing() -> None:
    assert measure_leakage(["text"], []) == 0.0
    assert measure_leakage(["text"], ["  \n "]) == 0.0


def test_windows_are_adjacent_and_whole() -> None:
    assert cut_windows("abcdefgh", 3) == ["abc", "def"]
    assert cut_windows("ab", 3) == ["ab"]


def test_refuses_a_window_that_is_not_positive() -> None:
    with pytest.raises(InvalidInputError, match="at least 1"):
        measure_leakage(["a"], ["a"], window=0)
