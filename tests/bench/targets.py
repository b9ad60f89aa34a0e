"""What is asked of a server under measurement, in one form for ours and for a peer."""

import asyncio
import io
import json
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.client import HttpClient, RefusedError

PROMPTS = (
    "The committee met on Tuesday to discuss the",
    "In the morning the old man went down to the",
    "A long time ago, in a village by the sea, there",
    "The history of the city begins with the",
    "She opened the letter, read it twice, and then",
    "The first thing that one has to know about rivers is",
    "Ladies and gentlemen, today we are here because",
    "After the war, the government decided that the",
)
"""Beginnings that a language model goes on from at length."""


@dataclass(frozen=True)
class Spoken:
    """An answered completion.

    Attributes:
        status: of HTTP.
        text: of the completion; of the error where the status is not 200.
        tokens: generated.
        finish_reason: `length`, `stop`, or empty for an error.
        seconds: from before the request to the end of the answer.
        first_seconds: to the first token; None where the answer came whole.
        ended: `time.perf_counter()` at the end.
    """

    status: int
    text: str
    tokens: int
    finish_reason: str
    seconds: float
    first_seconds: float | None
    ended: float


@dataclass(frozen=True)
class Ask:
    """A completion to ask for.

    Attributes:
        model: `base`, an adapter's id, a LoRA's name, or `task:<words>`.
        prompt: text to continue.
        max_tokens: to generate.
    """

    model: str
    prompt: str
    max_tokens: int


class CompletionServer:
    """A server with OpenAI's `/v1/completions`.

    Args:
        client: to it.
        base: its name for the base model.
        ignores_end: it can be told to go on after an end of text (vLLM's `ignore_eos`).
    """

    def __init__(self, client: HttpClient, base: str, *, ignores_end: bool) -> None:
        self.client = client
        self._base = base
        self._ignores_end = ignores_end

    async def complete(self, ask: Ask, *, stream: bool = False) -> Spoken:
        """Asks greedily, and reads the answer whole or as a stream."""
        body: dict[str, Any] = {
            "model": self._base if ask.model == "base" else ask.model,
            "prompt": ask.prompt,
            "max_tokens": ask.max_tokens,
            "temperature": 0,
        }
        if self._ignores_end:
            body["ignore_eos"] = True
        if stream:
            return await self._stream({**body, "stream": True})
        reply = await self.client.post("/v1/completions", body)
        if reply.status != 200:
            return _refuse(reply.status, reply.body, reply.seconds)
        answer = reply.json()
        choice = answer["choices"][0]
        return Spoken(
            200,
            choice["text"],
            answer["usage"]["completion_tokens"],
            choice["finish_reason"],
            reply.seconds,
            None,
            time.perf_counter(),
        )

    async def _stream(self, body: dict[str, Any]) -> Spoken:
        started = time.perf_counter()
        text, finish_reason, tokens, first = "", "", 0, None
        try:
            body["stream_options"] = {"include_usage": True}
            async for seconds, data in self.client.events("/v1/completions", body):
                for choice in data.get("choices", []):
                    if first is None and choice["text"]:
                        first = seconds
                    text += choice["text"]
                    finish_reason = choice.get("finish_reason") or finish_reason
                if data.get("usage"):
                    tokens = data["usage"]["completion_tokens"]
        except RefusedError as refusal:
            return _refuse(refusal.reply.status, refusal.reply.body, refusal.reply.seconds)
        ended = time.perf_counter()
        return Spoken(200, text, tokens, finish_reason, ended - started, first, ended)


class InferServer:
    """Our service by its own route `/infer`, whole answers only."""

    def __init__(self, client: HttpClient) -> None:
        self.client = client

    async def complete(self, ask: Ask, *, stream: bool = False) -> Spoken:
        """Asks greedily."""
        assert not stream, "/infer does not stream"
        name, _, task = ask.model.partition("task:")
        chosen = {"adapter_id": name} if name else {"task": task}
        body = {**chosen, "prompt": ask.prompt, "max_tokens": ask.max_tokens}
        reply = await self.client.post("/infer", body)
        if reply.status != 200:
            return _refuse(reply.status, reply.body, reply.seconds)
        answer = reply.json()
        return Spoken(
            200,
            answer["text"],
            answer["usage"]["completion_tokens"],
            answer["finish_reason"],
            reply.seconds,
            None,
            time.perf_counter(),
        )


AnyServer = CompletionServer | InferServer


def _refuse(status: int, body: bytes, seconds: float) -> Spoken:
    text = body.decode(errors="replace")
    return Spoken(status, text, 0, "", seconds, None, time.perf_counter())


async def open_ours(client: HttpClient) -> AnyServer:
    """Our service by `/v1/completions`."""
    document = (await client.request("GET", "/openapi.json")).json()
    if "/v1/completions" not in document["paths"]:
        return InferServer(client)
    return CompletionServer(client, "base", ignores_end=False)


