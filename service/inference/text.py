"""Text completion on the frozen base model, every row of a batch with its own adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from service.adapters.slot_bank import SlotLease
from service.errors import (
    DeadlineExceededError,
    IcmLoraError,
    InvalidInputError,
    NoFreeSlotError,
)
from service.inference.base_model import BaseModel
from service.inference.completion import Completion, CompletionRequest, GrowingText, TextDelta
from service.inference.decode_batch import DecodeBatch, DecodeRow
from service.inference.engine import AdapterHost, Ticket, build_failure
from service.inference.logprobs import LogprobReader
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterLayout
from service.synthesis.packed_weight import widen_activations

__all__ = ["Completion", "CompletionRequest", "Result", "TextEngine"]

Result = Completion | IcmLoraError
"""What becomes of a request."""

_IGNORED = -100
"""No token: where nothing is to be predicted."""

TextTicket = Ticket[CompletionRequest, Completion]

PREFILL_TOKENS = {"cpu": 256, "cuda": 4_096}
"""Most tokens of prompts that one step reads, padding included, by type of device: running rows
wait that long for their next token. A longer prompt takes several steps."""


@dataclass
class _Reading:
    """A long prompt that is being read, a part per step."""

    row: DecodeRow
    cache: DynamicCache


class TextEngine(AdapterHost[CompletionRequest, Completion]):
    """A language model that completes prompts; rows join and leave between any two tokens.

    For one thread at a time; `load` and `slots` may be used beside it.

    Args:
        base: frozen base model; its linears are replaced by adapted ones.
        layout: of the adapters.
        bases: of the adapters.
        num_slots: adapters resident at once.
        max_prompt_tokens: longest prompt.

    Raises:
        InvalidInputError: the base has another attention than full.
    """

    def __init__(
        self,
        base: BaseModel,
        layout: AdapterLayout,
        bases: AdapterBases,
        *,
        num_slots: int,
        max_prompt_tokens: int = 2_048,
    ) -> None:
        super().__init__(base, layout, bases, num_slots=num_slots)
        widen_activations(base.model)
        self._base = base
        self._tokenizer = base.tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self._context_tokens: int | None = getattr(
            base.model.config, "max_position_embeddings", None
        )
        self._vocab_size: int = base.model.config.vocab_size
        self._eos_ids = find_eos_ids(base)
        self._start_id = find_start_id(base)
        self._prefill_tokens = PREFILL_TOKENS.get(base.device.type, PREFILL_TOKENS["cuda"])
        self._tickets: dict[DecodeRow, TextTicket] = {}
        self._unread: list[DecodeRow] = []  # rows whose prompts wait to be read, oldest first
        self._reading: _Reading | None = None
        self._sent: dict[DecodeRow, tuple[int, int]] = {}  # characters, log-probabilities
        self._batch = self._build_batch()

    @property
    def num_running(self) -> int:
        """Rows that read or decode."""
        return len(self._tickets)

    def admit(self, tickets: Sequence[TextTicket]) -> list[TextTicket]:
        """Takes requests in; those that cannot be answered are resolved at once.

        Returns:
            Requests that must wait for a slot.
        """
        waiting: list[TextTicket] = []
        for ticket in tickets:
            try:
                row = self._open_row(ticket.request)
            except NoFreeSlotError as error:
                if self._tickets:
                    waiting.append(ticket)
                else:
                    ticket.resolve(error)
            except Exception as error:  # whatever it is: nothing that runs was touched
                ticket.resolve(build_failure(error))
            else:
                self._tickets[row] = ticket
                self._unread.append(row)
        return waiting

    def step(self) -> None:
        """Reads prompts for `PREFILL_TOKENS`, then adds a token to every row that has been read."""
        self._drop_abandoned()
        before = set(self._batch.rows)
        self._finish(self._read_prompts())
        for row in self._batch.rows:
            if row not in before:
                self._report(row)  # its first token need not wait for the others' next
        if self._batch.rows:
            self._finish(self._batch.step())
        for row in self._batch.rows:
            self._report(row)

    @property
    def prefill_tokens(self) -> int:
        """Most tokens of texts that are read at once, padding included."""
        return self._prefill_tokens

    @torch.inference_mode()
    def read_states(self, texts: Sequence[Sequence[int]]) -> Float[Tensor, "texts hidden"]:
        """Last hidden state of each text's last token, as the base gives it without any adapter.

        For the inference thread, between two steps. Texts are padded on the right, where no token
        looks; so what a text gets does not depend on the others, up to rounding.

        Args:
            texts: tokens of each, at least one.
        """
        self._attachment.rows.vectors = None  # every forward of the batch sets its own
        hidden = self._base.model.base_model(
            input_ids=self._pad(texts), use_cache=False
        ).last_hidden_state  # [texts, tokens, hidden]
        last = torch.tensor([len(text) - 1 for text in texts], device=hidden.device)
        return hidden[torch.arange(len(texts), device=hidden.device), last].float().cpu()  # type: ignore[no-any-return]

    def measure_gradient(
        self, vector: Float[Tensor, " num_params"], texts: Sequence[Sequence[int]]
    ) -> tuple[float, Float[Tensor, " num_params"]]:
        """Summed NLL in nats of texts' tokens but the first of each, and its gradient.

        For the inference thread, between two steps. The base stays as it is.

        Args:
            vector: adapter, float32; the gradient is with respect to it.
            texts: tokens of each, at least two.
        """
        ids = self._pad(texts)
        lengths = torch.tensor([[len(text)] for text in texts], device=ids.device)
        places = torch.arange(ids.shape[1], device=ids.device)
        wanted = ids.masked_fill(places >= lengths, _IGNORED)
        adapter = vector.detach().to(ids.device, self._vectors_dtype).requires_grad_()
        rows = self._attachment.rows
        try:
            with torch.enable_grad():
                rows.vectors = adapter[None]
                logits = self._base.model(input_ids=ids, use_cache=False).logits[:, :-1]
                nats = functional.cross_entropy(
                    logits.flatten(0, 1).float(),
                    wanted[:, 1:].flatten(),
                    ignore_index=_IGNORED,
                    reduction="sum",
                )
            (gradient,) = torch.autograd.grad(nats, adapter)
        finally:
            rows.vectors = None  # every forward of the batch sets its own
        return float(nats.detach()), gradient.float().cpu()

    def _pad(self, texts: Sequence[Sequence[int]]) -> Int[Tensor, "texts tokens"]:
        """Texts padded on the right, where no token of theirs looks."""
        width, pad_id = max(len(text) for text in texts), self._tokenizer.pad_token_id
        ids = [[*text, *[pad_id] * (width - len(text))] for text in texts]
        return torch.tensor(ids, device=self._base.device)

    def abort(self) -> None:
        """Lets go of all rows; their tickets are not resolved."""
        for row in self._tickets:
            row.lease.release()
        self._tickets, self._unread, self._sent, self._reading = {}, [], {}, None
        self._batch = self._build_batch()
        self._attachment.rows.vectors = None

    def _build_batch(self) -> DecodeBatch:
        return DecodeBatch(
            self._base.model,
            self._attachment,
            self._eos_ids,
            self._tokenizer.pad_token_id,
            LogprobReader(self._tokenizer),
            self._stack_rows,
        )

    def _open_row(self, request: CompletionRequest) -> DecodeRow:
        prompt_ids = self._tokenize(request)
        text = GrowingText(self._tokenizer, prompt_ids, request.stop)
        lease: SlotLease
        lease, vector = self._lease(request)  # last, as nothing may fail while only we know it
        return DecodeRow(request, prompt_ids, text, lease, vector)

    def _read_prompts(self) -> list[DecodeRow]:
        """One step's share of the prompts; returns rows that are done with that."""
        if self._reading is None and self._unread and self._reads_alone(self._unread[0]):
            cache = DynamicCache(config=self._base.model.config)
            self._reading = _Reading(self._unread.pop(0), cache)
        if self._reading is not None:
            row = self._reading.row
            if not self._batch.prefill_part(row, self._reading.cache, self._prefill_tokens):
                return []
            self._reading = None
            return [row] if row.is_done else []
        group: list[DecodeRow] = []
        for row in self._unread:
            width = max(len(each.prompt_ids) for each in [*group, row])
            if self._reads_alone(row) or width * (len(group) + 1) > self._prefill_tokens:
                break
            group.append(row)
        if not group:
            return []
        del self._unread[: len(group)]
        return self._batch.prefill(group)

    def _reads_alone(self, row: DecodeRow) -> bool:
        return row.request.prompt_logprobs or len(row.prompt_ids) > self._prefill_tokens

    def _finish(self, rows: Sequence[DecodeRow]) -> None:
        """Answers rows that are done."""
        for row in rows:
            self._report(row, at_end=True)
            self._close(row, row.error or row.build_completion())

    def _close(self, row: DecodeRow, result: Result) -> None:
        self._sent.pop(row, None)
        self._resolve(self._tickets.pop(row), row.lease, result)

    def _drop_abandoned(self) -> None:
        for row, ticket in list(self._tickets.items()):
            if not ticket.is_abandoned():
                continue
            if row in self._batch.rows:
                self._batch.remove([row])
            elif row in self._unread:
                self._unread.remove(row)
            else:
                self._reading = None
            self._close(row, DeadlineExceededError("nobody waits for this completion"))

    def _report(self, row: DecodeRow, *, at_end: bool = False) -> None:
        """Tells the ticket about the first token, and what is new where it wants to know."""
        ticket = self._tickets[row]
        if row.token_ids and row not in self._sent:
            self._sent[row] = (0, 0)
            ticket.on_first_token()
        if not ticket.wants_deltas or row.error is not None:
            return
        num_characters, num_logprobs = self._sent.get(row, (0, 0))
        end = row.text.final_length(at_end=at_end)
        if end > num_characters or len(row.logprobs) > num_logprobs:
            fresh = row.text.text[num_characters : max(end, num_characters)]
            logprobs = tuple(row.logprobs[num_logprobs:])
            ticket.emit(TextDelta(fresh, logprobs, len(row.token_ids)))
            self._sent[row] = (max(end, num_characters), len(row.logprobs))

    def _tokenize(self, request: CompletionRequest) -> list[int]:
        prompt_ids = self._read_prompt(request.prompt)
        if not prompt_ids:
            if self._start_id is None:
                raise InvalidInputError(
                    "the prompt is empty and this base model has no start token: "
                    "send at least one character"
                )
            prompt_ids = [self._start_id]
        if len(prompt_ids) > self._max_prompt_tokens:
            raise InvalidInputError(
                f"the prompt has {len(prompt_ids)} tokens, the limit is "
                f"{self._max_prompt_tokens}: shorten it"
            )
        limit = self._context_tokens
        if limit is not None and len(prompt_ids) + request.max_tokens > limit:
            raise InvalidInputError(
                f"the prompt's {len(prompt_ids)} tokens and max_tokens {request.max_tokens} "
                f"together exceed the base model's context of {limit} tokens: "
                "shorten the prompt or lower max_tokens"
            )
        return prompt_ids

    def _read_prompt(self, prompt: str | tuple[int, ...]) -> list[int]:
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer(prompt)["input_ids"]
            return ids
        if any(not 0 <= token < self._vocab_size for token in prompt):
            raise InvalidInputError(
                f"the prompt's tokens must lie between 0 and {self._vocab_size - 1}"
            )
        return list(prompt)


def find_eos_ids(base: BaseModel) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and one or several of the generation config."""
    configured: Any = base.model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return frozenset({*several, base.tokenizer.eos_token_id} - {None})


def find_start_id(base: BaseModel) -> int | None:
    """Token that a text begins with: the tokenizer's, else the generation config's, if any."""
    start: int | None = base.tokenizer.bos_token_id
    return base.model.generation_config.bos_token_id if start is None else start
