"""The client, blocking."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack, overload

import httpx2

from service.client import calls, results
from service.client.errors import ClientError, UnreachableError, describe, read_error
from service.client.retries import DEFAULT_RETRIES, RetryPolicy


class Client:
    """The HTTP interface, one method a call. May be used from several threads.

    Args:
        base_url: of the service, such as `http://127.0.0.1:8000`.
        api_key: sent as a bearer token, where the service asks for keys.
        timeout_seconds: of one attempt: to connect, and between two pieces of an answer.
        retry: when refused calls (429, 503) are sent again.

    Every method raises `ApiError` where the service answers with an error, and
    `UnreachableError` where it does not answer.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout_seconds: float = 120.0,
        retry: RetryPolicy = DEFAULT_RETRIES,
    ) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx2.Client(base_url=base_url, headers=headers, timeout=timeout_seconds)
        self._retry = retry

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def health(self) -> results.Health:
        """Readiness; raises while the service starts or stops."""
        return self._send(calls.build_health())

    def metrics(self) -> str:
        """Metrics in Prometheus' text format; on a port of their own they are not here."""
        return self._send(calls.build_metrics())

    def wait_until_ready(self, timeout_seconds: float = 300.0) -> results.Health:
        """Asks until the service is ready; the last error is raised where it is not in time."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                return self.health()
            except ClientError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def generate(
        self,
        task: str | None = None,
        *,
        images: Sequence[calls.Image] | None = None,
        examples: Sequence[str] | None = None,
        **options: Unpack[calls.GenerateOptions],
    ) -> results.GeneratedAdapter:
        """Makes ready the adapter of a task: in words, by example texts or both, or by images."""
        return self._send(calls.build_generate(task, images, examples, options))

    def infer(self, prompt: str, **options: Unpack[calls.InferOptions]) -> results.TextAnswer:
        """Completes a prompt with a task's adapter, an adapter by id or alias, or the base."""
        return self._send(calls.build_infer(prompt, options))

    def detect(
        self, image: calls.Image, **options: Unpack[calls.DetectOptions]
    ) -> results.Detections:
        """Finds objects in a picture: the bytes of its file, or the file's path."""
        return self._send(calls.build_detect(image, options))

    @overload
    def complete(
        self,
        prompt: str | Sequence[int] | Sequence[str],
        *,
        model: str = ...,
        stream: Literal[False] = ...,
        **options: Unpack[calls.CompletionOptions],
    ) -> results.Completion: ...

    @overload
    def complete(
        self,
        prompt: str | Sequence[int] | Sequence[str],
        *,
        model: str = ...,
        stream: Literal[True],
        **options: Unpack[calls.CompletionOptions],
    ) -> Iterator[results.Completion]: ...

    def complete(
        self,
        prompt: str | Sequence[int] | Sequence[str],
        *,
        model: str = "base",
        stream: bool = False,
        **options: Unpack[calls.CompletionOptions],
    ) -> results.Completion | Iterator[results.Completion]:
        """Completes a prompt; `model` is `base`, an alias, an adapter's id or `task:<words>`.

        With `stream` the pieces are given as they come; closing the iterator stops the service.
        """
        call = calls.build_complete(prompt, model, options)
        if stream:
            return self._stream(call, results.Completion)
        return self._send(call)

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        model: str = ...,
        stream: Literal[False] = ...,
        **options: Unpack[calls.CompletionOptions],
    ) -> results.Chat: ...

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        model: str = ...,
        stream: Literal[True],
        **options: Unpack[calls.CompletionOptions],
    ) -> Iterator[results.Chat]: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        model: str = "base",
        stream: bool = False,
        **options: Unpack[calls.CompletionOptions],
    ) -> results.Chat | Iterator[results.Chat]:
        """Answers a conversation (`role` and `content` of each message), as `complete`."""
        call = calls.build_chat(messages, model, options)
        if stream:
            return self._stream(call, results.Chat)
        return self._send(call)

    def models(self) -> tuple[results.Model, ...]:
        """The base and the adapters with a name, as OpenAI lists models."""
        return self._send(calls.build_models())

    def list_adapters(self, limit: int = 100, offset: int = 0) -> results.AdapterPage:
        """Adapters that the process which answers holds, the most recently used first."""
        return self._send(calls.build_list(limit, offset))

    def get_adapter(self, adapter_id: str) -> results.Adapter:
        """What is known about an adapter."""
        return self._send(calls.build_get(adapter_id))

    def delete_adapter(self, adapter_id: str) -> results.AdapterDeletion:
        """Deletes an adapter."""
        return self._send(calls.build_delete(adapter_id))

    def upload_adapter(
        self, adapter: calls.PeftAdapter, **options: Unpack[calls.UploadOptions]
    ) -> results.UploadedAdapter:
        """Sends a PEFT LoRA that was trained elsewhere: its directory, or its files' bytes."""
        return self._send(calls.build_upload(adapter, options))

    def download_adapter(self, adapter_id: str) -> bytes:
        """The adapter as a PEFT LoRA directory, zipped."""
        return self._send(calls.build_download(adapter_id))

    def put_alias(self, name: str, **options: Unpack[calls.AliasOptions]) -> results.Alias:
        """Gives a name to an adapter, or to the adapter of a task."""
        return self._send(calls.build_put_alias(name, options))

    def get_alias(self, name: str) -> results.Alias:
        """What a name stands for."""
        return self._send(calls.build_get_alias(name))

    def list_aliases(self, limit: int = 100, offset: int = 0) -> results.AliasPage:
        """The caller's aliases."""
        return self._send(calls.build_list_aliases(limit, offset))

    def delete_alias(
        self, name: str, expected_generation: int | None = None
    ) -> results.AliasDeletion:
        """Frees a name; the adapter stays."""
        return self._send(calls.build_delete_alias(name, expected_generation))

    def _send(self, call: calls.Call[calls.ResultT]) -> calls.ResultT:
        response = self._open(call)
        try:
            response.read()
        except httpx2.HTTPError as error:
            raise UnreachableError(f"the answer broke off: {describe(error)}") from error
        finally:
            response.close()
        return call.read(response)

    def _stream(self, call: calls.Call[Any], kind: type[calls.ModelT]) -> Iterator[calls.ModelT]:
        body = {**(call.body or {}), "stream": True}
        response = self._open(dataclasses.replace(call, body=body))
        try:
            for line in response.iter_lines():
                if (piece := calls.read_event(line, kind)) is not None:
                    yield piece
        except httpx2.HTTPError as error:
            raise UnreachableError(f"the stream broke off: {describe(error)}") from error
        finally:
            response.close()

    def _open(self, call: calls.Call[Any]) -> httpx2.Response:
        """The head of an answer without error, after as many attempts as the policy allows."""
        waited, attempt = 0.0, 0
        while True:
            request = self._http.build_request(**call.build_arguments())
            try:
                response = self._http.send(request, stream=True)
                if not response.is_error:
                    return response
                response.read()
            except httpx2.HTTPError as error:
                raise UnreachableError(f"{request.url}: {describe(error)}") from error
            failure = read_error(response)
            pause = self._retry.choose_pause(failure, attempt, waited) if call.retry else None
            if pause is None:
                raise failure
            time.sleep(pause)
            waited, attempt = waited + pause, attempt + 1
