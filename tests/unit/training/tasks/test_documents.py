"""Splits: what they keep apart, what they drop and what they promise to repeat."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.tasks import documents
from training.tasks.documents import (
    MAX_PASSAGE_CHARS,
    MIN_PASSAGE_CHARS,
    Document,
    clean_text,
    cut_passages,
    draw_fraction,
    drop_quoting,
    hold_out_share,
    hold_out_units,
    split_documents,
)
from training.tasks.leakage import LEAKAGE_LIMIT, measure_leakage

WORDS = st.lists(st.sampled_from(["lorem", "ipsum", "dolor", "sit", "amet"]), min_size=80)
UNITS = st.sampled_from(["north", "south", "east", "west"])
DOCUMENTS = st.lists(st.builds(Document, UNITS, WORDS.map(" ".join)), max_size=12)


def make_text(seed: int, num_words: int = 60) -> str:
    return " ".join(f"{draw_fraction(f'{seed}/{i}'):.6f}" for i in range(num_words))


@settings(deadline=None, max_examples=50)
@given(DOCUMENTS)
def test_sides_share_no_passage_and_come_from_their_own_units(given: list[Document]) -> None:
    split = split_documents(given, hold_out_units("north"))
    assert not set(split.train) & set(split.test)
    held_out = {passage for d in given if d.unit == "north" for passage in cut_passages(d.text)}
    others = {passage for d in given if d.unit != "north" for passage in cut_passages(d.text)}
    assert set(split.test) <= held_out
    assert set(split.train) <= others
    assert len(set(split.train)) == len(split.train)


@settings(deadline=None, max_examples=50)
@given(DOCUMENTS, st.randoms())
def test_order_of_reading_does_not_matter(given: list[Document], random: object) -> None:
    shuffled = list(given)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    rule = hold_out_units("north", "east")
    assert split_documents(given, rule) == split_documents(shuffled, rule)


@settings(deadline=None, max_examples=50)
@given(DOCUMENTS)
def test_what_is_left_quotes_less_than_a_tenth(given: list[Document]) -> None:
    split = split_documents(given, hold_out_share(0.5))
    assert measure_leakage(split.train, split.test) <= 0.1


def test_a_copy_stays_on_the_held_out_side_only() -> None:
    text = make_text(1)
    split = split_documents(
        [Document("a", text), Document("b", text.replace(" ", "\n")), Document("a", make_text(2))],
        hold_out_units("b"),
    )
    assert split.train == (make_text(2),)
    assert split.test == (text.replace(" ", "\n"),)


def test_a_held_out_passage_that_quotes_is_dropped_and_counted() -> None:
    quoted = make_text(1)
    split = split_documents(
        [
            Document("a", f"First some words. {quoted}"),
            Document("b", f"{quoted} And then a few."),
            Document("b", make_text(2)),
        ],
        hold_out_units("b"),
    )
    # Windows are cut from the start of the held-out passage, so that all but the last match.
    assert split.test == (make_text(2),)
    assert split.num_quoting == 1
    assert measure_leakage(split.train, split.test) < LEAKAGE_LIMIT


def test_a_short_formula_is_no_reason_to_drop() -> None:
    formula = "f" * 80
    passage = formula + make_text(1, num_words=200)
    assert drop_quoting([passage], [formula]) == [passage]


def test_where_formulas_are_common_a_smaller_share_drops_a_passage() -> None:
    formula = "f" * 80
    given = [Document("a", formula + make_text(0)), Document("b", formula + make_text(1, 200))]
    assert split_documents(given, hold_out_units("b")).num_quoting == 0
    assert split_documents(given, hold_out_units("b"), max_quoted_share=0.01).num_quoting == 1


def test_caps_keep_a_sample_of_the_whole_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_TRAIN_CHARS", 10_000)
    texts = [make_text(seed) for seed in range(100)]
    split = split_documents([Document("a", text) for text in texts], hold_out_units())
    kept = sorted(texts.index(text) for text in split.train)
    assert 9_000 < sum(map(len, split.train)) <= 10_000
    assert min(kept) < 25
    assert max(kept) > 75


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(alphabet="abc .", min_size=1, max_size=4_000), max_size=12))
def test_passages_keep_every_paragraph_in_order(paragraphs: list[str]) -> None:
    text = "\n\n".join(paragraphs)
    passages = cut_passages(text)
    assert all(len(passage) >= MIN_PASSAGE_CHARS for passage in passages)
    position = 0
    for passage in passages:
        position = clean_text(text).index(passage, position) + len(passage)
    dropped = len("".join(clean_text(text).split())) - sum(
        len("".join(passage.split())) for passage in passages
    )
    assert dropped < MIN_PASSAGE_CHARS * (len(paragraphs) + 1)


def test_passages_are_of_similar_length_and_below_the_limit() -> None:
    text = "\n\n".join(["word " * 40] * 100)
    lengths = [len(passage) for passage in cut_passages(text)]
    assert len(lengths) == 3
    assert max(lengths) <= MAX_PASSAGE_CHARS * 1.1
    assert min(lengths) > max(lengths) / 2


def test_clean_text_unifies_line_ends_and_drops_control_characters() -> None:
    assert clean_text("\ufeffa\r\nb \t\rc\x00\n\n\n\n\n\nd\u00a0e\n") == "a\nb\nc\n\n\nd e"


def test_the_hash_share_is_about_right_and_fixed() -> None:
    is_held_out = hold_out_share(0.2)
    share = sum(is_held_out(f"unit {i}") for i in range(5_000)) / 5_000
    assert share == pytest.approx(0.2, abs=0.02)
    assert draw_fraction("recipes") == 0.3895376533369107
