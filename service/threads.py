"""Worker threads of torch's CPU operators, given back by threads that pause.

GNU OpenMP, which torch computes with on Linux, keeps a team of worker threads for every thread
that ever computed. As soon as the teams have more threads than there are CPUs, all of them stop
spinning between two operators and sleep instead, which makes a decode step on two cores 1.6 times
as slow, whether the other teams do anything or not. So a thread that pauses ends its team. A new
one takes 5 to 10 ms to get going (its threads first share a core), so short computations run on
an inference thread that is idle, where there is one.
"""

import asyncio
import ctypes
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

_MAPS = Path("/proc/self/maps")
_PAUSE_SOFT = 1  # omp_pause_soft: threads end, settings stay

P = ParamSpec("P")
T = TypeVar("T")


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
