"""Slot bank: adapters that lie beside the base model's weights, ready to answer."""

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from service.errors import (
    AdapterMismatchError,
    AdapterNotFoundError,
    InvalidAdapterError,
    InvalidInputError,
    NoFreeSlotError,
)
from service.synthesis.layout import AdapterLayout
from service.synthesis.synthesizer import VECTOR_DTYPE, digest_vector

BASE_SLOT = 0
"""Slot of the base model: zeros, never written."""


@dataclass(frozen=True)
class SlotStats:
    """How many slots there are for adapters, hold one, and are leased at this moment."""

    total: int
    resident: int
    leased: int


@dataclass(frozen=True)
class SlotLease:
    """A slot that keeps its content until the lease is released (twice is harmless).

    Attributes:
        adapter_id: the adapter in the slot, None for the base.
        slot: index in the bank, 0 for the base.
        generation: number of the load that filled the slot; grows over the whole bank, so
            (slot, generation) names one content. 0 for the base.
        write_seconds: time that checking the vector and writing the slot took, 0 where the
            adapter was resident.
    """

    adapter_id: str | None
    slot: int
    generation: int
    write_seconds: float
    _bank: "SlotBank" = field(repr=False, compare=False)
    _number: int = field(repr=False)

    def release(self) -> None:
        """Gives the slot back to the bank, where the adapter stays resident."""
        self._bank._release(self)

    def __enter__(self) -> "SlotLease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass
class _Slot:
    """Content of one slot: its load, and the numbers of the leases on it."""

    index: int
    generation: int
    leases: set[int] = field(default_factory=set)
    evicted: bool = False


class SlotBank:
    """Adapter vectors in one preallocated tensor `[1 + num_slots, num_params]`.

    An adapter is loaded by one `copy_` into a free slot, or into the least recently used one
    that is not leased. Vectors stay in the dtype in which they are generated, hashed and cached.
    All methods may be called from any thread.

    Args:
        layout: of the adapters.
        num_slots: adapters that are resident at once, beside the base.
        device: of the base model.

    Raises:
        InvalidInputError: `num_slots` is not positive.
    """

    def __init__(self, layout: AdapterLayout, num_slots: int, device: torch.device) -> None:
        if num_slots < 1:
            raise InvalidInputError(f"{num_slots} adapter slots: choose at least 1")
        self.num_slots = num_slots
        self._num_params = layout.num_params
        self._vectors = torch.zeros(
            1 + num_slots, layout.num_params, dtype=VECTOR_DTYPE, device=device
        )
        self._free = list(range(num_slots, BASE_SLOT, -1))
        self._resident: OrderedDict[str, _Slot] = OrderedDict()  # least recently used first
        self._leased: dict[int, _Slot] = {}  # by lease number, evicted ones too
        self._generation = 0
        self._lease_number = 0
        self._lock = threading.Lock()

    def acquire(
        self, adapter_id: str | None, vector: Float[Tensor, " num_params"] | None
    ) -> SlotLease:
        """Leases the slot of an adapter, loading it where it is not resident.

        Args:
            adapter_id: what determines the vector; None for the base (which takes no vector).
            vector: the adapter, any float dtype; not read where the adapter is resident.

        Raises:
            AdapterNotFoundError: not resident, and no vector to load.
            InvalidAdapterError: the vector does not fit the layout or is not finite.
            NoFreeSlotError: every slot is leased.
        """
        with self._lock:
            self._lease_number += 1
            if adapter_id is None:
                assert vector is None, "the base model takes no adapter vector"
                return SlotLease(None, BASE_SLOT, 0, 0.0, self, self._lease_number)
            write_seconds = 0.0
            if adapter_id not in self._resident:
                write_seconds = self._load(adapter_id, vector)
            slot = self._resident[adapter_id]
            self._resident.move_to_end(adapter_id)
            slot.leases.add(self._lease_number)
            self._leased[self._lease_number] = slot
            return SlotLease(
                adapter_id, slot.index, slot.generation, write_seconds, self, self._lease_number
            )

    def gather(self, leases: Sequence[SlotLease]) -> Float[Tensor, "rows num_params"]:
        """Copies the leased vectors, one row per lease; later writes to slots do not touch it."""
        slots = torch.tensor([lease.slot for lease in leases], device=self._vectors.device)
        return self._vectors.index_select(0, slots)

    def check(self, lease: SlotLease, vector_sha256: str) -> None:
        """Proves that a leased slot holds the adapter that it was leased for.

        A slot that does not is evicted, so that the next request loads the adapter anew.

        Raises:
            AdapterMismatchError: its bytes have another sha256, or it was filled anew.
        """
        with self._lock:
            slot = self._leased.get(lease._number)
            is_same = slot is not None and (slot.index, slot.generation) == (
                lease.slot,
                lease.generation,
            )
        if not is_same or digest_vector(self._vectors[lease.slot].cpu()) != vector_sha256:
            self._forget(lease, slot)
            raise AdapterMismatchError(
                f"slot {lease.slot} does not hold adapter {lease.adapter_id}: nothing was answered"
            )

    def evict(self, adapter_id: str) -> bool:
        """Forgets an adapter; False where it is not resident.

        A slot that is leased keeps its content until its last lease is released.
        """
        with self._lock:
            return self._evict(adapter_id)

    def stats(self) -> SlotStats:
        """Counts of the slots, the base's not among them."""
        with self._lock:
            leased = len({slot.index for slot in self._leased.values()})
            return SlotStats(self.num_slots, len(self._resident), leased)

    def _forget(self, lease: SlotLease, slot: _Slot | None) -> None:
        """Evicts a lease's adapter, unless it lies in another slot by now."""
        with self._lock:
            adapter_id = lease.adapter_id
            if adapter_id is not None and self._resident.get(adapter_id, slot) is slot:
                self._evict(adapter_id)

    def _evict(self, adapter_id: str) -> bool:
        slot = self._resident.pop(adapter_id, None)
        if slot is None:
            return False
        slot.evicted = True
        if not slot.leases:
            self._free.append(slot.index)
        return True

    def _load(self, adapter_id: str, vector: Tensor | None) -> float:
        started = time.perf_counter()
        if vector is None:
            raise AdapterNotFoundError(
                f"adapter {adapter_id} is in no slot and came without its vector: generate it again"
            )
        if tuple(vector.shape) != (self._num_params,):
            raise InvalidAdapterError(
                f"adapter vector has shape {tuple(vector.shape)}, expected ({self._num_params},)"
            )
        vector = vector.to(VECTOR_DTYPE)
        if not torch.isfinite(vector).all():
            raise InvalidAdapterError(
                f"adapter {adapter_id} holds values that are not finite in float16"
            )
        index = self._take_slot()
        try:
            self._vectors[index].copy_(vector)
        except BaseException:
            self._free.append(index)
            raise
        self._generation += 1
        self._resident[adapter_id] = _Slot(index, self._generation)
        return time.perf_counter() - started

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        for adapter_id, slot in self._resident.items():
            if not slot.leases:
                del self._resident[adapter_id]
                return slot.index
        raise NoFreeSlotError(
            f"all {self.num_slots} adapter slots are in use: try again, or serve with more slots"
        )

    def _release(self, lease: SlotLease) -> None:
        with self._lock:
            slot = self._leased.pop(lease._number, None)
            if slot is None:
                return
            slot.leases.remove(lease._number)
            if slot.evicted and not slot.leases:
                self._free.append(slot.index)
