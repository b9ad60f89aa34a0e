"""What engines share: the scheduler's view of them, and a base model with adapters beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from service.adapters.slot_bank import SlotBank, SlotLease
from service.errors import IcmLoraError
from service.inference.base_model import BaseModel
from service.synthesis.attachment import Attachment, choose_few_dtype
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterLayout


@runtime_checkable
class EngineRequest(Protocol):
    """What the scheduler knows of a request."""

    @property
    def adapter_id(self) -> str | None:
        """The adapter, None for the base."""


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
_RequestT_contra = TypeVar("_RequestT_contra", bound=EngineRequest, contravariant=True)


@runtime_checkable
class Engine(Protocol[_RequestT_contra, AnswerT]):
    """Answers batches; for one thread at a time."""

    def complete(
        self,
        requests: Sequence[_RequestT_contra],
        on_done: Callable[[int, AnswerT | IcmLoraError], None] | None = None,
        is_abandoned: Callable[[int], bool] | None = None,
    ) -> list[AnswerT | IcmLoraError]:
        """Answers requests together; a request that fails fails alone.

        Args:
            requests: any number.
            on_done: told an index and its result as soon as it is known.
            is_abandoned: asked now and then whether nobody waits for an index any more.

        Returns:
            One result per request: its answer or its error.
        """


class AdapterHost:
    """The base model, wrapped once, and the bank of adapters beside it.

    `load` and `slots` may be used from any thread.

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
        self.slots = SlotBank(layout, num_slots, base.device)
        self._attachment = Attachment(base.model, bases)
        self._vectors_dtype = choose_few_dtype(next(base.model.parameters()))

    def load(self, adapter_id: str, vector: Float[Tensor, " num_params"]) -> SlotLease:
        """Makes an adapter resident; release the lease to let it be displaced again.

        Raises:
            InvalidAdapterError: the vector does not fit the layout or is not finite.
            NoFreeSlotError: every slot is leased.
        """
        return self.slots.acquire(adapter_id, vector)

    def _copy_adapter(
        self, adapter_id: str | None, vector: Float[Tensor, " num_params"] | None
    ) -> tuple[SlotLease, Float[Tensor, "1 num_params"]]:
        """A copy of an adapter, so that no slot stays taken while it is used.

        The lease is released already: it tells which slot, and which load of it, that was.
        """
        with self.slots.acquire(adapter_id, vector) as lease:
            return lease, self.slots.gather([lease])

    def _stack_rows(
        self, leases: Sequence[SlotLease], vectors: Sequence[Float[Tensor, "1 num_params"]]
    ) -> Float[Tensor, "rows num_params"] | None:
        """Rows of a batch; None where all are the base's, which then cost nothing more."""
        if all(lease.adapter_id is None for lease in leases):
            return None
        return torch.cat(list(vectors)).to(self._vectors_dtype)
