"""Slots: what lies in them, who may displace it, and that threads do not disturb each other."""

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from service.adapters.slot_bank import BASE_SLOT, SlotBank, SlotLease, SlotStats
from service.errors import (
    AdapterMismatchError,
    AdapterNotFoundError,
    InvalidAdapterError,
    InvalidInputError,
    NoFreeSlotError,
)
from service.synthesis.layout import AdaptedModule, AdapterKind, AdapterLayout
from service.synthesis.synthesizer import digest_vector
from tests.fixtures.kernel import PROPERTY

LAYOUT = AdapterLayout(AdapterKind.CORE, 4, 4.0, (AdaptedModule("only", 8, 8),))
WIDE = AdapterLayout(AdapterKind.CORE, 128, 4.0, (AdaptedModule("only", 128, 128),))


def make_bank(num_slots: int = 2, layout: AdapterLayout = LAYOUT) -> SlotBank:
    return SlotBank(layout, num_slots, torch.device("cpu"))


def constant(value: float, layout: AdapterLayout = LAYOUT) -> Tensor:
    """An adapter whose values are all the same."""
    return torch.full((layout.num_params,), value, dtype=torch.float16)


def load(bank: SlotBank, *names: str) -> None:
    """Makes adapters resident, one after another."""
    for name in names:
        bank.acquire(name, constant(1)).release()


def test_base_is_slot_zero_all_zeros_and_never_leased() -> None:
    bank = make_bank()
    with bank.acquire(None, None) as lease:
        assert (lease.adapter_id, lease.slot, lease.generation) == (None, BASE_SLOT, 0)
        assert bank.gather([lease]).count_nonzero() == 0
        assert bank.stats() == SlotStats(total=2, resident=0, leased=0)


def test_gather_copies_the_leased_vectors_bit_by_bit_in_order() -> None:
    bank = make_bank()
    vectors = torch.randn(2, LAYOUT.num_params, generator=torch.Generator().manual_seed(0)).half()
    first, second = bank.acquire("a", vectors[0]), bank.acquire("b", vectors[1])
    base = bank.acquire(None, None)

    rows = bank.gather([second, base, first, second])

    assert torch.equal(rows, torch.stack([vectors[1], 0 * vectors[0], vectors[0], vectors[1]]))


def test_gathered_rows_do_not_see_later_writes() -> None:
    bank = make_bank(num_slots=1)
    with bank.acquire("a", constant(1)) as lease:
        rows = bank.gather([lease])
    bank.acquire("b", constant(2)).release()

    assert torch.equal(rows[0], constant(1))


def test_resident_adapter_is_neither_read_nor_written_again() -> None:
    bank = make_bank()
    first = bank.acquire("a", constant(1))
    again = bank.acquire("a", None)

    assert (again.slot, again.generation) == (first.slot, first.generation)
    assert first.write_seconds > 0
    assert again.write_seconds == 0


def test_least_recently_used_adapter_is_displaced() -> None:
    bank = make_bank()
    load(bank, "a", "b", "a", "c")  # "a" was used after "b"

    bank.acquire("a", None).release()
    with pytest.raises(AdapterNotFoundError, match="generate it again"):
        bank.acquire("b", None)


def test_leased_adapter_is_not_displaced() -> None:
    bank = make_bank()
    held = bank.acquire("a", constant(1))
    load(bank, "b", "c", "d")

    assert torch.equal(bank.gather([held])[0], constant(1))
    with bank.acquire("e", constant(5)), pytest.raises(NoFreeSlotError, match="all 2"):
        bank.acquire("f", constant(6))
    held.release()
    bank.acquire("f", constant(6)).release()


def test_releasing_twice_is_releasing_once() -> None:
    bank = make_bank(num_slots=1)
    first, second = bank.acquire("a", constant(1)), bank.acquire("a", None)
    first.release()
    first.release()

    with pytest.raises(NoFreeSlotError):
        bank.acquire("b", constant(2))
    second.release()
    bank.acquire("b", constant(2)).release()


def test_generation_names_a_load_over_the_whole_bank() -> None:
    bank = make_bank(num_slots=1)
    generations = []
    for name in ("a", "b", "a", "a"):
        with bank.acquire(name, constant(1)) as lease:
            generations.append(lease.generation)
    assert generations == [1, 2, 3, 3]


def test_evicted_adapter_has_to_be_loaded_again() -> None:
    bank = make_bank()
    load(bank, "a")

    assert bank.evict("a")
    assert not bank.evict("a")
    assert bank.stats() == SlotStats(total=2, resident=0, leased=0)
    with bank.acquire("a", constant(3)) as lease:
        assert lease.generation == 2
        assert torch.equal(bank.gather([lease])[0], constant(3))


def test_slot_evicted_under_a_lease_is_free_after_it() -> None:
    bank = make_bank()
    held = bank.acquire("a", constant(1))
    bank.evict("a")
    other = bank.acquire("b", constant(2))

    with pytest.raises(NoFreeSlotError):
        bank.acquire("a", constant(3))
    assert torch.equal(bank.gather([held, other]), torch.stack([constant(1), constant(2)]))
    assert bank.stats() == SlotStats(total=2, resident=1, leased=2)
    held.release()
    with bank.acquire("a", constant(3)) as lease:
        assert torch.equal(bank.gather([lease])[0], constant(3))


