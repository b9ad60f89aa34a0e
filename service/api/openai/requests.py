"""Requests of the OpenAI routes: what is served, what is ignored by name, and what is refused.

What chats add is in `chat_requests`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.adapters.distribution import OutOfDistribution
from service.api.openai.errors import UnknownParameterError, UnsupportedParameterError
from service.api.requests import (
    MAX_NEW_TOKENS,
    MAX_PROMPT_CHARACTERS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TEMPERATURE,
)
from service.inference.completion import MAX_LOGPROBS

MAX_CHOICES = 64
"""Most choices of one request: prompts times `n`."""
MAX_N = 16
MAX_MODEL_CHARACTERS = 2_048
MAX_PROMPT_TOKENS = 65_536
DEFAULT_COMPLETION_TOKENS = 16
_INT64 = 2**63
_MAX_NAME = 64

StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
PromptText = Annotated[StrictStr, Field(max_length=MAX_PROMPT_CHARACTERS)]
TokenId = Annotated[StrictInt, Field(ge=0)]
PromptTokens = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]


def _name_shapes(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """One message in place of one for each shape that a prompt may have."""
    try:
        return validate(value)
    except ValidationError:
        raise PydanticCustomError(
            "prompt_shape",
            "send a text, a list of texts, a list of token ids, or a list of such lists: at most "
            "{prompts} of them, texts of up to {characters} characters, tokens from 0, none empty",
            {"prompts": MAX_CHOICES, "characters": MAX_PROMPT_CHARACTERS},
        ) from None


Prompts = Annotated[
    PromptText
    | Annotated[list[PromptText], Field(min_length=1, max_length=MAX_CHOICES)]
    | PromptTokens
    | Annotated[list[PromptTokens], Field(min_length=1, max_length=MAX_CHOICES)],
    WrapValidator(_name_shapes),
    Field(description="Text or token ids to continue, or several of one kind."),
]


class Checked(BaseModel):
    """Refuses what it does not know by name; accepts what a client sends without meaning it.

    Attributes:
        neutral: parameters of OpenAI's API that are not implemented, with the values that ask
            for nothing; null always does.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name not in cls.neutral:
                shown = str(name)[:_MAX_NAME]
                raise UnknownParameterError(f"unknown parameter {shown!r}: leave it out", shown)
            elif value is not None and not any(
                type(value) is type(each) and value == each for each in cls.neutral[name]
            ):
                raise UnsupportedParameterError(
                    f"{name!r} is not implemented here: leave it out", name
                )
        return kept


class StreamOptions(Checked):
    """What a stream holds beside its text."""

    include_usage: Annotated[bool | None, Field(description="A last chunk with token counts.")] = (
        None
    )
    include_obfuscation: Annotated[bool | None, Field(description="Ignored.")] = None


class Sampled(Checked):
    """What completions and chats have in common."""

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "presence_penalty": (0, 0.0),
        "frequency_penalty": (0, 0.0),
        "logit_bias": ({},),
    }

    model: Annotated[
        str,
        Field(
            min_length=1,
            max_length=MAX_MODEL_CHARACTERS,
            description="What answers: `base` or the base model's reference, an adapter's alias "
            "or id, or `task:` and a task in words, whose adapter is generated first where none is "
            "cached (scope `generate`).",
            examples=["task:Continue the text in the style of a cooking recipe."],
        ),
    ]
    max_tokens: Annotated[
        int | None, Field(ge=0, le=MAX_NEW_TOKENS, description="Most tokens to generate.")
    ] = None
    temperature: Annotated[
        float | None,
        Field(ge=0, le=MAX_TEMPERATURE, description="0 is greedy decoding; default: 1."),
    ] = None
    top_p: Annotated[
        float | None, Field(gt=0, le=1, description="Nucleus sampling mass; default: 1.")
    ] = None
    n: Annotated[
        int | None, Field(ge=1, le=MAX_N, description="Choices per prompt; default: 1.")
    ] = None
    seed: Annotated[
        int | None,
        Field(
            ge=-_INT64,
            lt=_INT64,
            description="Of the first choice; the next ones have `seed` + 1, ... Default: a new "
            "one, which `icm_lora` tells.",
        ),
    ] = None
    stop: Annotated[
        StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None,
        Field(description="Texts that end the completion, not included."),
    ] = None
    stream: Annotated[
        bool | None, Field(description="Answer with server-sent events as the text grows.")
    ] = None
    stream_options: StreamOptions | None = None
    out_of_distribution: Annotated[
        OutOfDistribution | None,
        Field(
            description="Not OpenAI's: what to do where a task's words lie outside of what the "
            "generator was trained on. Default: the service's."
        ),
    ] = None
    user: Annotated[Any, Field(description="Ignored.")] = None
    metadata: Annotated[Any, Field(description="Ignored.")] = None
    store: Annotated[Any, Field(description="Ignored.")] = None
    service_tier: Annotated[Any, Field(description="Ignored.")] = None
    safety_identifier: Annotated[Any, Field(description="Ignored.")] = None
    prompt_cache_key: Annotated[Any, Field(description="Ignored.")] = None
    prompt_cache_retention: Annotated[Any, Field(description="Ignored.")] = None

    @model_validator(mode="after")
    def _check_stream(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` means something with `stream` only: leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the completion."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionBody(Sampled):
    """Prompts to continue."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "base", "prompt": "Preheat the oven to", "max_tokens": 32},
                {"model": "base", "prompt": [[1, 2, 3]], "max_tokens": 1, "echo": True},
            ]
        }
    )
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **Sampled.neutral,
        "best_of": (1,),
        "suffix": ("",),
    }

    prompt: Prompts
    echo: Annotated[bool | None, Field(description="Answer with the prompt as well.")] = None
    logprobs: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_LOGPROBS,
            description="Log-probabilities (nats) of the tokens, with so many alternatives; with "
            "`echo` those of the prompt as well.",
        ),
    ] = None

    @model_validator(mode="after")
    def _check_sizes(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("`max_tokens` 0 means something with `echo` only: choose at least 1")
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise ValueError(f"prompts times `n` exceed {MAX_CHOICES}: send fewer at a time")
        return self

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """What is to be continued, one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        return [each if isinstance(each, str) else tuple(each) for each in self.prompt]
