"""One call of an OpenAI route: what answers it, and what all its answers have in common."""

import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from service.api.answers import build_alias_use, build_receipt, to_milliseconds
from service.api.bundle_service import TextService
from service.api.openai.chat_requests import ChatBody
from service.api.openai.prompts import Prompt, Row
from service.api.openai.requests import CompletionBody
from service.api.openai.responses import ChoiceReceipt, IcmLoraInfo, OpenAIUsage
from service.api.resources import Resources
from service.api.sources import Source
from service.inference.completion import Completion, CompletionRequest

_MAX_SEED = 2**63
_FINGERPRINT_DIGITS = 16


class Head(TypedDict):
    """Fields that every answer and every chunk begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str


@dataclass(frozen=True)
class Call:
    """A call whose adapter is there.

    Attributes:
        resources: of the service.
        service: that answers.
        body: the request.
        source: the adapter.
        tenant: whose call it is.
        seed: of the first choice.
        started: `time.perf_counter` at the beginning of the request.
        name: id of the answer.
        created: Unix time.
    """

    resources: Resources
    service: TextService
    body: CompletionBody | ChatBody
    source: Source
    tenant: str
    seed: int
    started: float
    name: str
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def head(self) -> Head:
        """Fields that every answer and every chunk begins with."""
        return {
            "id": self.name,
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": self.service.bundle.digest[:_FINGERPRINT_DIGITS],
        }

    def build_rows(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        num_logprobs: int | None,
        echo: bool = False,
    ) -> list[Row]:
        """The choices: `n` of each prompt, in the order of the prompts."""
        record = self.source.record
        body, count = self.body, self.body.n or 1
        temperature = 1.0 if body.temperature is None else body.temperature
        return [
            Row(
                index=position * count + choice,
                prompt=position,
                echo=prompt.text if echo else "",
                request=CompletionRequest(
                    prompt=prompt.content,
                    adapter_id=None if record is None else record.adapter_id,
                    vector=None if record is None else record.vector,
                    vector_sha256=None if record is None else record.vector_sha256,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    top_p=1.0 if body.top_p is None else body.top_p,
                    seed=(self.seed + choice) % _MAX_SEED,
                    stop=body.stops,
                    num_logprobs=num_logprobs,
                    tenant=self.tenant,
                    prompt_logprobs=echo and (num_logprobs is not None or max_tokens == 0),
                ),
            )
            for position, prompt in enumerate(prompts)
            for choice in range(count)
        ]

    def build_usage(self, rows: Sequence[Row], completions: Sequence[Completion]) -> OpenAIUsage:
        """Tokens of the prompts, each once, and of all choices."""
        prompts = {
            row.prompt: completion.prompt_tokens
            for row, completion in zip(rows, completions, strict=True)
        }
        num_prompt = sum(prompts.values())
        num_new = sum(completion.completion_tokens for completion in completions)
        return OpenAIUsage(
            prompt_tokens=num_prompt,
            completion_tokens=num_new,
            total_tokens=num_prompt + num_new,
        )

    def build_info(self, completions: Sequence[Completion]) -> IcmLoraInfo:
        """What answered, and how; completions are in the order of their choices."""
        first = completions[0]
        return IcmLoraInfo(
            receipt=build_receipt(
                self.source.record,
                self.service.bundle,
                first.slot,
                first.generation,
                self.source.decision,
            ),
            choices=[
                ChoiceReceipt(index=index, slot=each.slot, generation=each.generation)
                for index, each in enumerate(completions)
            ],
            alias=build_alias_use(self.source.alias),
            decision=None if self.source.decision is None else self.source.decision.kind,
            cache=self.source.cache,
            degraded=self.resources.list_degraded(self.source.provided),
            seed=self.seed,
            milliseconds=to_milliseconds(
                {**self.source.seconds, **first.seconds}, time.perf_counter() - self.started
            ),
        )


def draw_seed(body: CompletionBody | ChatBody) -> int:
    """The request's seed, else a new one."""
    return secrets.randbelow(_MAX_SEED) if body.seed is None else body.seed % _MAX_SEED


def draw_name(prefix: str) -> str:
    """Id of an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"
