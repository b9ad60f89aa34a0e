"""The client for asyncio; the methods are those of `Client`."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal, Unpack, overload

import httpx2

from service.client import calls, results
from service.client.errors import ClientError, UnreachableError, describe, read_error
from service.client.retries import DEFAULT_RETRIES, RetryPolicy


class AsyncClient:
    """The HTTP interface, one coroutine a call; `complete` and `chat` give async iterators.

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
        self._http = httpx2.AsyncClient(base_url=base_url, headers=headers, timeout=timeout_seconds)
        self._retry = retry

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def health(self) -> results.Health:
        """Readiness; raises while the service starts or stops."""
        return await self._send(calls.build_health())

    async def metrics(self) -> str:
        """Metrics in Prometheus' text format; on a port of their own they are not here."""
        return await self._send(calls.build_metrics())

    async def wait_until_ready(self, timeout_seconds: float = 300.0) -> results.Health:
        """Asks until the service is ready; the last error is raised where it is not in time."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                return await self.health()
            except ClientError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.2)

    async def generate(
        self,
        task: str | None = None,
        *,
        images: Sequence[calls.Image] | None = None,
        examples: Sequence[str] | None = None,
        **options: Unpack[calls.GenerateOptions],
    ) -> results.GeneratedAdapter:
        """Makes ready the adapter of a task: in words, by example texts or both, or by images."""
        return await self._send(calls.build_generate(task, images, examples, options))

    async def infer(self, prompt: str, **options: Unpack[calls.InferOptions]) -> results.TextAnswer:
        """Completes a prompt with a task's adapter, an adapter by id or alias, or the base."""
        return await self._send(calls.build_infer(prompt, options))

    async def detect(
        self, image: calls.Image, **options: Unpack[calls.DetectOptions]
    ) -> results.Detections:
        """Finds objects in a picture: the bytes of its file, or the file's path."""
        return await self._send(calls.build_detect(image, options))

    @overload
    async def complete(
        self,
        prompt: str | Sequence[int] | Sequence[str],
        *,
        model: str = ...,
        stream: Literal[False] = ...,
        **options: Unpack[calls.CompletionOptions],
    ) -> results.Completion: ...

    @overload
    async def complete(
        self,
        prompt: str | Sequence[int] | Sequence[str],
        *,
        model: str = ...,
        stream: Literal[True],
        **options: Unpack[calls.CompletionOptions],
    ) -> AsyncIterator[results.Completion]: ...

    async def complete(
        self,
        prompt: str | Sequence[int] | Sequence[str],
        *,
        model: str = "base",
        stream: bool = False,
        **options: Unpack[calls.CompletionOptions],
    ) -> results.Completion | AsyncIterator[results.Completion]:
        """Completes a prompt; `model` is `base`, an alias, an adapter's id or `task:<words>`.

        With `stream` the pieces are given as they come; closing the iterator stops the service.
        """
        call = calls.build_complete(prompt, model, options)
        if stream:
            return self._stream(call, results.Completion)
        return await self._send(call)

    @overload
    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        model: str = ...,
        stream: Literal[False] = ...,
        **options: Unpack[calls.CompletionOptions],
    ) -> results.Chat: ...

    @overload
    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        model: str = ...,
        stream: Literal[True],
        **options: Unpack[calls.CompletionOptions],
    ) -> AsyncIterator[results.Chat]: ...

    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        model: str = "base",
        stream: bool = False,
        **options: Unpack[calls.CompletionOptions],
    ) -> results.Chat | AsyncIterator[results.Chat]:
        """Answers a conversation (`role` and `content` of each message), as `complete`."""
        call = calls.build_chat(messages, model, options)
        if stream:
            return self._stream(call, results.Chat)
        return await self._send(call)

    async def models(self) -> tuple[results.Model, ...]:
        """The base and the adapters with a name, as OpenAI lists models."""
        return await self._send(calls.build_models())

    async def list_adapters(self, limit: int = 100, offset: int = 0) -> results.AdapterPage:
        """Adapters that the process which answers holds, the most recently used first."""
        return await self._send(calls.build_list(limit, offset))

    async def get_adapter(self, adapter_id: str) -> results.Adapter:
        """What is known about an adapter."""
        return await self._send(calls.build_get(adapter_id))

    async def delete_adapter(self, adapter_id: str) -> results.AdapterDeletion:
        """Deletes an adapter."""
        return await self._send(calls.build_delete(adapter_id))

    async def upload_adapter(
        self, adapter: calls.PeftAdapter, **options: Unpack[calls.UploadOptions]
    ) -> results.UploadedAdapter:
        """Sends a PEFT LoRA that was trained elsewhere: its directory, or its files' bytes."""
        return await self._send(calls.build_upload(adapter, options))

    async def download_adapter(self, adapter_id: str) -> bytes:
        """The adapter as a PEFT LoRA directory, zipped."""
        return await self._send(calls.build_download(adapter_id))

    async def put_alias(self, name: str, **options: Unpack[calls.AliasOptions]) -> results.Alias:
        """Gives a name to an adapter, or to the adapter of a task."""
        return await self._send(calls.build_put_alias(name, options))

    async def get_alias(self, name: str) -> results.Alias:
        """What a name stands for."""
        return await self._send(calls.build_get_alias(name))

    async def list_aliases(self, limit: int = 100, offset: int = 0) -> results.AliasPage:
        """The caller's aliases."""
        return await self._send(calls.build_list_aliases(limit, offset))

    async def delete_alias(
        self, name: str, expected_generation: int | None = None
    ) -> results.AliasDeletion:
        """Frees a name; the adapter stays."""
        return await self._send(calls.build_delete_alias(name, expected_generation))

    async def _send(self, call: calls.Call[calls.ResultT]) -> calls.ResultT:
        response = await self._open(call)
        try:
            await response.aread()
        except httpx2.HTTPError as error:
            raise UnreachableError(f"the answer broke off: {describe(error)}") from error
        finally:
            await response.aclose()
        return call.read(response)

    async def _stream(
        self, call: calls.Call[Any], kind: type[calls.ModelT]
    ) -> AsyncIterator[calls.ModelT]:
        body = {**(call.body or {}), "stream": True}
        response = await self._open(dataclasses.replace(call, body=body))
        try:
            async for line in response.aiter_lines():
                if (piece := calls.read_event(line, kind)) is not None:
                    yield piece
        except httpx2.HTTPError as error:
            raise UnreachableError(f"the stream broke off: {describe(error)}") from error
        finally:
            await response.aclose()

    async def _open(self, call: calls.Call[Any]) -> httpx2.Response:
        """The head of an answer without error, after as many attempts as the policy allows."""
        waited, attempt = 0.0, 0
        while True:
            request = self._http.build_request(**call.build_arguments())
            try:
                response = await self._http.send(request, stream=True)
                if not response.is_error:
                    return response
                await response.aread()
            except httpx2.HTTPError as error:
                raise UnreachableError(f"{request.url}: {describe(error)}") from error
            failure = read_error(response)
            pause = self._retry.choose_pause(failure, attempt, waited) if call.retry else None
            if pause is None:
                raise failure
            await asyncio.sleep(pause)
            waited, attempt = waited + pause, attempt + 1
