"""What engines share: the scheduler's view of them, and a base model with adapters beside it."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from service.adapters.slot_bank import SlotBank, SlotLease
from service.errors import IcmLoraError
from service.inference.base_model import BaseModel
from service.inference.completion import TextDelta
from service.synthesis.attachment import Attachment, choose_few_dtype
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterLayout

_logger = logging.getLogger("service.engine")


@runtime_checkable
class EngineRequest(Protocol):
    """What scheduler and engines know of every request."""

    @property
    def adapter_id(self) -> str | None:
        """The adapter, None for the base."""

    @property
    def vector(self) -> Float[Tensor, " num_params"] | None:
        """Its values."""

    @property
    def vector_sha256(self) -> str | None:
        """What its values must have, where that is to be checked."""

    @property
    def tenant(self) -> str:
        """Who asks."""

    @property
    def work(self) -> int:
        """Steps of the engine that it may take, for fairness and estimates."""


@runtime_checkable
class EngineAnswer(Protocol):
    """What the scheduler knows of an answer, a dataclass: to `seconds` it adds `queue`."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def completion_tokens(self) -> int:
        """Tokens generated."""

    @property
    def seconds(self) -> Mapping[str, float]:
        """Duration by stage."""


RequestT = TypeVar("RequestT", bound=EngineRequest)
AnswerT = TypeVar("AnswerT", bound=EngineAnswer)
_RequestT_co = TypeVar("_RequestT_co", bound=EngineRequest, covariant=True)
_AnswerT_contra = TypeVar("_AnswerT_contra", bound=EngineAnswer, contravariant=True)


@runtime_checkable
class Ticket(Protocol[_RequestT_co, _AnswerT_contra]):
    """A request on its way through an engine, and the way back to whoever waits."""

    @property
    def request(self) -> _RequestT_co:
        """What is asked for."""

    @property
    def wants_deltas(self) -> bool:
        """Whether text is wanted while it grows."""

    def is_abandoned(self) -> bool:
        """Whether nobody waits any more."""

    def on_first_token(self) -> None:
        """The first token is there."""

    def emit(self, delta: TextDelta) -> None:
        """Hands on what is new."""

    def resolve(self, result: "_AnswerT_contra | IcmLoraError") -> None:
        """Hands on the answer or the error; once."""


@runtime_checkable
class Engine(Protocol[RequestT, AnswerT]):
    """Answers requests step by step; for one thread at a time."""

    @property
    def num_running(self) -> int:
        """Requests that are admitted and not resolved."""

    def admit(
        self, tickets: Sequence[Ticket[RequestT, AnswerT]]
    ) -> list[Ticket[RequestT, AnswerT]]:
        """Takes requests into what runs, between two steps.

        Returns:
            Those that must wait until a running one gives its slot back.
        """

    def step(self) -> None:
        """Goes one step on with all that runs: a token of every text, a batch of images.

        Requests that nobody waits for any more leave first.
        """

    def abort(self) -> None:
        """Lets go of all that runs, without resolving it."""


