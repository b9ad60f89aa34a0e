"""Rows of text that are decoded together, each with an adapter of its own."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from service.errors import IcmLoraError, InvalidAdapterError
from service.inference.completion import Completion, CompletionRequest, FinishReason, GrowingText
from service.inference.sampling import sample_token
from service.synthesis.attachment import Attachment


@dataclass(eq=False)
class DecodeRow:
    """One completion in the making.

    Attributes:
        request: what was asked for.
        prompt_ids: tokens of the prompt, at least one.
        text: grows with the tokens.
        slot: slot that its adapter was taken from.
        generation: number of the load that had filled the slot.
        num_tokens: generated so far.
        finish_reason: None while it goes on.
        error: why it failed, which ends it alone and not its batch.
    """

    request: CompletionRequest
    prompt_ids: list[int]
    text: GrowingText
    slot: int
    generation: int
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: IcmLoraError | None = None
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.request.seed)

    @property
    def is_done(self) -> bool:
        """Whether no further token is wanted."""
        return self.finish_reason is not None or self.error is not None

    def accept(self, token: int, eos_ids: Collection[int]) -> None:
        """Takes the next token and notices the end."""
        self.num_tokens += 1
        if token in eos_ids or self.text.append(token):
            self.finish_reason = "stop"
        elif self.num_tokens == self.request.max_tokens:
            self.finish_reason = "length"

    def build_completion(self, seconds: dict[str, float]) -> Completion:
        """The finished completion."""
        assert self.finish_reason is not None, "the completion is not finished"
        return Completion(
            text=self.text.text,
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=self.num_tokens,
            slot=self.slot,
            generation=self.generation,
            seconds=seconds,
        )


class DecodeBatch:
    """Rows that get one token each per `step`; those that are done leave.

    Prompts of different lengths are padded on the left, so that the newest token of every row
    lies in the last column. The first step reads the prompts, the later ones a token each;
    keys and values stay in transformers' `DynamicCache`. All state is per row, so that rows
    can leave (and, one day, join) between steps.

    Args:
        model: base model, wrapped by `attachment`.
        attachment: where the rows' adapters are put.
        rows: at least one.
        vectors: their adapters, zeros for base rows; None where all rows are base rows, which
            then cost nothing more than the model alone.
        eos_ids: tokens that end a text.
        pad_id: any token; padding is masked.
    """

    def __init__(
        self,
        model: Any,
        attachment: Attachment,
        rows: Sequence[DecodeRow],
        vectors: Float[Tensor, "rows num_params"] | None,
        eos_ids: Collection[int],
        pad_id: int,
    ) -> None:
        self.rows = list(rows)
        self.prefill_seconds = 0.0
        self._model = model
        self._attachment = attachment
        self._vectors = vectors
        self._eos_ids = eos_ids
        self._started = time.perf_counter()
        self._cache = DynamicCache(config=model.config)
        lengths = [len(row.prompt_ids) for row in self.rows]
        width = max(lengths)
        device = model.device
        self._ids = torch.tensor(  # [rows, tokens]: what the next forward reads
            [[pad_id] * (width - len(row.prompt_ids)) + row.prompt_ids for row in self.rows],
            device=device,
        )
        self._mask = torch.tensor(  # [rows, tokens so far]
            [[0] * (width - length) + [1] * length for length in lengths], device=device
        )
        self._positions = (self._mask.cumsum(dim=1) - 1).clamp_min(0)  # [rows, tokens]

    @torch.inference_mode()
    def step(self) -> list[DecodeRow]:
        """Adds a token to every row; returns the rows that are done, which have left."""
        logits = self._compute_logits()  # [rows, vocab]
        scores, greedy = (values.tolist() for values in logits.max(dim=-1))
        tokens = torch.tensor(
            [
                self._choose_token(row, logits[index], scores[index], greedy[index])
                for index, row in enumerate(self.rows)
            ],
            device=logits.device,
        )
        self._ids = tokens[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(self._ids)], dim=1)
        self._positions = self._positions[:, -1:] + 1
        if not self.prefill_seconds:
            self.prefill_seconds = time.perf_counter() - self._started
        done = [row for row in self.rows if row.is_done]
        self.remove(done)
        return done

    def measure_seconds(self) -> dict[str, float]:
        """Time since the start by stage: until the first token, and from there to now."""
        total = time.perf_counter() - self._started
        return {"prefill": self.prefill_seconds, "decode": total - self.prefill_seconds}

    @torch.inference_mode()
    def remove(self, rows: Collection[DecodeRow]) -> None:
        """Takes rows out, finished or not; the others go on as if these had never been there."""
        if not rows:
            return
        kept = [index for index, row in enumerate(self.rows) if row not in rows]
        self.rows = [self.rows[index] for index in kept]
        if not kept:
            return
        indices = torch.tensor(kept, device=self._ids.device)
        self._cache.batch_select_indices(indices)
        self._ids, self._mask, self._positions = (
            state.index_select(0, indices) for state in (self._ids, self._mask, self._positions)
        )
        if all(row.request.adapter_id is None for row in self.rows):
            self._vectors = None
        elif self._vectors is not None:
            self._vectors = self._vectors.index_select(0, indices)

    def _compute_logits(self) -> Float[Tensor, "rows vocab"]:
        if self._attachment.rows.vectors is not self._vectors:
            self._attachment.rows.vectors = self._vectors
        output = self._model(
            input_ids=self._ids,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _choose_token(
        self, row: DecodeRow, logits: Float[Tensor, " vocab"], score: float, greedy: int
    ) -> int:
        """Next token of a row, which the row has accepted."""
        if not -float("inf") < score < float("inf"):  # NaN as well
            row.error = InvalidAdapterError(
                "this adapter drives the base model's output out of range: "
                "generate it with a lower strength or temperature"
            )
            return greedy
        token = greedy
        if row.request.temperature > 0:
            token = sample_token(logits, row.request.temperature, row.request.top_p, row.generator)
        row.accept(token, self._eos_ids)
        return token
