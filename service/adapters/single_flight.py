"""One generation for all processes: whoever takes the lock generates, the others wait for it."""

import asyncio
import random
import time
from dataclasses import dataclass

from service.adapters.cache import AdapterCache
from service.adapters.record import AdapterRecord

_FIRST_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 0.1


@dataclass(frozen=True)
class Turn:
    """How the wait ended.

    Attributes:
        record: what another process generated meanwhile.
        token: of the lock, where it is ours.
        degraded: Redis could not be asked.
        waited: whether another process held the lock at first.
    """

    record: AdapterRecord | None = None
    token: str | None = None
    degraded: bool = False
    waited: bool = False


async def take_turn(cache: AdapterCache, adapter_id: str) -> Turn:
    """Waits until the adapter is there or is ours to generate.

    Ours: the lock was free, or the deadline (`RedisCache.lock_seconds`) has passed, or Redis
    could not be asked. A holder that died costs others no more than that; one that failed gives
    the lock back, and the next in line takes it.
    """
    redis = cache.redis
    if redis is None:
        return Turn()
    deadline = time.monotonic() + redis.lock_seconds
    pause = _FIRST_PAUSE_SECONDS
    waited = False
    while True:
        found, token = await cache.claim(adapter_id)
        if found.record is not None or found.degraded or token is not None:
            return Turn(found.record, token, found.degraded, waited)
        left = deadline - time.monotonic()
        if left <= 0:
            return Turn(waited=True)
        waited = True
        # Jitter: waiters of one stampede do not come back all at once.
        await asyncio.sleep(min(left, pause * random.uniform(0.5, 1.0)))
        pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)
