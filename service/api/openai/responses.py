"""Answers of the OpenAI routes, and what this service adds to them as `icm_lora`."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from service.api.schemas import AliasUse, Milliseconds, Receipt

FinishReason = Literal["stop", "length"]


class ModelCard(BaseModel):
    """Something that a request may name as its `model`."""

    id: str
    object: Literal["model"] = "model"
    created: Annotated[int, Field(description="Unix time at which this process began to serve.")]
    owned_by: Annotated[str, Field(examples=["icm-lora"])]
    root: Annotated[str, Field(description="What the id stands for: an alias's adapter.")]
    parent: Annotated[str | None, Field(description="Base of an adapter; null for the base.")]


class ModelList(BaseModel):
    """All that a request may name, but for `task:` and words."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class OpenAIUsage(BaseModel):
    """Token counts of all choices; a prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChoiceReceipt(BaseModel):
    """Which slot answered a choice."""

    index: int
    slot: int
    generation: int


class IcmLoraInfo(BaseModel):
    """What answered, and how; OpenAI's clients ignore it."""

    receipt: Annotated[Receipt, Field(description="Of the first choice.")]
    choices: Annotated[list[ChoiceReceipt], Field(description="Slots of all choices.")]
    alias: Annotated[AliasUse | None, Field(description="Null where `model` is none.")]
    decision: Annotated[
        str | None, Field(description="How a task in words got its adapter; null for others.")
    ]
    cache: Annotated[
        Literal["hit", "miss", "coalesced", "degraded"] | None,
        Field(description="How the cache took part; null where nothing was generated."),
    ]
    degraded: Annotated[list[str], Field(description="Components that are lost.")]
    seed: Annotated[int, Field(description="Of the first choice.")]
    milliseconds: Milliseconds


class LegacyLogprobs(BaseModel):
    """Log-probabilities in nats as `/v1/completions` has them, an entry a token."""

    tokens: list[str]
    token_logprobs: Annotated[
        list[float | None], Field(description="Null for a prompt's first token.")
    ]
    top_logprobs: Annotated[
        list[dict[str, float] | None] | None, Field(description="Null where 0 were asked for.")
    ]
    text_offset: Annotated[list[int], Field(description="Where each token begins in the text.")]


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: FinishReason | None


class CompletionAnswer(BaseModel):
    """Continuations of prompts, or (in a stream) a piece of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: Annotated[str, Field(description="Names the bundle in service.")]
    choices: list[CompletionChoice]
    usage: OpenAIUsage | None = None
    icm_lora: IcmLoraInfo | None = None


class TopLogprob(BaseModel):
    """A token and its log-probability in nats."""

    token: str
    logprob: float
    bytes: Annotated[list[int] | None, Field(description="Null for a part of a character.")]


class TokenLogprobInfo(TopLogprob):
    """A token, and the most probable ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities as `/v1/chat/completions` has them."""

    content: list[TokenLogprobInfo]
    refusal: None = None


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatAnswer(BaseModel):
    """Answers to a chat."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: Annotated[str, Field(description="Names the bundle in service.")]
    choices: list[ChatChoice]
    usage: OpenAIUsage
    icm_lora: IcmLoraInfo


class Delta(BaseModel):
    """What an answer grew by."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """A piece of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: OpenAIUsage | None = None
    icm_lora: IcmLoraInfo | None = None