def test_a_slot_with_other_values_is_evicted_and_loaded_again() -> None:
    bank = make_bank()
    digest = digest_vector(constant(3))
    held, checked = bank.acquire("a", constant(3)), bank.acquire("a", None)
    bank.check(checked, digest)
    bank._vectors[checked.slot] += 1
    with pytest.raises(AdapterMismatchError):
        bank.check(checked, digest)
    assert bank.stats() == SlotStats(total=2, resident=0, leased=1)
    with bank.acquire("a", constant(3)) as again:
        bank.check(again, digest)
        with pytest.raises(AdapterMismatchError):
            bank.check(held, digest)  # of the other slot: the new load stays
        assert bank.stats().resident == 1
    for lease in (held, checked):
        lease.release()
    load(bank, "b", "c")  # both slots are there again
    assert bank.stats() == SlotStats(total=2, resident=2, leased=0)


def test_a_load_that_fails_loses_no_slot() -> None:
    bank = make_bank(num_slots=1)
    vectors = bank._vectors
    with torch.inference_mode():
        bank._vectors = vectors.clone()  # cannot be written outside of that mode
    with pytest.raises(RuntimeError, match="inference tensor"):
        bank.acquire("a", constant(1))
    bank._vectors = vectors
    with bank.acquire("a", constant(1)) as lease:
        assert torch.equal(bank.gather([lease])[0], constant(1))


@pytest.mark.parametrize(
    "vector",
    [
        torch.zeros(LAYOUT.num_params + 1),
        torch.full((LAYOUT.num_params,), float("nan")),
        torch.full((LAYOUT.num_params,), 1e6),  # finite, but not in float16
    ],
)
def test_vectors_that_do_not_fit_take_no_slot(vector: Tensor) -> None:
    bank = make_bank(num_slots=1)
    with pytest.raises(InvalidAdapterError):
        bank.acquire("a", vector)
    assert bank.stats() == SlotStats(total=1, resident=0, leased=0)
    bank.acquire("a", constant(1)).release()


def test_a_bank_needs_a_slot() -> None:
    with pytest.raises(InvalidInputError, match="at least 1"):
        make_bank(num_slots=0)


@contextmanager
def switching_threads_often() -> Iterator[None]:
    """Makes Python change threads a thousand times as often, so that races show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def test_threads_get_what_they_asked_for() -> None:
    bank = make_bank(num_slots=6, layout=WIDE)  # wide: half a write would be seen
    failures: list[str] = []

    def check(rows: Tensor, value: int) -> None:
        if not (rows == value).all():
            failures.append(f"{rows[0, :8].tolist()} instead of {value}")

    def work(seed: int) -> None:
        rng = random.Random(seed)
        kept: list[tuple[Tensor, int]] = []
        for _ in range(400):
            value = rng.randrange(1, 12)
            with bank.acquire(str(value), constant(value, WIDE)) as lease:
                rows = bank.gather([lease])
            check(rows, value)
            kept = [*kept[-3:], (rows, value)]
            if rng.random() < 0.2:
                bank.evict(str(rng.randrange(1, 12)))
            for older in kept:  # what was gathered stays, whatever was written since
                check(*older)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    with switching_threads_often():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert not failures
    assert bank.stats().leased == 0
    leases = [bank.acquire(f"new-{index}", constant(index, WIDE)) for index in range(6)]
    assert sorted(lease.slot for lease in leases) == [1, 2, 3, 4, 5, 6]


class SlotBankMachine(RuleBasedStateMachine):
    """Any order of loads, releases and evictions, against a bank written as a list."""

    NUM_SLOTS = 3

    def __init__(self) -> None:
        super().__init__()
        self.bank = make_bank(self.NUM_SLOTS)
        self.resident: dict[str, tuple[int, int]] = {}  # (slot, generation), least recent first
        self.leases: list[SlotLease] = []
        self.generation = 0

    @property
    def leased(self) -> set[int]:
        return {lease.slot for lease in self.leases}

    @rule(name=st.sampled_from("abcde"))
    def acquire(self, name: str) -> None:
        vector = constant(self.generation + 1)  # so that a content tells its load
        if name not in self.resident:
            taken = self.leased | {slot for slot, _ in self.resident.values()}
            idle = [other for other in self.resident if self.resident[other][0] not in self.leased]
            if len(taken) == self.NUM_SLOTS and not idle:
                with pytest.raises(NoFreeSlotError):
                    self.bank.acquire(name, vector)
                return
            lease = self.bank.acquire(name, vector)
            if len(taken) == self.NUM_SLOTS:
                assert lease.slot == self.resident.pop(idle[0])[0]
            else:
                assert lease.slot not in taken
            self.generation += 1
            expected = (lease.slot, self.generation)
        else:
            lease = self.bank.acquire(name, vector)
            expected = self.resident.pop(name)
        assert (lease.slot, lease.generation) == expected
        self.resident[name] = expected
        self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(number=st.integers(0, 10**6))
    def release(self, number: int) -> None:
        self.leases.pop(number % len(self.leases)).release()

    @rule(name=st.sampled_from("abcde"))
    def evict(self, name: str) -> None:
        assert self.bank.evict(name) == (self.resident.pop(name, None) is not None)

    @invariant()
    def leased_slots_hold_what_was_loaded_and_the_base_zeros(self) -> None:
        base = self.bank.acquire(None, None)
        rows = self.bank.gather([base, *self.leases])
        contents = [0, *(lease.generation for lease in self.leases)]
        assert torch.equal(rows, torch.stack([constant(value) for value in contents]))

    @invariant()
    def counts_are_right(self) -> None:
        expected = SlotStats(self.NUM_SLOTS, len(self.resident), len(self.leased))
        assert self.bank.stats() == expected


TestSlotBankMachine = SlotBankMachine.TestCase
TestSlotBankMachine.settings = settings(PROPERTY, max_examples=60, stateful_step_count=40)
