"""Bodies of the OpenAI routes: what is served, ignored and refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from service.api.openai.chat_requests import ChatBody
from service.api.openai.errors import UnknownParameterError, UnsupportedParameterError
from service.api.openai.requests import MAX_CHOICES, CompletionBody

USER = {"role": "user", "content": "hello"}


def complete(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate({"model": "base", "prompt": "hello", **fields})


def chat(**fields: Any) -> ChatBody:
    return ChatBody.model_validate({"model": "base", "messages": [USER], **fields})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hello", ["hello"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ],
)
def test_prompts_have_four_shapes(prompt: Any, prompts: list[Any]) -> None:
    assert complete(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "prompt", [None, [], [[]], [1, "a"], ["a", [1]], [-1], [1.5], [True], 7, {}, ["a"] * 65]
)
def test_other_shapes_are_refused_with_one_message(prompt: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        complete(prompt=prompt)
    [error] = caught.value.errors()
    assert (error["loc"], error["type"]) == (("prompt",), "prompt_shape")


def test_null_stands_for_the_default() -> None:
    names = [name for name in CompletionBody.model_fields if name not in ("model", "prompt")]
    assert complete(**dict.fromkeys(names)) == complete()
    names = [name for name in ChatBody.model_fields if name not in ("model", "messages")]
    assert chat(**dict.fromkeys(names)) == chat()


@pytest.mark.parametrize("name", ["user", "metadata", "store", "service_tier", "prompt_cache_key"])
def test_harmless_parameters_are_ignored_whatever_their_value(name: str) -> None:
    for value in ("x", 1, {"a": "b"}):
        complete(**{name: value})
        chat(**{name: value})


@pytest.mark.parametrize(
    ("name", "neutral", "asking"),
    [
        ("presence_penalty", 0, 0.5),
        ("frequency_penalty", 0.0, -1),
        ("logit_bias", {}, {"5": 1}),
        ("tools", [], [{"type": "function"}]),
        ("tool_choice", "none", "required"),
        ("response_format", {"type": "text"}, {"type": "json_object"}),
        ("reasoning_effort", None, "high"),
    ],
)
def test_what_is_not_implemented_may_be_sent_where_it_asks_for_nothing(
    name: str, neutral: Any, asking: Any
) -> None:
    chat(**{name: neutral})
    chat(**{name: None})
    with pytest.raises(UnsupportedParameterError) as caught:
        chat(**{name: asking})
    assert caught.value.param == name


@pytest.mark.parametrize("body", [complete, chat])
def test_unknown_parameters_are_named(body: Any) -> None:
    with pytest.raises(UnknownParameterError) as caught:
        body(best_off=1)
    assert (caught.value.param, "'best_off'" in caught.value.detail) == ("best_off", True)
    with pytest.raises(UnknownParameterError) as caught:
        body(**{"k" * 5000: 1})
    assert len(caught.value.detail) < 200


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_tokens": 1025},
        {"n": 0},
        {"n": 17},
        {"n": 16, "prompt": ["a"] * 5},
        {"logprobs": 21},
        {"logprobs": -1},
        {"temperature": 2.5},
        {"temperature": -0.1},
        {"top_p": 0},
        {"seed": 2**63},
        {"stop": [""]},
        {"stop": ["a"] * 9},
        {"stream_options": {"include_usage": True}},
        {"model": ""},
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        complete(**fields)


def test_no_tokens_at_all_may_be_asked_for_with_echo() -> None:
    assert complete(max_tokens=0, echo=True).max_tokens == 0


def test_choices_are_bounded_together() -> None:
    complete(n=16, prompt=["a"] * (MAX_CHOICES // 16))


def test_stop_is_one_text_or_several() -> None:
    assert complete().stops == ()
    assert complete(stop="\n").stops == ("\n",)
    assert complete(stop=["a", "b"]).stops == ("a", "b")


def test_usage_is_asked_for_by_option() -> None:
    assert not complete(stream=True).includes_usage
    assert complete(stream=True, stream_options={"include_usage": True}).includes_usage


def test_messages_are_text_or_parts_of_text() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "hello"
    answer = {"role": "assistant", "content": "hi", "tool_calls": None, "refusal": None}
    assert chat(messages=[USER, answer, USER]).messages[1].text == "hi"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": []},
        {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
    ],
)
def test_other_messages_are_refused(message: dict[str, Any]) -> None:
    with pytest.raises((ValidationError, UnknownParameterError)):
        chat(messages=[message])


def test_alternatives_and_lengths_need_no_guessing() -> None:
    with pytest.raises(ValidationError, match="logprobs"):
        chat(top_logprobs=3)
    with pytest.raises(ValidationError, match="one of"):
        chat(max_tokens=3, max_completion_tokens=4)
    assert chat(logprobs=True, top_logprobs=3).top_logprobs == 3
