"""Worker threads of torch's CPU operators: each on a core of its own, given back in a pause.

GNU OpenMP, which torch computes with on Linux, keeps a team of worker threads for every thread
that ever computed. As soon as the teams have more threads than there are CPUs, all of them stop
spinning between two operators and sleep instead, which makes a decode step on two cores 1.6 times
as slow, whether the other teams do anything or not. So a thread that pauses ends its team. A new
one takes 5 to 10 ms to get going, so short computations run on an inference thread that is idle,
where there is one.

The system also wakes two threads of a team on one core when something else ran on the other, and
parts them tens of milliseconds later: beside another busy program that doubled the time of two
requests in five. So the threads of a team are bound, each to its core.
"""

import asyncio
import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

_MAPS = Path("/proc/self/maps")
_BINDING_VARIABLES = {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"}
_PAUSE_SOFT = 1  # omp_pause_soft: threads end, settings stay

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def binding_workers(torch_threads: int) -> Iterator[None]:
    """Has OpenMP bind the threads of a team to cores, if torch is first imported in the block.

    Nothing is bound where a team does not take all cores, as services that share a machine would
    all bind theirs to the same ones, nor where the environment says already what to bind.

    Args:
        torch_threads: of a team; 0 is torch's own choice, one for each core.
    """
    is_set = not os.environ.keys().isdisjoint(_BINDING_VARIABLES)
    if torch_threads or is_set or not hasattr(os, "sched_setaffinity"):
        yield
        return
    os.environ |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    allowed = os.sched_getaffinity(0)
    yield
    # Loading OpenMP bound this thread, too, and all that it starts would inherit that.
    os.sched_setaffinity(0, allowed)


def release_workers() -> None:
    """Ends the calling thread's team of workers; nothing happens where OpenMP is another."""
    pause = _find_pause()
    if pause is not None:
        pause(_PAUSE_SOFT)


def releasing(function: Callable[P, T]) -> Callable[P, T]:
    """The same function for a thread that pauses after it."""

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        finally:
            release_workers()
            if hasattr(os, "sched_setaffinity"):  # as the main thread: it may be bound
                os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))

    return run


class Computations:
    """Where short computations run: on an idle inference thread, else in a thread of their own."""

    def __init__(self) -> None:
        self._offers: list[Callable[[Callable[[], Any]], Future[Any] | None]] = []

    def use(self, offer: Callable[[Callable[[], Any]], Future[Any] | None]) -> None:
        """Adds an inference thread, preferred to later ones.

        Args:
            offer: runs a function there; None where the thread has other things to do.
        """
        self._offers.append(offer)

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a function that blocks; its exceptions pass through."""
        work = partial(function, *args, **kwargs)
        for offer in self._offers:
            future: Future[T] | None = offer(work)
            if future is not None:
                return await asyncio.wrap_future(future)
        return await asyncio.to_thread(releasing(work))


@cache
def _find_pause() -> Callable[[int], int] | None:
    """`omp_pause_resource_all` (OpenMP 5.0) of the library that torch has loaded."""
    import torch  # noqa: F401 - loads it

    if not _MAPS.exists():
        return None
    for line in _MAPS.read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if "/torch/" in path and Path(path).name.startswith("libgomp"):
            pause: Callable[[int], int] | None = getattr(
                ctypes.CDLL(path), "omp_pause_resource_all", None
            )
            return pause
    return None
