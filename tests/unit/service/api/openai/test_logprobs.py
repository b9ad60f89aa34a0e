"""Log-probabilities in OpenAI's shapes, and where tokens begin in a text."""

from service.api.openai.logprobs import LEAST_LOGPROB, TokenPlaces, build_chat, build_legacy
from service.inference.completion import TokenLogprob

PART = "\ufffd"


def token(text: str, logprob: float | None = -1.0, *top: tuple[str, float]) -> TokenLogprob:
    return TokenLogprob(0, text, logprob, tuple((i, *each) for i, each in enumerate(top)))


def test_tokens_begin_where_the_text_has_them() -> None:
    tokens = [token("one"), token(" two"), token(" two")]
    assert TokenPlaces().locate(tokens, "one two two") == [0, 3, 7]


def test_parts_of_a_character_begin_where_it_does() -> None:
    tokens = [token("a"), *[token(PART)] * 4, token("b"), *[token(PART)] * 2, token("c")]
    assert TokenPlaces().locate(tokens, "a😀béc") == [0, 1, 1, 1, 1, 2, 3, 3, 4]


def test_tokens_that_the_text_does_not_show_lie_at_its_end() -> None:
    tokens = [token("ab"), token("<|end|>")]
    assert TokenPlaces().locate(tokens, "ab") == [0, 2]


def test_places_go_on_from_piece_to_piece() -> None:
    places = TokenPlaces()
    assert places.locate([token("one")], "one") == [0]
    assert places.locate([token(" two"), token(" one")], " two one") == [3, 7]


def test_the_legacy_shape_has_the_token_itself_among_its_alternatives() -> None:
    tokens = [token("a", None), token("b", -2.0, ("c", -0.5)), token("c", -0.5, ("c", -0.5))]
    built = build_legacy(tokens, "abc", TokenPlaces(), 1)
    assert built.tokens == ["a", "b", "c"]
    assert built.token_logprobs == [None, -2.0, -0.5]
    assert built.top_logprobs == [None, {"c": -0.5, "b": -2.0}, {"c": -0.5}]
    assert build_legacy(tokens, "abc", TokenPlaces(), 0).top_logprobs is None


def test_of_alternatives_that_look_alike_the_best_counts() -> None:
    [top] = (
        build_legacy(
            [token(PART, -3.0, (PART, -1.0), (PART, -2.0))], "", TokenPlaces(), 2
        ).top_logprobs
        or []
    )
    assert top == {PART: -1.0}


def test_the_chat_shape_has_bytes_where_they_are_known() -> None:
    built = build_chat([token("é", -1.0, ("é", -1.0), (PART, -2.0)), token("x", float("-inf"))])
    assert built.content[0].bytes == [0xC3, 0xA9]
    assert [each.bytes for each in built.content[0].top_logprobs] == [[0xC3, 0xA9], None]
    assert built.content[1].logprob == LEAST_LOGPROB