async def open_vllm(client: HttpClient) -> CompletionServer:
    """vLLM; its base model is the first that it lists."""
    models = (await client.request("GET", "/v1/models")).json()
    return CompletionServer(client, models["data"][0]["id"], ignores_end=True)


async def generate_adapters(
    client: HttpClient, tasks: Sequence[str], count: int, *, at_once: int = 4
) -> list[str]:
    """Ids of `count` different adapters of our service: the tasks in turn, in growing strengths.

    Raises:
        RuntimeError: one could not be generated.
    """
    turn = asyncio.Semaphore(at_once)

    async def generate(number: int) -> str:
        # strength scales the update: different numbers in every adapter, all of a size that serves
        body = {
            "task": tasks[number % len(tasks)],
            "modality": "text",
            "strength": round(1 - 0.5 * (number // len(tasks)) / max(1, count // len(tasks)), 6),
        }
        async with turn:
            reply = await client.post("/generate-lora", body)
        if reply.status != 200:
            raise RuntimeError(f"/generate-lora: {reply.status} {reply.body[:500]!r}")
        return str(reply.json()["adapter_id"])

    ids = await asyncio.gather(*(generate(number) for number in range(count)))
    assert len(set(ids)) == count
    return list(ids)


async def export_adapters(client: HttpClient, ids: Sequence[str], folder: Path) -> list[Path]:
    """Our adapters as PEFT directories, for the peer to load."""
    folders = []
    for adapter_id in ids:
        reply = await client.request("GET", f"/v1/adapters/{adapter_id}/peft.zip")
        assert reply.status == 200, reply.body
        target = folder / adapter_id[:16]
        with zipfile.ZipFile(io.BytesIO(reply.body)) as archive:
            archive.extractall(target)
        folders.append(target)
    return folders


async def load_lora(client: HttpClient, name: str, folder: Path) -> float:
    """Has vLLM load a PEFT directory; seconds that its client waits.

    Raises:
        RuntimeError: it refused.
    """
    body = {"lora_name": name, "lora_path": str(folder)}
    reply = await client.post("/v1/load_lora_adapter", body)
    if reply.status != 200:
        raise RuntimeError(f"load_lora_adapter: {reply.status} {reply.body[:500]!r}")
    return reply.seconds


async def unload_lora(client: HttpClient, name: str) -> None:
    """Has vLLM forget a LoRA."""
    await client.post("/v1/unload_lora_adapter", {"lora_name": name})


async def ask_all(
    server: AnyServer, asks: Sequence[Ask], *, at_once: int, stream: bool = False
) -> tuple[list[Spoken], float]:
    """A closed loop: so many clients, each asking the next as soon as it has its answer.

    Returns:
        Answers in the order of the requests, and the seconds that all took.
    """
    answers: dict[int, Spoken] = {}
    waiting = iter(enumerate(asks))

    async def work() -> None:
        for index, ask in waiting:
            answers[index] = await server.complete(ask, stream=stream)

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(min(at_once, len(asks)))))
    seconds = time.perf_counter() - started
    return [answers[index] for index in range(len(asks))], seconds


def count_tokens(answers: Sequence[Spoken]) -> int:
    """Tokens of answers that all must be there.

    Raises:
        RuntimeError: one is an error.
    """
    for answer in answers:
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {answer.text[:500]}")
    return sum(answer.tokens for answer in answers)


async def choose_endless(
    server: AnyServer, models: Sequence[str], max_tokens: int, prompts: Sequence[str] = PROMPTS
) -> list[Ask]:
    """For each model a request that does not end before `max_tokens`.

    Our service stops at an end of text. So that a row is not shorter than its peer's, prompts
    are tried until each model has one that it goes on from; it also warms the server up.

    Raises:
        RuntimeError: a model ends after every prompt.
    """
    chosen: dict[int, Ask] = {}
    for turn in range(len(prompts)):
        left = [index for index in range(len(models)) if index not in chosen]
        asks = [
            Ask(models[index], prompts[(index + turn) % len(prompts)], max_tokens) for index in left
        ]
        answers, _ = await ask_all(server, asks, at_once=16)
        count_tokens(answers)
        chosen |= {
            index: ask
            for index, ask, answer in zip(left, asks, answers, strict=True)
            if answer.tokens == max_tokens
        }
        if len(chosen) == len(models):
            return [chosen[index] for index in range(len(models))]
    raise RuntimeError(f"every prompt ends early for {len(models) - len(chosen)} models")


def list_tasks(bundle: Path = Path("service/bundles/text-smollm2")) -> list[str]:
    """Descriptions of the bundle's training tasks, those of different tasks beside each other."""
    tasks = json.loads((bundle / "bundle.json").read_text())["tasks"]
    rounds = min(len(task["descriptions"]) for task in tasks)
    return [task["descriptions"][turn] for turn in range(rounds) for task in tasks]
