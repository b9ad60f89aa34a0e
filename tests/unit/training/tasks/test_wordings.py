"""The wordings that ship: complete, varied, and held-out ones that are really other words."""

from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path

import pytest

from training.tasks import smoke_texts, text_domains
from training.tasks.text_task import Wordings, normalize_wording, read_wordings

FOLDER = Path(text_domains.__file__).parent
DOMAINS = read_wordings(FOLDER / "text_domains.toml")
SMOKE = read_wordings(FOLDER / "smoke_texts.toml")


def compare_words(first: str, second: str) -> float:
    """Share of common words among all words of both (Jaccard), 0 to 1."""
    a, b = set(normalize_wording(first).split()), set(normalize_wording(second).split())
    return len(a & b) / len(a | b)


def compare_letters(first: str, second: str) -> float:
    return SequenceMatcher(None, normalize_wording(first), normalize_wording(second)).ratio()


def test_every_domain_and_smoke_task_is_described() -> None:
    assert list(DOMAINS) == list(text_domains.DOMAINS)
    assert list(SMOKE) == list(smoke_texts.SMOKE_TASKS)
    assert len({wordings.title for wordings in DOMAINS.values()}) == len(DOMAINS)


@pytest.mark.parametrize("wordings", DOMAINS.values(), ids=DOMAINS)
def test_domains_have_twelve_and_four_wordings(wordings: Wordings) -> None:
    assert len(wordings.descriptions) == 12
    assert len(wordings.heldout_descriptions) == 4


@pytest.mark.parametrize(
    "wordings", [*DOMAINS.values(), *SMOKE.values()], ids=[*DOMAINS, *(f"smoke-{n}" for n in SMOKE)]
)
def test_held_out_wordings_are_no_near_copies(wordings: Wordings) -> None:
    for heldout in wordings.heldout_descriptions:
        for trained in wordings.descriptions:
            assert compare_words(heldout, trained) <= 0.5, (heldout, trained)
            assert compare_letters(heldout, trained) <= 0.8, (heldout, trained)


def test_no_wording_stands_twice_anywhere() -> None:
    for tables in (DOMAINS, SMOKE):
        everything = [
            normalize_wording(wording)
            for wordings in tables.values()
            for wording in wordings.descriptions + wordings.heldout_descriptions
        ]
        repeated = [first for first, second in combinations(everything, 2) if first == second]
        assert not repeated


@pytest.mark.parametrize("language", ["en", "fr", "es"])
def test_wikipedia_wordings_name_their_language(language: str) -> None:
    word = {"en": "english", "fr": "french", "es": "spanish"}[language]
    wordings = DOMAINS[f"wikipedia_{language}"]
    for wording in wordings.descriptions + wordings.heldout_descriptions:
        assert word in normalize_wording(wording) or f"{language} wikipedia" in normalize_wording(
            wording
        )
