"""What calls return. Fields that a newer service adds are ignored, not refused."""

import base64
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict


class Result(BaseModel):
    """Base of all results: frozen, open to newer services."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Health(Result):
    """Readiness; `degraded` names what the service goes on without."""

    status: str
    degraded: tuple[str, ...] = ()


class BundleRef(Result):
    """The generator that made an adapter."""

    name: str
    version: str
    digest: str


class NearestTask(Result):
    """A training task near the description; similarity is a cosine."""

    name: str
    similarity: float


class Adapter(Result):
    """An adapter and where it came from."""

    adapter_id: str
    modality: str
    recipe: dict[str, Any] | None = None
    bundle: BundleRef
    kind: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    num_params: int
    size_bytes: int
    vector_sha256: str
    nearest: tuple[NearestTask, ...] = ()
    in_distribution: float | None = None
    regenerable: bool = True


class UploadedAdapter(Adapter):
    """An adapter that was trained elsewhere; caches named in `degraded` did not take it."""

    degraded: tuple[str, ...] = ()


class Refinement(Result):
    """What gradient steps with examples came to, in nats a token of the examples."""

    steps: int
    loss_before: float
    loss_after: float


class GeneratedAdapter(Adapter):
    """An adapter that is ready to answer; `slot` is None where running requests held them all."""

    cache: str
    degraded: tuple[str, ...]
    slot: int | None
    generation: int | None
    milliseconds: dict[str, float]
    decision: str | None = None
    similarity: float | None = None
    threshold: float | None = None
    refinement: Refinement | None = None


class AdapterPage(Result):
    """Adapters of the process that answered, a page at a time."""

    adapters: tuple[Adapter, ...]
    total: int


class AdapterDeletion(Result):
    """An adapter that is gone; caches named in `degraded` may still hold it."""

    adapter_id: str
    degraded: tuple[str, ...] = ()


class Usage(Result):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Receipt(Result):
    """Which adapter, in which slot, was in the forward pass; for a task, why this one."""

    adapter_id: str
    vector_sha256: str | None
    slot: int
    generation: int
    bundle: BundleRef
    decision: str | None = None
    nearest_task: str | None = None
    in_distribution: float | None = None
    similarity: float | None = None
    threshold: float | None = None


class TextAnswer(Result):
    """A completion of a prompt, with its receipt."""

    text: str
    finish_reason: str
    usage: Usage
    receipt: Receipt
    cache: str | None
    degraded: tuple[str, ...]
    milliseconds: dict[str, float]


class Box(Result):
    """An object: left, top, right, bottom in pixels; score 0 to 1."""

    box: tuple[float, float, float, float]
    label: str
    score: float


class Detections(Result):
    """What was found in an image, by falling score, with its receipt."""

    boxes: tuple[Box, ...]
    width: int
    height: int
    rendered_png: str | None = None
    receipt: Receipt
    cache: str | None
    degraded: tuple[str, ...]
    milliseconds: dict[str, float]

    @property
    def picture(self) -> bytes | None:
        """The image with its boxes drawn, a PNG file; None unless `render` asked for it."""
        return None if self.rendered_png is None else base64.b64decode(self.rendered_png)


class Alias(Result):
    """A name and the adapter that it stands for."""

    name: str
    adapter_id: str
    generation: int
    created_at: datetime
    expires_at: datetime | None = None
    pinned: bool = False
    regenerable: bool = True
    degraded: tuple[str, ...] = ()


class AliasPage(Result):
    """Aliases of the caller, a page at a time."""

    aliases: tuple[Alias, ...]
    total: int
    degraded: tuple[str, ...] = ()


class AliasDeletion(Result):
    """A name that is free again, and what it stood for."""

    name: str
    adapter_id: str
    generation: int


class Model(Result):
    """A model of the OpenAI routes: the base, or an adapter whose `parent` it is."""

    id: str
    parent: str | None = None
    root: str | None = None
    owned_by: str | None = None


class Choice(Result):
    """One of the `n` answers to a prompt, or what it has grown by."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class Completion(Result):
    """Answer of `/v1/completions`, or one piece of it where it is streamed."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage | None = None


class Message(Result):
    """What the assistant says; in a stream, what its message has grown by."""

    role: str | None = None
    content: str | None = None


class ChatChoice(Result):
    """One of the `n` answers to a conversation, or what it has grown by."""

    index: int
    message: Message
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class Chat(Result):
    """Answer of `/v1/chat/completions`, or one piece of it where it is streamed."""

    id: str
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage | None = None
