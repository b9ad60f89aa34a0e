"""Requests are checked, and text grows by whole characters up to the first stop text."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from service.errors import InvalidInputError
from service.inference.base_model import EMBEDDED_TINY, prepare_embedded_model
from service.inference.completion import CompletionRequest, GrowingText
from tests.fixtures.kernel import PROPERTY


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token per byte."""
    folder = prepare_embedded_model(EMBEDDED_TINY, tmp_path_factory.mktemp("cache"))
    return AutoTokenizer.from_pretrained(folder)


def grow(tokenizer: Any, prompt: str, tokens: list[int], *stop: str) -> tuple[str, bool]:
    """Text after the tokens, and whether a stop text ended it; no partial character on the way."""
    text = GrowingText(tokenizer, tokenizer(prompt)["input_ids"] if prompt else [], stop)
    for token in tokens:
        if text.append(token):
            return text.text, True
        assert not text.text.endswith("\ufffd")
    return text.text, False


@PROPERTY
@given(prompt=st.text(max_size=8), text=st.text(max_size=20))
def test_text_comes_out_as_it_went_in(byte_tokenizer: Any, prompt: str, text: str) -> None:
    text = text.replace("\ufffd", "")
    assert grow(byte_tokenizer, prompt, byte_tokenizer(text)["input_ids"]) == (text, False)


@PROPERTY
@given(
    text=st.text(alphabet="ab\u00e9\U0001f600", max_size=20),
    stop=st.lists(st.text(alphabet="ab\u00e9\U0001f600", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_stop_text_that_is_complete_first(
    byte_tokenizer: Any, text: str, stop: list[str]
) -> None:
    ends = [
        (index + len(one), index)
        for one in stop
        for index in range(len(text))
        if text.startswith(one, index)
    ]
    expected = (text[: min(ends)[1]], True) if ends else (text, False)
    assert grow(byte_tokenizer, "p", byte_tokenizer(text)["input_ids"], *stop) == expected


def test_a_stop_text_inside_a_longer_token_ends_the_text() -> None:
    tokenizer = make_word_tokenizer("ab##", "##cd", "x")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("ab##", "##cd", "x")}

    assert grow(tokenizer, "", [ids["x"], ids["ab##"], ids["##cd"]], "###") == ("xab", True)
    assert grow(tokenizer, "", [ids["ab##"], ids["##cd"]], "d", "b#") == ("a", True)


def test_of_stop_texts_that_end_together_the_longest_counts(byte_tokenizer: Any) -> None:
    tokens = byte_tokenizer("xab")["input_ids"]
    assert grow(byte_tokenizer, "p", tokens, "b", "ab") == ("x", True)
    assert grow(byte_tokenizer, "p", tokens, "ab", "b") == ("x", True)


def test_a_stop_text_in_the_prompt_is_no_stop(byte_tokenizer: Any) -> None:
    tokens = byte_tokenizer("b!")["input_ids"]
    assert grow(byte_tokenizer, "xa", tokens, "a", "ab") == ("b!", False)


def test_a_stop_text_that_only_begins_stays(byte_tokenizer: Any) -> None:
    assert grow(byte_tokenizer, "p", byte_tokenizer("ab#")["input_ids"], "##") == ("ab#", False)


def test_parts_of_characters_do_not_show(byte_tokenizer: Any) -> None:
    tokens = byte_tokenizer("x\u20ac\U0001f600")["input_ids"]
    shown = [grow(byte_tokenizer, "p", tokens[:end])[0] for end in range(len(tokens) + 1)]
    assert shown == [
        "",
        "x",
        "x",
        "x",
        "x\u20ac",
        "x\u20ac",
        "x\u20ac",
        "x\u20ac",
        "x\u20ac\U0001f600",
    ]


def test_bytes_that_are_no_text_show_as_such_in_the_middle(byte_tokenizer: Any) -> None:
    euro, letter = byte_tokenizer("\u20ac")["input_ids"], byte_tokenizer("a")["input_ids"]
    assert grow(byte_tokenizer, "p", [euro[1], *letter]) == ("\ufffda", False)
    assert grow(byte_tokenizer, "p", [*letter, euro[0], *letter, euro[1]]) == ("a\ufffda", False)


def test_the_space_before_the_first_word_is_kept() -> None:
    """Tokenizers of the SentencePiece kind drop it where a text begins."""
    tokenizer = make_word_tokenizer("\u2581Hello", "\u2581world", metaspace=True)
    hello, world = tokenizer("Hello world")["input_ids"]
    assert tokenizer.decode([world]) == "world"

    assert grow(tokenizer, "Hello", [world, hello]) == (" world Hello", False)


def test_special_tokens_do_not_show(byte_tokenizer: Any) -> None:
    tokens = byte_tokenizer("ab")["input_ids"]
    end = byte_tokenizer.eos_token_id
    assert grow(byte_tokenizer, "p", [tokens[0], end, tokens[1]]) == ("ab", False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ("a", "")}, "stop"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        CompletionRequest("prompt", **values)


def make_word_tokenizer(*words: str, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, with SentencePiece's spaces or with none."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
