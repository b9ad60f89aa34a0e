"""A client that does one thing after another at random, and compares what it is told."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from tests.bench.client import HttpClient, RefusedError, Reply
from tests.chaos.ledger import Ledger
from tests.chaos.world import (
    ALIASES,
    ASKS,
    COMPLETIONS,
    LOAD,
    LOGPROB_TOLERANCE,
    UNLOAD,
    Reference,
    Specimen,
    World,
)

NAMES = ("red", "green", "blue")
PROTECTED = 2
"""The first so many adapters are never deleted: that they are not found is a violation."""

_GONE = {"adapter_not_found", "alias_not_found", "not_cached", "model_not_found"}
_BUSY = {"queue_full", "no_free_slot"}
_RACED = {"generation_conflict"}


class Actor:
    """One client.

    Args:
        client: to the service.
        world: what may be asked.
        ledger: where outcomes go.
        seed: of what it does.
    """

    def __init__(self, client: HttpClient, world: World, ledger: Ledger, seed: int) -> None:
        self._client = client
        self._world = world
        self._ledger = ledger
        self._chance = random.Random(seed)
        deeds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (30, self._infer),
            (8, self._infer_base),
            (10, self._infer_task),
            (10, self._generate),
            (10, self._delete),
            (6, self._leave),
        ]
        if COMPLETIONS in world.routes:
            deeds += [(15, self._complete), (15, self._stream), (6, self._leave_stream)]
        if ALIASES in world.routes:
            deeds += [(8, self._put_alias), (20, self._infer_alias), (2, self._delete_alias)]
        if LOAD in world.routes:
            deeds += [(5, self._load), (5, self._unload)]
        self._weights = [weight for weight, _ in deeds]
        self._deeds = [deed for _, deed in deeds]

    async def act(self, until: float) -> None:
        """Does things until the event loop's time has come."""
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            [deed] = self._chance.choices(self._deeds, self._weights)
            await deed()

    # ------------------------------------------------------------------ what it does

    async def _infer(self) -> None:
        specimen, prompt, length = self._choose()
        body = {"adapter_id": specimen.adapter_id, "prompt": prompt, "max_tokens": length}
        reply = await self._post("infer", "/infer", body, specimen)
        if reply is not None:
            self._check_infer(reply.json(), specimen, prompt, length)

    async def _infer_base(self) -> None:
        _, prompt, length = self._choose()
        body = {"adapter_id": "base", "prompt": prompt, "max_tokens": length}
        reply = await self._post("infer base", "/infer", body, self._world.base)
        if reply is not None:
            self._check_infer(reply.json(), self._world.base, prompt, length)

    async def _infer_task(self) -> None:
        plain = [each for each in self._world.specimens if "strength" not in each.body]
        specimen, (_, prompt, length) = self._chance.choice(plain), self._choose()
        body = {"task": specimen.body["task"], "prompt": prompt, "max_tokens": length}
        reply = await self._post("infer task", "/infer", body, specimen, may_be_gone=False)
        if reply is not None:
            self._check_infer(reply.json(), specimen, prompt, length)

    async def _generate(self) -> None:
        specimen, _, _ = self._choose()
        cache = self._chance.choice(("use", "use", "bypass"))
        body = {**specimen.body, "cache": cache}
        reply = await self._post(
            f"generate ({cache})", "/generate-lora", body, specimen, may_be_gone=False
        )
        if reply is not None:
            answer = reply.json()
            told = (answer["adapter_id"], answer["vector_sha256"])
            if told != (specimen.adapter_id, specimen.vector_sha256):
                self._ledger.accuse(f"{specimen.body} gave {told}")
            self._learn_slot(answer, specimen)

    async def _delete(self) -> None:
        specimen = self._chance.choice(self._world.specimens[PROTECTED:])
        reply = await self._client.request("DELETE", f"/v1/adapters/{specimen.adapter_id}")
        self._judge("delete", reply, may_be_gone=True)

    async def _leave(self) -> None:
        """Goes away while it is being answered: nobody else may notice."""
        specimen, prompt, length = self._choose()
        body = {"adapter_id": specimen.adapter_id, "prompt": prompt, "max_tokens": length}
        with suppress(TimeoutError):
            async with asyncio.timeout(self._chance.uniform(0.001, 0.05)):
                await self._client.post("/infer", body)
        self._ledger.counts["leave"] += 1

    async def _complete(self) -> None:
        specimen, prompt, length = self._choose()
        body = self._build_completion(specimen, prompt, length)
        reply = await self._post("complete", COMPLETIONS, body, specimen)
        if reply is not None:
            answer = reply.json()
            choice = answer["choices"][0]
            reference = self._refer(specimen, prompt, length)
            self._check_receipt(answer["icm_lora"]["receipt"], specimen)
            self._check_logprobs(choice["logprobs"]["token_logprobs"], specimen, reference)
            self._compare(choice["text"], specimen, prompt, length)

    async def _stream(self) -> None:
        specimen, prompt, length = self._choose()
        body = {**self._build_completion(specimen, prompt, length), "stream": True}
        text, logprobs, receipt = "", [], None
        try:
            async for _, event in self._client.events(COMPLETIONS, body):
                if "error" in event:
                    self._judge_error("stream, broken off", event["error"])
                    return
                receipt = (event.get("icm_lora") or {}).get("receipt") or receipt
                for choice in event["choices"]:
                    text += choice["text"]
                    logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
        except RefusedError as refusal:
            self._judge("stream", refusal.reply, may_be_gone=self._may_be_gone(specimen))
            return
        self._ledger.counts["stream 200"] += 1
        if receipt is not None:
            self._check_receipt(receipt, specimen)
        self._check_logprobs(logprobs, specimen, self._refer(specimen, prompt, length))
        self._compare(text, specimen, prompt, length)

    async def _leave_stream(self) -> None:
        specimen, prompt, length = self._choose()
        body = {**self._build_completion(specimen, prompt, length), "stream": True}
        events = self._client.events(COMPLETIONS, body)
        with suppress(RefusedError, StopAsyncIteration):
            for _ in range(self._chance.randrange(1, 4)):
                await anext(events)
        await events.aclose()  # type: ignore[attr-defined]
        self._ledger.counts["leave stream"] += 1

    async def _put_alias(self) -> None:
        specimen, name = self._chance.choice(self._world.specimens), self._chance.choice(NAMES)
        body: dict[str, Any] = {"adapter_id": specimen.adapter_id}
        if self._chance.random() < 0.3:
            body["expected_generation"] = self._chance.randrange(20)
        reply = await self._client.request("PUT", f"/v1/aliases/{name}", body)
        if self._judge("put alias", reply, may_be_gone=self._may_be_gone(specimen)):
            state = reply.json()
            self._ledger.learn(("alias", name, state["generation"]), specimen.adapter_id)

    async def _infer_alias(self) -> None:
        (_, prompt, length), name = self._choose(), self._chance.choice(NAMES)
        body = {"alias": name, "prompt": prompt, "max_tokens": length}
        reply = await self._client.post("/infer", body)
        if not self._judge("infer alias", reply, may_be_gone=True):
            return
        answer = reply.json()
        adapter_id = answer["receipt"]["adapter_id"]
        # whoever puts or uses this generation of the name must see this adapter
        self._ledger.learn(("alias", name, answer["alias"]["generation"]), adapter_id)
        specimen = self._world.find(adapter_id)
        if specimen is None or specimen is self._world.base:
            self._ledger.accuse(f"alias {name} was answered by {adapter_id}")
            return
        self._check_infer(answer, specimen, prompt, length)

    async def _delete_alias(self) -> None:
        path = f"/v1/aliases/{self._chance.choice(NAMES)}"
        reply = await self._client.request("DELETE", path)
        self._judge("delete alias", reply, may_be_gone=True)

    async def _load(self) -> None:
        """By the route of vLLM, which makes an alias."""
        specimen = self._chance.choice(self._world.specimens)
        body = {
            "lora_name": self._chance.choice(NAMES),
            "adapter_id": specimen.adapter_id,
            "load_inplace": self._chance.random() < 0.5,
        }
        reply = await self._client.post(LOAD, body)
        if reply.status == 400 and b"already been loaded" in reply.body:
            self._ledger.counts["load 400, already loaded"] += 1
        else:
            self._judge("load", reply, may_be_gone=self._may_be_gone(specimen))

    async def _unload(self) -> None:
        reply = await self._client.post(UNLOAD, {"lora_name": self._chance.choice(NAMES)})
        if reply.status == 404:
            self._ledger.counts["unload 404"] += 1
        else:
            self._judge("unload", reply, may_be_gone=True)

    # ------------------------------------------------------------------ what it checks

    def _choose(self) -> tuple[Specimen, str, int]:
        return (self._chance.choice(self._world.specimens), *self._chance.choice(ASKS))

    def _build_completion(self, specimen: Specimen, prompt: str, length: int) -> dict[str, Any]:
        return {
            "model": specimen.adapter_id,
            "prompt": prompt,
            "max_tokens": length,
            "temperature": 0,
            "logprobs": 0,
        }

    async def _post(
        self,
        deed: str,
        path: str,
        body: dict[str, Any],
        specimen: Specimen,
        *,
        may_be_gone: bool | None = None,
    ) -> Reply | None:
        reply = await self._client.post(path, body)
        gone = self._may_be_gone(specimen) if may_be_gone is None else may_be_gone
        return reply if self._judge(deed, reply, may_be_gone=gone) else None

    def _may_be_gone(self, specimen: Specimen) -> bool:
        return specimen in self._world.specimens[PROTECTED:]

    def _judge(self, deed: str, reply: Reply, *, may_be_gone: bool) -> bool:
        """Counts an answer; False where there is nothing in it to compare."""
        if reply.status == 200:
            self._ledger.counts[f"{deed} 200"] += 1
            return True
        problem = reply.json()
        code = problem.get("code") or (problem.get("error") or {}).get("code")
        self._ledger.counts[f"{deed} {reply.status} {code}"] += 1
        if code not in _BUSY | _RACED and not (may_be_gone and code in _GONE):
            self._ledger.accuse(f"{deed}: {reply.status} {reply.body[:300]!r}")
        return False

    def _judge_error(self, deed: str, error: dict[str, Any]) -> None:
        self._ledger.counts[f"{deed} {error.get('code')}"] += 1
        if error.get("code") not in _BUSY | _GONE:
            self._ledger.accuse(f"{deed}: {error}")

    def _refer(self, specimen: Specimen, prompt: str, length: int) -> Reference:
        return self._world.references[specimen.adapter_id, prompt, length]

    def _check_infer(
        self, answer: dict[str, Any], specimen: Specimen, prompt: str, length: int
    ) -> None:
        self._check_receipt(answer["receipt"], specimen)
        reference = self._refer(specimen, prompt, length)
        if answer["usage"]["completion_tokens"] != reference.tokens:
            self._ledger.accuse(f"{answer['usage']}, alone {reference.tokens} tokens")
        self._compare(answer["text"], specimen, prompt, length)

    def _check_receipt(self, receipt: dict[str, Any], specimen: Specimen) -> None:
        told = (receipt["adapter_id"], receipt["vector_sha256"])
        if told != (specimen.adapter_id, specimen.vector_sha256):
            self._ledger.accuse(f"asked {specimen.adapter_id}, and the receipt says {told}")
        self._learn_slot(receipt, specimen)

    def _learn_slot(self, told: dict[str, Any], specimen: Specimen) -> None:
        """A slot's generation has one content, whoever asks."""
        if specimen is not self._world.base and told["slot"] is not None:
            self._ledger.learn(("slot", told["slot"], told["generation"]), specimen.vector_sha256)

    def _check_logprobs(
        self, logprobs: list[float], specimen: Specimen, reference: Reference
    ) -> None:
        assert reference.logprobs is not None
        if len(logprobs) != len(reference.logprobs) or any(
            abs(a - b) > LOGPROB_TOLERANCE
            for a, b in zip(logprobs, reference.logprobs, strict=True)
        ):
            self._ledger.accuse(
                f"{specimen.body}: log-probabilities {logprobs}, alone {reference.logprobs}"
            )

    def _compare(self, text: str, specimen: Specimen, prompt: str, length: int) -> None:
        self._ledger.verified += 1
        expected = self._refer(specimen, prompt, length).text
        if text == expected:
            return
        twins = [
            other.adapter_id
            for other in (self._world.base, *self._world.specimens)
            if self._refer(other, prompt, length).text == text
        ]
        self._ledger.accuse(
            f"wrong answer: {specimen.adapter_id} said {text!r} to {prompt!r}, alone "
            f"{expected!r}; it is what these say: {twins}"
        )
