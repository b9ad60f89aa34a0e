"""Threads that pause give their workers back, and compute as before afterwards."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from service.threads import Computations, release_workers, releasing


def _count_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def _compute() -> float:
    return float(torch.ones(1 << 20).mul(2).sum())


@pytest.mark.skipif(
    sys.platform != "linux" or torch.get_num_threads() < 2, reason="there are no workers"
)
def test_the_workers_of_a_thread_that_computed_end() -> None:
    computed, may_end, counts = threading.Event(), threading.Event(), list[int]()

    def run() -> None:
        _compute()
        counts.append(_count_threads())
        release_workers()
        counts.append(_count_threads())
        assert _compute() == 1 << 21
        release_workers()
        computed.set()
        may_end.wait(10)

    thread = threading.Thread(target=run)
    thread.start()
    assert computed.wait(10)
    may_end.set()
    thread.join()
    assert counts[1] < counts[0]


_COMPUTE = """
import json, os, threading
from pathlib import Path
from service.threads import binding_workers, releasing

def affinities():
    return {int(task.name): sorted(os.sched_getaffinity(int(task.name)))
            for task in Path("/proc/self/task").iterdir()}

with binding_workers(int(os.environ.get("THREADS", 0))):
    import torch
known = affinities()

def compute():
    torch.ones(1 << 20).mul(2).sum()
    found["running"] = [each for task, each in affinities().items() if task not in known]

def pause():
    releasing(compute)()
    found["paused"] = sorted(os.sched_getaffinity(0))

found = {"main": affinities()[os.getpid()]}
thread = threading.Thread(target=pause)
thread.start()
thread.join()
print(json.dumps(found))
"""


def _run_compute(**environment: str) -> dict[str, Any]:
    clean = {name: value for name, value in os.environ.items() if "OMP" not in name}
    command = [sys.executable, "-c", _COMPUTE]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(
    sys.platform != "linux" or torch.get_num_threads() < 2, reason="there are no workers"
)
def test_threads_of_a_team_are_bound_to_cores_of_their_own_and_no_other_thread_is() -> None:
    everywhere = sorted(os.sched_getaffinity(0))
    found = _run_compute()
    assert len(found["running"]) == torch.get_num_threads()
    assert not set.intersection(*map(set, found["running"]))
    assert found["main"] == found["paused"] == everywhere
    for free in (_run_compute(THREADS="2"), _run_compute(OMP_PROC_BIND="false")):
        assert all(each == everywhere for each in free["running"])


def test_results_and_errors_pass_through() -> None:
    assert releasing(_compute)() == 1 << 21
    with pytest.raises(ZeroDivisionError):
        releasing(lambda: 1 // 0)()


def test_computations_run_where_they_are_taken_else_in_a_thread() -> None:
    offered: list[str] = []

    def refuse(function: object) -> None:
        offered.append("busy")

    def take(function: Callable[[], Any]) -> Future[Any]:
        offered.append("idle")
        future: Future[Any] = Future()
        future.set_result(function())
        return future

    computations = Computations()
    assert asyncio.run(computations.run(pow, 2, 5)) == 32
    computations.use(refuse)
    assert asyncio.run(computations.run(threading.get_ident)) != threading.get_ident()
    computations.use(take)
    assert asyncio.run(computations.run(threading.get_ident)) == threading.get_ident()
    assert offered == ["busy", "busy", "idle"]
    with pytest.raises(ZeroDivisionError):
        asyncio.run(Computations().run(lambda: 1 // 0))
