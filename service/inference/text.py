"""Text completion: batches whose rows have an adapter, a length and a sampler each.

The forward pass and the key-value cache are transformers'; the loop is ours, because
`generate` samples all rows alike and lets none of them leave before the last.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from service.adapters.slot_bank import BASE_SLOT, SlotBank, SlotLease
from service.errors import IcmLoraError, InvalidInputError
from service.inference.base_model import BaseModel
from service.inference.sampling import choose_token
from service.synthesis.attachment import Attachment
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterLayout


@dataclass(frozen=True)
class CompletionRequest:
    """A prompt to continue.

    Attributes:
        prompt: text; an empty one starts from the tokenizer's first token.
        adapter_id: adapter that answers; None for the base model.
        vector: the adapter's vector; None for the base model.
        max_tokens: most tokens to generate.
        temperature: 0 is greedy.
        top_p: nucleus mass.
        seed: of this row's sampling.
        stop: texts that end the completion; none of their characters is returned.
    """

    prompt: str
    adapter_id: str | None = None
    vector: Float[Tensor, " num_params"] | None = None
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with, and by which slot.

    Attributes:
        text: the continuation.
        finish_reason: `stop` for end of text or a stop text, `length` for `max_tokens`.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated, the ending one included.
        slot: slot that answered; 0 is the base.
        generation: load of the slot; 0 for the base.
        seconds: time in `prefill` and `decode` of the batch, as far as this row was in it.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    slot: int
    generation: int
    seconds: dict[str, float]


Result = Completion | IcmLoraError
Deliver = Callable[[int, Result], None]
"""Called once per request, with its index, as soon as its result is known."""

IsWanted = Callable[[int], bool]
"""Asked between decode steps; a request that nobody waits for any more leaves the batch."""


class TextEngine:
    """A frozen base, its slot bank, and the decoding of mixed-adapter batches.

    `complete` belongs to one thread; `load` may be called from any.

    Args:
        base: the base model; it is wrapped for adapters and must not be used elsewhere.
        layout: layout of the adapters.
        bases: frozen bases of the adapters.
        num_slots: adapters that can be resident.
        max_prompt_tokens: longest prompt.
    """

    def __init__(
        self,
        base: BaseModel,
        layout: AdapterLayout,
        bases: AdapterBases,
        *,
        num_slots: int,
        max_prompt_tokens: int,
    ) -> None:
        self._base = base
        self._attachment = Attachment(base.model, bases)
        self._max_prompt_tokens = max_prompt_tokens
        self.slots = SlotBank(layout, num_slots, base.device)
        configured = base.model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        self._end_tokens = {token for token in [*ends, base.tokenizer.eos_token_id] if token}

    def load(self, adapter_id: str, vector: Float[Tensor, " num_params"]) -> SlotLease:
        """Makes an adapter resident; release the lease when done with it.

        Raises:
            NoFreeSlotError: every slot is leased.
            InvalidAdapterError: the vector has another length.
        """
        return self.slots.acquire(adapter_id, vector)

    def complete(
        self,
        requests: Sequence[CompletionRequest],
        deliver: Deliver,
        is_wanted: IsWanted = lambda _index: True,
    ) -> None:
        """Completes a batch; each result is delivered when its row is done, errors included.

        Args:
            requests: rows of the batch.
            deliver: takes the results.
            is_wanted: whether a request is still waited for; if not, nothing is delivered.
        """
        rows: list[_Row] = []
        try:
            for index, request in enumerate(requests):
                try:
                    rows.append(self._admit(index, request))
                except IcmLoraError as error:
                    deliver(index, error)
            if rows:
                self._decode(rows, deliver, is_wanted)
        finally:
            self._attachment.rows.vectors = None
            for row in rows:
                row.lease.release()

    def _admit(self, index: int, request: CompletionRequest) -> "_Row":
        tokenizer = self._base.tokenizer
        prompt = tokenizer(request.prompt)["input_ids"]
        if not prompt:
            first = tokenizer.bos_token_id
            prompt = [tokenizer.eos_token_id if first is None else first]
        if len(prompt) > self._max_prompt_tokens:
            raise InvalidInputError(
                f"the prompt has {len(prompt)} tokens, at most {self._max_prompt_tokens} are "
                "allowed: shorten it"
            )
        context = getattr(self._base.model.config, "max_position_embeddings", None)
        if context is not None and len(prompt) + request.max_tokens > context:
            raise InvalidInputError(
                f"prompt ({len(prompt)} tokens) and max_tokens ({request.max_tokens}) exceed the "
                f"model's context of {context} tokens: shorten one of them"
            )
        lease = self.slots.acquire(request.adapter_id, request.vector)
        return _Row(index, request, prompt, lease, torch.Generator().manual_seed(request.seed))

    def _decode(self, rows: list["_Row"], deliver: Deliver, is_wanted: IsWanted) -> None:
        batch = DecodeBatch(self._base, self._attachment, self.slots, rows)
        with torch.inference_mode():
            batch.prefill()
            while batch.rows:
                leaving = []
                for position, row in enumerate(batch.rows):
                    reason = row.find_end(self._base.tokenizer, self._end_tokens)
                    if reason is not None:
                        deliver(row.index, row.finish(self._base.tokenizer, reason, batch))
                        leaving.append(position)
                    elif not is_wanted(row.index):
                        leaving.append(position)
                batch.drop(leaving)
                if batch.rows:
                    batch.step()


class DecodeBatch:
    """Rows that are decoded together; between two steps rows may leave."""

    def __init__(
        self, base: BaseModel, attachment: Attachment, slots: SlotBank, rows: list["_Row"]
    ) -> None:
        from transformers import DynamicCache

        self._base = base
        self._rows_holder = attachment.rows
        self.rows = rows
        self._vectors = self._gather(slots)
        self._cache = DynamicCache(config=base.model.config)
        self._mask: Tensor | None = None
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0

    def _gather(self, slots: SlotBank) -> Tensor | None:
        """Adapter rows of the batch: none for the base alone, one where all rows share it."""
        leases = [row.lease for row in self.rows]
        if all(lease.slot == BASE_SLOT for lease in leases):
            return None
        if len({lease.slot for lease in leases}) == 1:
            leases = leases[:1]
        gathered = slots.gather(leases)
        # A CPU computes few tokens' updates in float32 (see AdaptedLinear): cast once, not a step.
        on_cpu = gathered.device.type == "cpu"
        return gathered.to(torch.float32 if on_cpu else self._base.dtype)

    def prefill(self) -> None:
        """Runs all prompts, padded on the left, and samples each row's first token."""
        started = time.perf_counter()
        device = self._base.device
        longest = max(len(row.prompt) for row in self.rows)
        pad = self._base.tokenizer.pad_token_id
        padding = [longest - len(row.prompt) for row in self.rows]
        ids = [[pad] * n + row.prompt for n, row in zip(padding, self.rows, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in padding]
        self._mask = torch.tensor(mask, device=device)  # [rows, tokens so far]
        positions = (self._mask.cumsum(1) - 1).clamp_min(0)
        self._rows_holder.vectors = self._vectors
        self._forward(torch.tensor(ids, device=device), positions)
        self.prefill_seconds = time.perf_counter() - started

    def step(self) -> None:
        """Runs each row's newest token and samples the next."""
        assert self._mask is not None, "prefill comes first"
        started = time.perf_counter()
        device = self._base.device
        ids = torch.tensor([[row.tokens[-1]] for row in self.rows], device=device)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
        self._forward(ids, self._mask.sum(1, keepdim=True) - 1)
        self.decode_seconds += time.perf_counter() - started

    def drop(self, leaving: Sequence[int]) -> None:
        """Removes rows by position, with their part of cache, mask and adapters."""
        if not leaving:
            return
        stay = [position for position in range(len(self.rows)) if position not in set(leaving)]
        self.rows = [self.rows[position] for position in stay]
        if not stay:
            return
        assert self._mask is not None
        index = torch.tensor(stay, device=self._mask.device)
        self._mask = self._mask[index]
        self._cache.batch_select_indices(index)
        if self._vectors is not None and self._vectors.shape[0] > 1:
            self._vectors = self._vectors[index]
            self._rows_holder.vectors = self._vectors

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        output = self._base.model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1]  # [rows, vocabulary]
        if all(row.request.temperature == 0 for row in self.rows):
            for row, token in zip(self.rows, logits.argmax(-1).tolist(), strict=True):
                row.tokens.append(token)
            return
        for row, scores in zip(self.rows, logits.float().cpu(), strict=True):
            row.tokens.append(
                choose_token(
                    scores,
                    temperature=row.request.temperature,
                    top_p=row.request.top_p,
                    generator=row.generator,
                )
            )


