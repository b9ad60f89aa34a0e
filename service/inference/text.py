"""Text completion on the frozen base model, every row of a batch with its own adapter."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from service.adapters.slot_bank import SlotLease
from service.errors import DeadlineExceededError, IcmLoraError, InvalidInputError
from service.inference.base_model import BaseModel
from service.inference.completion import Completion, CompletionRequest, GrowingText
from service.inference.decode_batch import DecodeBatch, DecodeRow
from service.inference.engine import AdapterHost
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterLayout

__all__ = ["Completion", "CompletionRequest", "Result", "TextEngine"]

Result = Completion | IcmLoraError
"""What becomes of a request."""

MAX_PADDING_TOKENS = 2_048
"""Most padding that one batch may hold; requests of more different lengths run in turn."""


class TextEngine(AdapterHost):
    """A language model that completes prompts.

    `complete` is for one thread at a time; `load` and `slots` may be used beside it.

    Args:
        base: frozen base model; its linears are replaced by adapted ones.
        layout: of the adapters.
        bases: of the adapters.
        num_slots: adapters resident at once.
        max_prompt_tokens: longest prompt.
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
        self._model = base.model
        self._tokenizer = base.tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self._context_tokens: int | None = getattr(
            base.model.config, "max_position_embeddings", None
        )
        self._eos_ids = find_eos_ids(base)
        self._start_id = find_start_id(base)

    def complete(
        self,
        requests: Sequence[CompletionRequest],
        on_done: Callable[[int, Result], None] | None = None,
        is_abandoned: Callable[[int], bool] | None = None,
    ) -> list[Result]:
        """Completes requests together, whatever their adapters.

        What a request gets does not depend on the others, up to rounding (in float32 greedy
        text is equal to that of the request alone). A request that fails fails alone.

        Args:
            requests: any number; those of very different lengths run one batch after another.
            on_done: told an index and its result as soon as it is known.
            is_abandoned: asked between steps whether nobody waits for an index any more.

        Returns:
            One result per request: its completion or its error.
        """
        results: dict[int, Result] = {}

        def settle(index: int, result: Result) -> None:
            results[index] = result
            if on_done is not None:
                on_done(index, result)

        prompts: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            try:
                prompts[index] = self._tokenize(request)
            except InvalidInputError as error:
                settle(index, error)
        try:
            for group in group_by_length(prompts):
                self._run_group(requests, group, settle, is_abandoned or (lambda _: False))
        finally:
            self._attachment.rows.vectors = None
        return [results[index] for index in range(len(requests))]

    def _run_group(
        self,
        requests: Sequence[CompletionRequest],
        prompts: dict[int, list[int]],
        settle: Callable[[int, Result], None],
        is_abandoned: Callable[[int], bool],
    ) -> None:
        indices: dict[DecodeRow, int] = {}
        leases: list[SlotLease] = []
        vectors: list[Tensor] = []
        for index, prompt_ids in prompts.items():
            request = requests[index]
            try:
                lease, vector = self._copy_adapter(request.adapter_id, request.vector)
            except IcmLoraError as error:
                settle(index, error)
                continue
            text = GrowingText(self._tokenizer, prompt_ids, request.stop)
            indices[DecodeRow(request, prompt_ids, text, lease.slot, lease.generation)] = index
            leases.append(lease)
            vectors.append(vector)
        if not indices:
            return
        batch = DecodeBatch(
            self._model,
            self._attachment,
            list(indices),
            self._stack_rows(leases, vectors),
            self._eos_ids,
            pad_id=self._tokenizer.pad_token_id,
        )
        while batch.rows:
            abandoned = [row for row in batch.rows if is_abandoned(indices[row])]
            batch.remove(abandoned)
            for row in abandoned:
                settle(indices[row], DeadlineExceededError("nobody waits for this completion"))
            for row in batch.step() if batch.rows else []:
                seconds = batch.measure_seconds()
                settle(indices[row], row.error or row.build_completion(seconds))

    def _tokenize(self, request: CompletionRequest) -> list[int]:
        prompt_ids: list[int] = self._tokenizer(request.prompt)["input_ids"]
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


def find_eos_ids(base: BaseModel) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and one or several of the generation config."""
    configured: Any = base.model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return frozenset({*several, base.tokenizer.eos_token_id} - {None})


def find_start_id(base: BaseModel) -> int | None:
    """Token that a text begins with: the tokenizer's, else the generation config's, if any."""
    start: int | None = base.tokenizer.bos_token_id
    return base.model.generation_config.bos_token_id if start is None else start


def group_by_length(prompts: dict[int, list[int]]) -> Iterator[dict[int, list[int]]]:
    """Splits prompts, shortest first, so that no group holds too much padding.

    Otherwise one long prompt would make every short one beside it as expensive as itself.
    """
    group: dict[int, list[int]] = {}
    num_tokens = 0
    for index, prompt_ids in sorted(prompts.items(), key=lambda item: len(item[1])):
        padding = len(prompt_ids) * len(group) - num_tokens
        if padding > MAX_PADDING_TOKENS:
            yield group
            group, num_tokens = {}, 0
        group[index] = prompt_ids
        num_tokens += len(prompt_ids)
    if group:
        yield group
