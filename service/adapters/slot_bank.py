"""Slot bank: adapters resident beside the base model, one row of one tensor each."""

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor

from service.errors import InvalidAdapterError, NoFreeSlotError
from service.synthesis.layout import AdapterLayout
from service.synthesis.synthesizer import VECTOR_DTYPE

BASE_SLOT = 0
"""Slot of the base model: all zeros, an update of nothing, never written."""


@dataclass(frozen=True)
class SlotStats:
    """Number of adapter slots: all, holding an adapter, and in use by a running batch."""

    total: int
    resident: int
    leased: int


class SlotLease:
    """A slot that stays what it is until released; use it as a context manager.

    Attributes:
        adapter_id: adapter in the slot; None for the base.
        slot: row of the bank.
        generation: number of the load that put the adapter there, rising over the bank's life;
            0 for the base.
        write_seconds: time of the copy into the slot; 0 where it was resident.
    """

    def __init__(
        self,
        bank: "SlotBank",
        adapter_id: str | None,
        slot: int,
        generation: int,
        write_seconds: float,
    ) -> None:
        self.adapter_id = adapter_id
        self.slot = slot
        self.generation = generation
        self.write_seconds = write_seconds
        self._bank: SlotBank | None = bank

    def release(self) -> None:
        """Lets the slot be written again; releasing twice is releasing once."""
        bank, self._bank = self._bank, None
        if bank is not None and self.slot != BASE_SLOT:
            bank.release(self.slot)

    def __enter__(self) -> "SlotLease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


@dataclass
class _Slot:
    adapter_id: str | None = None
    generation: int = 0
    leases: int = 0


class SlotBank:
    """Preallocated adapter vectors `[1 + num_slots, num_params]`; safe to use from any thread.

    A load is one `copy_` of a vector into a row; a batch gathers its rows into a copy of its
    own, so that nothing written later can touch it. Vectors are kept in the dtype in which they
    are generated, hashed and cached. The least recently used slot that nobody leases goes first.

    Args:
        layout: layout of the vectors.
        num_slots: adapters that can be resident.
        device: where the base model is.
    """

    def __init__(self, layout: AdapterLayout, num_slots: int, device: torch.device) -> None:
        self._num_params = layout.num_params
        self._bank = torch.zeros(1 + num_slots, layout.num_params, dtype=VECTOR_DTYPE).to(device)
        self._slots = [_Slot() for _ in range(1 + num_slots)]
        self._free = list(range(num_slots, 0, -1))  # taken from the end: slot 1 first
        self._resident: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._loads = 0
        self._lock = threading.Lock()

    def acquire(
        self, adapter_id: str | None, vector: Float[Tensor, " num_params"] | None
    ) -> SlotLease:
        """Leases the adapter's slot, loading the adapter where it is not resident.

        Args:
            adapter_id: the adapter; None for the base.
            vector: its vector; None for the base.

        Raises:
            NoFreeSlotError: every slot is leased.
            InvalidAdapterError: no vector, or one of another length.
        """
        if adapter_id is None:
            return SlotLease(self, None, BASE_SLOT, 0, 0.0)
        if vector is None or vector.shape != (self._num_params,):
            raise InvalidAdapterError(
                f"the vector of adapter {adapter_id} must have {self._num_params} values"
            )
        with self._lock:
            write_seconds = 0.0
            slot = self._resident.get(adapter_id)
            if slot is None:
                slot = self._take_slot()
                started = time.perf_counter()
                self._bank[slot].copy_(vector)
                write_seconds = time.perf_counter() - started
                self._loads += 1
                self._slots[slot] = _Slot(adapter_id, self._loads)
                self._resident[adapter_id] = slot
            self._resident.move_to_end(adapter_id)
            state = self._slots[slot]
            state.leases += 1
            return SlotLease(self, adapter_id, slot, state.generation, write_seconds)

    def release(self, slot: int) -> None:
        """Ends one lease; called by `SlotLease.release`."""
        with self._lock:
            state = self._slots[slot]
            assert state.leases > 0, f"slot {slot} is released more often than leased"
            state.leases -= 1
            if state.leases == 0 and self._resident.get(state.adapter_id or "") != slot:
                self._free.append(slot)  # evicted while it was leased

    def evict(self, adapter_id: str) -> None:
        """Forgets an adapter; its slot is free at once, or after its last lease."""
        with self._lock:
            slot = self._resident.pop(adapter_id, None)
            if slot is not None and self._slots[slot].leases == 0:
                self._free.append(slot)

    def stats(self) -> SlotStats:
        """Counts for metrics."""
        with self._lock:
            leased = sum(slot.leases > 0 for slot in self._slots)
            return SlotStats(len(self._slots) - 1, len(self._resident), leased)

    def gather(self, leases: Sequence[SlotLease]) -> Float[Tensor, "rows num_params"]:
        """A copy of the leased vectors, one row per lease."""
        index = torch.tensor([lease.slot for lease in leases], device=self._bank.device)
        with self._lock:
            return self._bank.index_select(0, index)

    def _take_slot(self) -> int:
        """A slot to write: free, or of the least recently used adapter without a lease."""
        if self._free:
            return self._free.pop()
        for adapter_id, slot in self._resident.items():
            if self._slots[slot].leases == 0:
                del self._resident[adapter_id]
                return slot
        raise NoFreeSlotError(
            f"all {len(self._slots) - 1} slots are in use: try again, or raise the number of slots"
        )
