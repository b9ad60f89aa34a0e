"""Every call of the interface as data, so that both clients send the same and read the same."""

import base64
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import ValidationError

from service.client import results
from service.client.errors import UnreachableError, read_openai_error

_PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")

ResultT = TypeVar("ResultT")
ModelT = TypeVar("ModelT", bound=results.Result)

Image = bytes | str | os.PathLike[str]
"""A picture: the bytes of its file, or the file's path."""

PeftAdapter = str | os.PathLike[str] | tuple[bytes, bytes]
"""A PEFT LoRA: its directory, or the bytes of its `adapter_config.json` and its safetensors."""

Modality = Literal["text", "detection"]


class GenerateOptions(TypedDict, total=False):
    """Optional fields of `POST /generate-lora`; what is left out is the service's default."""

    modality: Modality
    mode: Literal["mode", "sample"]
    seed: int
    temperature: float
    strength: float
    refine_steps: int
    ttl_seconds: int
    cache: Literal["use", "bypass", "only"]
    out_of_distribution: Literal["reject", "nearest", "base", "generate"]


class SourceOptions(TypedDict, total=False):
    """What answers a request of `POST /infer`: exactly one of the first three."""

    task: str
    adapter_id: str
    alias: str
    out_of_distribution: Literal["reject", "nearest", "base", "generate"]


