"""Requests of `/v1/chat/completions`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from service.api.openai.requests import Checked, Sampled
from service.api.requests import MAX_NEW_TOKENS, MAX_PROMPT_CHARACTERS
from service.inference.completion import MAX_LOGPROBS

MAX_MESSAGES = 256
DEFAULT_CHAT_TOKENS = 256


class TextPart(Checked):
    """A part of a message: text is the only kind."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]


class Message(Checked):
    """One message of a chat."""

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "tool_calls": ([],),
        "function_call": (),
        "refusal": (),
        "audio": (),
        "annotations": ([],),
    }

    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        Field(description="`developer` is `system`."),
    ]
    content: Annotated[
        Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
        | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)],
        Field(description="Text, or parts of text that are joined."),
    ]
    name: Annotated[Any, Field(description="Ignored.")] = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(Sampled):
    """A chat to go on with; the base model's template turns it into a prompt."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "base", "messages": [{"role": "user", "content": "How do I boil rice?"}]}
            ]
        }
    )
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **Sampled.neutral,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "moderation": (),
        "prompt_cache_options": (),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            le=MAX_NEW_TOKENS,
            description=f"Most tokens to generate; default: {DEFAULT_CHAT_TOKENS}, or what the "
            "base model's context has left.",
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        Field(ge=1, le=MAX_NEW_TOKENS, description="Older name of `max_completion_tokens`."),
    ] = None
    logprobs: Annotated[bool | None, Field(description="Log-probabilities of the tokens.")] = None
    top_logprobs: Annotated[
        int | None,
        Field(ge=0, le=MAX_LOGPROBS, description="Alternatives to each token, with `logprobs`."),
    ] = None

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` means something with `logprobs` only")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("give one of `max_tokens` and `max_completion_tokens`")
        return self
