"""Rows of text that are decoded together, each with an adapter of its own."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from service.adapters.slot_bank import SlotLease
from service.errors import IcmLoraError, InvalidAdapterError
from service.inference.completion import (
    Completion,
    CompletionRequest,
    FinishReason,
    GrowingText,
    TokenLogprob,
)
from service.inference.logprobs import LogprobReader
from service.inference.row_cache import RowCache
from service.inference.sampling import find_best_tokens, sample_token
from service.synthesis.attachment import Attachment


@dataclass(eq=False)
class DecodeRow:
    """One completion in the making.

    Attributes:
        request: what was asked for.
        prompt_ids: tokens of the prompt, at least one.
        text: grows with the tokens.
        lease: on the slot of its adapter, until the row is done.
        vector: the adapter as the forward takes it, `[num_params]`; None for the base.
        token_ids: generated so far.
        logprobs: of these, where asked for.
        prompt_logprobs: of the prompt's tokens, where asked for.
        finish_reason: None while it goes on.
        error: why it failed, which ends it alone and not its batch.
    """

    request: CompletionRequest
    prompt_ids: list[int]
    text: GrowingText
    lease: SlotLease
    vector: Tensor | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: IcmLoraError | None = None
    generator: torch.Generator = field(init=False)
    started: float = field(default_factory=time.perf_counter)
    prefill_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.request.seed)

    @property
    def is_done(self) -> bool:
        """Whether no further token is wanted."""
        return self.finish_reason is not None or self.error is not None

    def accept(self, token: int, eos_ids: Collection[int]) -> None:
        """Takes the next token and notices the end."""
        if not self.token_ids:
            self.prefill_seconds = time.perf_counter() - self.started
        self.token_ids.append(token)
        if token in eos_ids or self.text.append(token):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.request.max_tokens:
            self.finish_reason = "length"

    def build_completion(self) -> Completion:
        """The finished completion."""
        assert self.finish_reason is not None, "the completion is not finished"
        total = time.perf_counter() - self.started
        prefill = self.prefill_seconds or total
        return Completion(
            text=self.text.text,
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.token_ids),
            slot=self.lease.slot,
            generation=self.lease.generation,
            seconds={"prefill": prefill, "decode": total - prefill},
            token_ids=tuple(self.token_ids),
            logprobs=None if self.request.num_logprobs is None else tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs) if self.request.prompt_logprobs else None,
        )


class DecodeBatch:
    """Rows that get one token each per `step`; they join by `prefill` and leave when done.

    Nothing of a row depends on the others: each has its own adapter, positions, length and
    random numbers, and its keys and values lie at its own positions of the `RowCache`.

    Args:
        model: base model, wrapped by `attachment`.
        attachment: where the rows' adapters are put.
        eos_ids: tokens that end a text.
        pad_id: any token; padding is masked.
        logprobs: reads log-probabilities off logits.
        stack: makes the adapters of rows one matrix, None where all are the base.
    """

    def __init__(
        self,
        model: Any,
        attachment: Attachment,
        eos_ids: Collection[int],
        pad_id: int,
        logprobs: LogprobReader,
        stack: Callable[[Sequence[Tensor | None]], Tensor | None],
    ) -> None:
        self.rows: list[DecodeRow] = []
        self._model = model
        self._attachment = attachment
        self._eos_ids = eos_ids
        self._pad_id = pad_id
        self._logprobs = logprobs
        self._stack = stack
        self._cache = RowCache(model.config)
        self._vectors: Float[Tensor, "rows num_params"] | None = None
        self._vectors_are_stale = False

    @torch.inference_mode()
    def prefill(self, rows: Sequence[DecodeRow]) -> list[DecodeRow]:
        """Reads the prompts of rows together; they join, but for those that are done already.

        Returns:
            The rows that are done: of one token, or failed.
        """
        width = max(len(row.prompt_ids) for row in rows)
        padding = [width - len(row.prompt_ids) for row in rows]
        ids = [
            [self._pad_id] * pad + row.prompt_ids for pad, row in zip(padding, rows, strict=True)
        ]
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
        mask = mask.to(self._model.device)  # [rows, tokens]
        cache = DynamicCache(config=self._model.config)
        self._attachment.rows.vectors = self._stack([row.vector for row in rows])
        logits = self._model(
            input_ids=torch.tensor(ids, device=self._model.device),
            attention_mask=mask if any(padding) else None,
            position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return self._join(rows, cache, logits)

    @torch.inference_mode()
    def prefill_part(self, row: DecodeRow, cache: DynamicCache, num_tokens: int) -> bool:
        """Reads some more tokens of one row's prompt; True once the row has joined or is done.

        A prompt that is asked about fails where the logits of any of its tokens are not finite.

        Args:
            row: whose prompt is longer than one step should take, or is asked about.
            cache: holds what was read of it so far.
            num_tokens: most tokens to read now.
        """
        start = cache.get_seq_length()
        if row.request.prompt_logprobs and start == 0:
            first = row.prompt_ids[0]
            row.prompt_logprobs.append(TokenLogprob(first, self._logprobs.write(first), None))
        part = row.prompt_ids[start : start + num_tokens]
        is_last = start + len(part) == len(row.prompt_ids)
        self._attachment.rows.vectors = self._stack([row.vector])
        logits = self._model(
            input_ids=torch.tensor([part], device=self._model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=0 if row.request.prompt_logprobs else 1,
        ).logits[0]  # [tokens, vocab]
        if row.request.prompt_logprobs:
            if not logits.amax(dim=-1).isfinite().all():
                row.error = _build_range_error()
                return True
            following = row.prompt_ids[start + 1 : start + len(part) + 1]
            row.prompt_logprobs += self._logprobs.read(
                logits[: len(following)], following, row.request.num_logprobs or 0
            )
        if is_last:
            self._join([row], cache, logits[-1:])
        return is_last

    @torch.inference_mode()
    def step(self) -> list[DecodeRow]:
        """Adds a token to every row; returns the rows that are done, which have left."""
        if self._vectors_are_stale:
            self._vectors = self._stack([row.vector for row in self.rows])
            self._vectors_are_stale = False
        if self._attachment.rows.vectors is not self._vectors:
            self._attachment.rows.vectors = self._vectors
        positions, mask = self._cache.begin_step()
        ids = [[row.token_ids[-1]] for row in self.rows]
        logits = self._model(
            input_ids=torch.tensor(ids, device=self._model.device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self._choose_tokens(self.rows, logits)
        done = [row for row in self.rows if row.is_done]
        self.remove(done)
        return done

    @torch.inference_mode()
    def remove(self, rows: Collection[DecodeRow]) -> None:
        """Takes rows out, finished or not; the others go on as if these had never been there."""
        for row in rows:
            index = self.rows.index(row)
            self._cache.remove(index, wipe=row.error is not None)
            self.rows[index] = self.rows[-1]
            self.rows.pop()
            self._vectors_are_stale = True
        if not self.rows:  # lets go of the memory that long texts took
            self._cache, self._vectors = RowCache(self._model.config), None
            self._vectors_are_stale = False

    def _join(
        self, rows: Sequence[DecodeRow], cache: DynamicCache, logits: Float[Tensor, "rows vocab"]
    ) -> list[DecodeRow]:
        wanted = [row for row in rows if row.request.max_tokens > 0]
        if wanted:
            self._choose_tokens(rows, logits)
        else:
            rows[0].finish_reason = "length"
        joining = [index for index, row in enumerate(rows) if not row.is_done]
        if joining:
            lengths = [len(rows[index].prompt_ids) for index in joining]
            self._cache.append(cache, joining, lengths)
            self.rows += [rows[index] for index in joining]
            self._vectors_are_stale = True
        return [row for row in rows if row.is_done]

    def _choose_tokens(
        self, rows: Sequence[DecodeRow], logits: Float[Tensor, "rows vocab"]
    ) -> None:
        """Gives every row its next token."""
        scores, greedy = (values.tolist() for values in find_best_tokens(logits))
        for index, row in enumerate(rows):
            request, token = row.request, greedy[index]
            if not -float("inf") < scores[index] < float("inf"):  # NaN as well
                row.error = _build_range_error()
                continue
            if request.temperature > 0:
                token = sample_token(
                    logits[index], request.temperature, request.top_p, row.generator
                )
            if request.num_logprobs is not None:
                row.logprobs += self._logprobs.read(
                    logits[index : index + 1], [token], request.num_logprobs
                )
            row.accept(token, self._eos_ids)


def _build_range_error() -> InvalidAdapterError:
    return InvalidAdapterError(
        "this adapter drives the base model's output out of range: "
        "generate it with a lower strength or temperature"
    )