class InferOptions(SourceOptions, total=False):
    """Optional fields of `POST /infer` without an image."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: Sequence[str]


class DetectOptions(SourceOptions, total=False):
    """Optional fields of `POST /infer` with an image."""

    prompt: str
    num_beams: int
    max_boxes: int
    score_threshold: float
    render: bool


class CompletionOptions(TypedDict, total=False):
    """Optional fields of the OpenAI routes."""

    max_tokens: int
    temperature: float
    top_p: float
    n: int
    seed: int
    stop: str | Sequence[str]
    echo: bool
    logprobs: int | bool
    top_logprobs: int
    user: str


class UploadOptions(TypedDict, total=False):
    """Optional fields of `POST /v1/adapters`."""

    modality: Modality
    ttl_seconds: int


class AliasOptions(TypedDict, total=False):
    """Optional fields of `PUT /v1/aliases/{name}`; one of the first two is needed."""

    task: str
    adapter_id: str
    modality: Modality
    expected_generation: int
    pinned: bool
    ttl_seconds: int


@dataclass(frozen=True)
class Call(Generic[ResultT]):
    """One request and how to read its answer.

    Attributes:
        method: of HTTP.
        path: with every part quoted.
        read: makes the result of an answer without error.
        body: sent as JSON.
        query: parameters; None is left out.
        retry: whether a refusal may be followed by another attempt.
    """

    method: str
    path: str
    read: Callable[[httpx2.Response], ResultT]
    body: Mapping[str, Any] | None = None
    query: Mapping[str, Any] = field(default_factory=dict)
    retry: bool = True

    def build_arguments(self) -> dict[str, Any]:
        """Arguments of `httpx2.Client.build_request`."""
        arguments: dict[str, Any] = {
            "method": self.method,
            "url": self.path,
            "params": {name: value for name, value in self.query.items() if value is not None},
        }
        if self.body is not None:
            arguments["json"] = dict(self.body)
        return arguments


def build_generate(
    task: str | None,
    images: Sequence[Image] | None,
    examples: Sequence[str] | None,
    options: GenerateOptions,
) -> Call[results.GeneratedAdapter]:
    """`POST /generate-lora`."""
    body: dict[str, Any] = {**options}
    if task is not None:
        body["task"] = task
    if images is not None:
        body["images"] = [encode_image(image) for image in images]
    if examples is not None:
        body["examples"] = list(examples)
    return Call("POST", "/generate-lora", _reader(results.GeneratedAdapter), body)


def build_infer(prompt: str, options: InferOptions) -> Call[results.TextAnswer]:
    """`POST /infer` without an image."""
    return Call("POST", "/infer", _reader(results.TextAnswer), {**options, "prompt": prompt})


def build_detect(image: Image, options: DetectOptions) -> Call[results.Detections]:
    """`POST /infer` with an image."""
    body = {**options, "image": encode_image(image)}
    return Call("POST", "/infer", _reader(results.Detections), body)


def build_list(limit: int, offset: int) -> Call[results.AdapterPage]:
    """`GET /v1/adapters`."""
    query = {"limit": limit, "offset": offset}
    return Call("GET", "/v1/adapters", _reader(results.AdapterPage), query=query)


def build_upload(adapter: PeftAdapter, options: UploadOptions) -> Call[results.UploadedAdapter]:
    """`POST /v1/adapters`."""
    if isinstance(adapter, tuple):
        config, weights = adapter
    else:
        config, weights = (Path(adapter, name).read_bytes() for name in _PEFT_FILES)
    body = {**options, "config": _encode(config), "weights": _encode(weights)}
    return Call("POST", "/v1/adapters", _reader(results.UploadedAdapter), body)


def build_get(adapter_id: str) -> Call[results.Adapter]:
    """`GET /v1/adapters/{adapter_id}`."""
    return Call("GET", f"/v1/adapters/{_quote(adapter_id)}", _reader(results.Adapter))


def build_delete(adapter_id: str) -> Call[results.AdapterDeletion]:
    """`DELETE /v1/adapters/{adapter_id}`."""
    path = f"/v1/adapters/{_quote(adapter_id)}"
    return Call("DELETE", path, _reader(results.AdapterDeletion))


def build_download(adapter_id: str) -> Call[bytes]:
    """`GET /v1/adapters/{adapter_id}/peft.zip`."""
    path = f"/v1/adapters/{_quote(adapter_id)}/peft.zip"
    return Call("GET", path, lambda response: bytes(response.content))


def build_put_alias(name: str, options: AliasOptions) -> Call[results.Alias]:
    """`PUT /v1/aliases/{name}`."""
    return Call("PUT", f"/v1/aliases/{_quote(name)}", _reader(results.Alias), {**options})


def build_get_alias(name: str) -> Call[results.Alias]:
    """`GET /v1/aliases/{name}`."""
    return Call("GET", f"/v1/aliases/{_quote(name)}", _reader(results.Alias))


def build_list_aliases(limit: int, offset: int) -> Call[results.AliasPage]:
    """`GET /v1/aliases`."""
    query = {"limit": limit, "offset": offset}
    return Call("GET", "/v1/aliases", _reader(results.AliasPage), query=query)


def build_delete_alias(name: str, expected_generation: int | None) -> Call[results.AliasDeletion]:
    """`DELETE /v1/aliases/{name}`."""
    query = {"expected_generation": expected_generation}
    path = f"/v1/aliases/{_quote(name)}"
    return Call("DELETE", path, _reader(results.AliasDeletion), query=query)


def build_complete(
    prompt: str | Sequence[int] | Sequence[str], model: str, options: CompletionOptions
) -> Call[results.Completion]:
    """`POST /v1/completions`."""
    body = {**options, "model": model, "prompt": prompt}
    return Call("POST", "/v1/completions", _reader(results.Completion), body)


def build_chat(
    messages: Sequence[Mapping[str, str]], model: str, options: CompletionOptions
) -> Call[results.Chat]:
    """`POST /v1/chat/completions`."""
    body = {**options, "model": model, "messages": list(messages)}
    return Call("POST", "/v1/chat/completions", _reader(results.Chat), body)


def build_models() -> Call[tuple[results.Model, ...]]:
    """`GET /v1/models`."""

    def read(response: httpx2.Response) -> tuple[results.Model, ...]:
        items = _read_json(response)["data"]
        return tuple(_validate(results.Model, item) for item in items)

    return Call("GET", "/v1/models", read)


def build_health() -> Call[results.Health]:
    """`GET /health/ready`; never sent again, because who asks wants to know of now."""
    return Call("GET", "/health/ready", _reader(results.Health), retry=False)


def build_metrics() -> Call[str]:
    """`GET /metrics`."""
    return Call("GET", "/metrics", lambda response: str(response.text))


def encode_image(image: Image) -> str:
    """A picture in base64, read from its file where it is a path."""
    return _encode(image if isinstance(image, bytes) else Path(image).read_bytes())


def read_event(line: str, kind: type[ModelT]) -> ModelT | None:
    """One line of a stream of server-sent events; None where it holds no piece of the answer.

    Raises:
        ApiError: the service broke off.
    """
    name, _, value = line.partition(":")
    value = value.strip()
    if name != "data" or value == "[DONE]":
        return None
    try:
        body = json.loads(value)
    except ValueError as error:
        raise UnreachableError(f"not an event: {value[:80]!r}") from error
    if "error" in body:
        raise read_openai_error(body["error"], 200)
    if kind is results.Chat:  # a piece is called `delta` there
        body["choices"] = [{**each, "message": each["delta"]} for each in body["choices"]]
    return _validate(kind, body)


def _reader(kind: type[ModelT]) -> Callable[[httpx2.Response], ModelT]:
    return lambda response: _validate(kind, _read_json(response))


def _read_json(response: httpx2.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise UnreachableError(f"{response.url} did not answer with JSON") from error


def _validate(kind: type[ModelT], body: Any) -> ModelT:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise UnreachableError(
            f"the answer is none that this client knows ({error.error_count()} fields are not "
            "as expected): is that the right service, and this client's version?"
        ) from error


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _quote(part: str) -> str:
    return quote(part, safe="")
