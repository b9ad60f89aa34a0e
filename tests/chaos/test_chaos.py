"""A short chaos in every test run, and the proof that it notices what it is there to notice."""

import asyncio
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from service.adapters.slot_bank import SlotBank, SlotLease
from tests.chaos.ledger import Ledger
from tests.chaos.run import LOUD_ALPHA, SETTINGS, run_chaos
from tests.fixtures.http_service import make_settings, serve_in_thread
from tests.fixtures.tiny_bundle import TINY_TASKS, TinyBundle, show_every_token, write_tiny_bundle

SECONDS = 8.0
TASKS = tuple(task.descriptions[0] for task in TINY_TASKS)


@pytest.fixture(scope="module")
def loud_bundle(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    tiny = write_tiny_bundle(tmp_path_factory.mktemp("loud"), alpha=LOUD_ALPHA)
    show_every_token(tiny)
    return tiny


def unleash(
    bundle: TinyBundle, seconds: float, on_ready: Callable[[], None] = lambda: None
) -> Ledger:
    with serve_in_thread(make_settings(bundle, **SETTINGS)) as client:
        url = str(client.base_url).rstrip("/")
        chaos = run_chaos(url, TASKS, seconds=seconds, clients=16, seed=1, on_ready=on_ready)
        return asyncio.run(chaos)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_answer_is_another_adapters(loud_bundle: TinyBundle) -> None:
    ledger = unleash(loud_bundle, SECONDS)
    assert not ledger.num_violations, ledger.render()
    assert ledger.verified > 50, ledger.render()
    assert sum(count for name, count in ledger.counts.items() if name.startswith("delete 2"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_service_that_mixes_adapters_up_is_caught(
    loud_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = SlotBank.gather
    calls = itertools.count()

    def mix_up(self: SlotBank, leases: Sequence[SlotLease]) -> Tensor:
        """Now and then a row gets what lies in another slot; receipts and checks stay right."""
        others = [slot.index for slot in self._resident.values() if slot.index != leases[0].slot]
        if next(calls) % 5 or not others:
            return honest(self, leases)
        return self._vectors.index_select(0, torch.tensor(others[:1]))

    ledger = unleash(loud_bundle, 4.0, lambda: monkeypatch.setattr(SlotBank, "gather", mix_up))
    assert ledger.num_violations, "adapters were mixed up, and nobody noticed"
    assert any("wrong answer" in each for each in ledger.violations), ledger.render()


def test_contradictory_facts_are_violations() -> None:
    ledger = Ledger()
    ledger.learn(("slot", 1, 7), "a")
    ledger.learn(("slot", 1, 7), "a")
    assert not ledger.num_violations
    ledger.learn(("slot", 1, 7), "b")
    assert ledger.num_violations == 1
    assert "VIOLATION" in ledger.render()