class AdapterHost(ABC, Generic[RequestT, AnswerT]):
    """The base model, wrapped once, and the bank of adapters beside it.

    `load`, `slots` and the tokenizer of `base` may be used from any thread.

    Args:
        base: frozen base model; its linears are replaced by adapted ones.
        layout: of the adapters.
        bases: of the adapters.
        num_slots: adapters resident at once.
    """

    def __init__(
        self, base: BaseModel, layout: AdapterLayout, bases: AdapterBases, *, num_slots: int
    ) -> None:
        assert layout.digest == bases.layout.digest, "the bases belong to another layout"
        self.base = base
        self.slots = SlotBank(layout, num_slots, base.device)
        self._attachment = Attachment(base.model, bases)
        self._attachment.prepare_serving(base.model)
        self._vectors_dtype = choose_few_dtype(next(base.model.parameters()))

    @property
    @abstractmethod
    def num_running(self) -> int:
        """As `Engine`."""

    @abstractmethod
    def admit(
        self, tickets: Sequence[Ticket[RequestT, AnswerT]]
    ) -> list[Ticket[RequestT, AnswerT]]:
        """As `Engine`."""

    @abstractmethod
    def step(self) -> None:
        """As `Engine`."""

    @abstractmethod
    def abort(self) -> None:
        """As `Engine`."""

    def load(self, adapter_id: str, vector: Float[Tensor, " num_params"]) -> SlotLease:
        """Makes an adapter resident; release the lease to let it be displaced again.

        Raises:
            InvalidAdapterError: the vector does not fit the layout or is not finite.
            NoFreeSlotError: every slot is leased.
        """
        return self.slots.acquire(adapter_id, vector)

    def complete(
        self,
        requests: Sequence[RequestT],
        on_done: Callable[[int, AnswerT | IcmLoraError], None] | None = None,
        is_abandoned: Callable[[int], bool] | None = None,
    ) -> list[AnswerT | IcmLoraError]:
        """Answers requests together, whatever their adapters, without a scheduler.

        What a request gets does not depend on the others, up to rounding. A request that fails
        fails alone.

        Args:
            requests: any number, all in one batch.
            on_done: told an index and its result as soon as it is known.
            is_abandoned: asked between steps whether nobody waits for an index any more.

        Returns:
            One result per request: its answer or its error.
        """
        results: dict[int, AnswerT | IcmLoraError] = {}

        def settle(index: int, result: AnswerT | IcmLoraError) -> None:
            results[index] = result
            if on_done is not None:
                on_done(index, result)

        waiting: list[Ticket[RequestT, AnswerT]] = [
            _Call(request, index, settle, is_abandoned) for index, request in enumerate(requests)
        ]
        try:
            while waiting or self.num_running:
                waiting = self.admit(waiting)
                self.step()
        finally:
            self.abort()
        return [results[index] for index in range(len(requests))]

    def _lease(self, request: RequestT) -> tuple[SlotLease, Float[Tensor, " num_params"] | None]:
        """A slot that keeps a request's adapter, and a copy of its values (None for the base).

        Raises:
            IcmLoraError: as `SlotBank.acquire` and `SlotBank.check`.
        """
        lease = self.slots.acquire(request.adapter_id, request.vector)
        if lease.adapter_id is None:
            return lease, None
        try:
            self._check(request, lease)
            return lease, self.slots.gather([lease])[0]
        except BaseException:
            lease.release()
            raise

    def _stack_rows(
        self, vectors: Sequence[Float[Tensor, " num_params"] | None]
    ) -> Float[Tensor, "rows num_params"] | None:
        """Adapters of a batch's rows, zeros for the base (None).

        None where all rows are the base's, which then cost nothing more.
        """
        given = [vector for vector in vectors if vector is not None]
        if not given:
            return None
        zeros = torch.zeros_like(given[0])
        stacked = torch.stack([zeros if vector is None else vector for vector in vectors])
        return stacked.to(self._vectors_dtype)

    def _check(self, request: RequestT, lease: SlotLease) -> None:
        if request.vector_sha256 is not None and lease.adapter_id is not None:
            self.slots.check(lease, request.vector_sha256)

    def _resolve(
        self,
        ticket: Ticket[RequestT, AnswerT],
        lease: SlotLease,
        result: AnswerT | IcmLoraError,
    ) -> None:
        """Hands on a result, an answer only after its slot was checked once more."""
        try:
            if not isinstance(result, IcmLoraError):
                self._check(ticket.request, lease)
        except IcmLoraError as error:
            result = error
        finally:
            lease.release()
        ticket.resolve(result)


def build_failure(error: Exception) -> IcmLoraError:
    """What a request is answered with that failed alone; an error of our own is logged."""
    if isinstance(error, IcmLoraError):
        return error
    _logger.error("a request failed", exc_info=error)
    failure = IcmLoraError("this request failed for a reason of our own: see the log")
    failure.__cause__ = error
    return failure


class _Call(Generic[RequestT, AnswerT]):
    """The ticket of one request of `AdapterHost.complete`."""

    wants_deltas = False

    def __init__(
        self,
        request: RequestT,
        index: int,
        settle: Callable[[int, AnswerT | IcmLoraError], None],
        is_abandoned: Callable[[int], bool] | None,
    ) -> None:
        self.request = request
        self._index = index
        self._settle = settle
        self._is_abandoned = is_abandoned

    def is_abandoned(self) -> bool:
        return self._is_abandoned is not None and self._is_abandoned(self._index)

    def on_first_token(self) -> None:
        """Nobody asks."""

    def emit(self, delta: TextDelta) -> None:
        """Nobody asks."""

    def resolve(self, result: AnswerT | IcmLoraError) -> None:
        self._settle(self._index, result)
