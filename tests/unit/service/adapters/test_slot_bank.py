"""Slots: what lies in them, who may displace it, and that threads do not disturb each other."""

import random
import threading

import pytest
import torch
from torch import Tensor

from service.adapters.slot_bank import BASE_SLOT, SlotBank, SlotStats
from service.errors import (
    AdapterNotFoundError,
    InvalidAdapterError,
    InvalidInputError,
    NoFreeSlotError,
)
from service.synthesis.layout import AdaptedModule, AdapterKind, AdapterLayout

LAYOUT = AdapterLayout(AdapterKind.CORE, 4, 4.0, (AdaptedModule("only", 8, 8),))


def make_bank(num_slots: int = 2) -> SlotBank:
    return SlotBank(LAYOUT, num_slots, torch.device("cpu"))


def constant(value: float) -> Tensor:
    """An adapter whose values are all the same."""
    return torch.full((LAYOUT.num_params,), value, dtype=torch.float16)


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


def test_threads_get_what_they_asked_for() -> None:
    bank = make_bank(num_slots=6)
    failures: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            value = rng.randrange(1, 12)
            with bank.acquire(str(value), constant(value)) as lease:
                if not torch.equal(bank.gather([lease])[0], constant(value)):
                    failures.append(f"slot {lease.slot} does not hold {value}")
            if rng.random() < 0.2:
                bank.evict(str(rng.randrange(1, 12)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not failures
    assert bank.stats().leased == 0
    leases = [bank.acquire(f"new-{index}", constant(index)) for index in range(6)]
    assert sorted(lease.slot for lease in leases) == [1, 2, 3, 4, 5, 6]