@dataclass
class _Row:
    """A request while it is decoded."""

    index: int
    request: CompletionRequest
    prompt: list[int]
    lease: SlotLease
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)

    def find_end(self, tokenizer: Any, end_tokens: set[int]) -> Literal["stop", "length"] | None:
        """Why the row is done, or None."""
        if self.tokens[-1] in end_tokens:
            return "stop"
        if self.request.stop and self._ends_in_stop(tokenizer):
            return "stop"
        return "length" if len(self.tokens) >= self.request.max_tokens else None

    def finish(
        self, tokenizer: Any, reason: Literal["stop", "length"], batch: DecodeBatch
    ) -> Completion:
        """The completion, cut before the earliest stop text and any unfinished character."""
        text = _decode_tokens(tokenizer, self.tokens).rstrip("\ufffd")
        ends = [at for stop in self.request.stop if (at := text.find(stop)) >= 0]
        return Completion(
            text=text[: min(ends)] if ends else text,
            finish_reason=reason,
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.tokens),
            slot=self.lease.slot,
            generation=self.lease.generation,
            seconds={"prefill": batch.prefill_seconds, "decode": batch.decode_seconds},
        )

    def _ends_in_stop(self, tokenizer: Any) -> bool:
        """Whether the newest token completes a stop text.

        Only as many tokens are decoded as a stop text can have, a byte each at least.
        """
        longest = max(len(stop.encode()) for stop in self.request.stop)
        tail = _decode_tokens(tokenizer, self.tokens[-longest - 1 :])
        return any(stop in tail for stop in self.request.stop) and any(
            stop in _decode_tokens(tokenizer, self.tokens) for stop in self.request.stop
        )


def _decode_tokens(tokenizer: Any, tokens: list[int]) -> str:
    text: str = tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text
