"""Redis killed, frozen, emptied, corrupted and forged under traffic: no 5xx, no wrong adapter.

The service keeps next to nothing in its own memory here, so that it reads from Redis all the time.
"""

import asyncio
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis

from tests.bench.client import HttpClient
from tests.bench.measurement import Measurement
from tests.bench.servers import our_service
from tests.bench.targets import PROMPTS, list_tasks
from tests.fixtures.redis_server import RedisServer

NUM_TASKS = 12
CLIENTS = 6
PHASE_SECONDS = 5.0
_SETTINGS = {
    "ICM_LORA_NUM_SLOTS": "4",
    "ICM_LORA_PROCESS_CACHE_BYTES": "300000",
    "ICM_LORA_REDIS_SECRET": "a secret of this benchmark, 32 characters and more",
    "ICM_LORA_REDIS_TIMEOUT_SECONDS": "0.25",
    "ICM_LORA_REDIS_RETRY_SECONDS": "0.5",
}


@dataclass
class _Traffic:
    """What clients saw, by phase."""

    phase: str = "calm"
    hashes: dict[str, str] = field(default_factory=dict)  # adapter id -> sha256 of its vector
    statuses: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def note(self, deed: str, status: int, body: bytes) -> None:
        self.statuses[f"{self.phase}: {deed} {status}"] += 1
        if status >= 500:
            self.failures.append(f"{self.phase}: {deed} {status} {body[:300]!r}")

    def compare(self, adapter_id: str, vector_sha256: str) -> None:
        if self.hashes.setdefault(adapter_id, vector_sha256) != vector_sha256:
            self.wrong.append(f"{self.phase}: {adapter_id} has {vector_sha256}")


def measure_redis_faults(log: Path, *, phase_seconds: float = PHASE_SECONDS) -> list[Measurement]:
    """Does one thing after another to Redis while clients go on asking.

    Args:
        log: file with the service's output.
        phase_seconds: of each fault.

    Raises:
        FileNotFoundError: no redis-server is installed.
    """
    executable = shutil.which("redis-server")
    if executable is None:
        raise FileNotFoundError("redis-server is not installed: run .ci/install-tools redis-server")
    with tempfile.TemporaryDirectory() as folder:
        redis = RedisServer(executable, Path(folder))
        redis.start()
        try:
            settings = {**_SETTINGS, "ICM_LORA_REDIS_URL": redis.url}
            with our_service(settings, log=log) as service:
                traffic = asyncio.run(_run_phases(service.url, redis, phase_seconds))
                alive = service.process.poll() is None
        finally:
            redis.stop()
    for line in [*traffic.failures[:20], *traffic.wrong[:20]]:
        print(f"FAILED: {line}")
    print("\n".join(f"{count:>7}  {name}" for name, count in sorted(traffic.statuses.items())))
    answered = sum(n for name, n in traffic.statuses.items() if name.endswith(" 200"))
    return [
        Measurement("Redis faults: answers", answered, "", 100),
        Measurement("Redis faults: answers of 5xx", len(traffic.failures), "", 0, True),
        Measurement("Redis faults: wrong adapters", len(traffic.wrong), "", 0, True),
        Measurement("Redis faults: service still runs", alive, "", 1),
    ]


async def _run_phases(url: str, redis: RedisServer, seconds: float) -> _Traffic:
    traffic = _Traffic()
    faults: list[tuple[str, Callable[[], None]]] = [
        ("calm", lambda: None),
        ("killed", redis.stop),
        ("restarted", redis.start),
        ("frozen", redis.pause),
        ("thawed", redis.resume),
        ("garbage", lambda: _spoil(redis.url, _write_garbage)),
        ("bits flipped", lambda: _spoil(redis.url, _flip_bits)),
        ("truncated", lambda: _spoil(redis.url, _truncate)),
        ("swapped", lambda: _swap(redis.url)),
        ("other types", lambda: _spoil(redis.url, _write_list)),
        ("emptied", lambda: _flush(redis.url)),
    ]
    async with HttpClient(url) as client, asyncio.TaskGroup() as group:
        workers = [group.create_task(_work(client, traffic, seed)) for seed in range(CLIENTS)]
        for phase, strike in faults:
            await asyncio.to_thread(strike)
            traffic.phase = phase
            for _ in range(3):  # what is written anew meanwhile is spoilt as well
                await asyncio.sleep(seconds / 3)
                if phase in ("garbage", "bits flipped", "truncated", "swapped", "other types"):
                    await asyncio.to_thread(strike)
        for worker in workers:
            worker.cancel()
    return traffic


async def _work(client: HttpClient, traffic: _Traffic, seed: int) -> None:
    chance = random.Random(seed)
    tasks = list_tasks()[:NUM_TASKS]
    while True:
        task = chance.choice(tasks)
        known = chance.choice(sorted(traffic.hashes)) if traffic.hashes else None
        match chance.randrange(4):
            case 0:
                body: dict[str, Any] = {"task": task, "modality": "text"}
                reply = await client.post("/generate-lora", body)
                traffic.note("generate", reply.status, reply.body)
                if reply.status == 200:
                    answer = reply.json()
                    traffic.compare(answer["adapter_id"], answer["vector_sha256"])
            case 1 if known is not None:
                # may be found nowhere once Redis is lost: 404 then
                reply = await client.request("GET", f"/v1/adapters/{known}")
                traffic.note("look up", reply.status, reply.body)
                if reply.status == 200:
                    traffic.compare(known, reply.json()["vector_sha256"])
            case choice:
                source = {"task": task} if choice < 3 or known is None else {"adapter_id": known}
                body = {**source, "prompt": PROMPTS[0], "max_tokens": 2}
                reply = await client.post("/infer", body)
                traffic.note(f"infer by {next(iter(source))}", reply.status, reply.body)
                if reply.status == 200:
                    receipt = reply.json()["receipt"]
                    traffic.compare(receipt["adapter_id"], receipt["vector_sha256"])


# ---------------------------------------------------------------------- what is done to values


def _spoil(url: str, change: Callable[["Redis[bytes]", bytes, bytes], None]) -> None:
    with Redis.from_url(url) as redis:
        for key in redis.keys("*"):
            if redis.type(key) == b"string" and (value := redis.get(key)):
                change(redis, key, value)


def _write_garbage(redis: "Redis[bytes]", key: bytes, value: bytes) -> None:
    redis.set(key, random.randbytes(len(value)))


def _flip_bits(redis: "Redis[bytes]", key: bytes, value: bytes) -> None:
    """One bit in the middle: all still parses, and the numbers are others."""
    place = len(value) // 2
    redis.set(key, value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :])


def _truncate(redis: "Redis[bytes]", key: bytes, value: bytes) -> None:
    redis.set(key, value[: len(value) // 2])


def _write_list(redis: "Redis[bytes]", key: bytes, value: bytes) -> None:
    redis.delete(key)
    redis.rpush(key, value[:10])


def _swap(url: str) -> None:
    """Every adapter is another one: whole, well-formed and signed, but not that of its key."""
    with Redis.from_url(url) as redis:
        keys = [key for key in sorted(redis.keys("*")) if redis.type(key) == b"string"]
        values = [redis.get(key) for key in keys]
        for key, value in zip(keys, values[1:] + values[:1], strict=True):
            if value is not None:
                redis.set(key, value)


def _flush(url: str) -> None:
    with Redis.from_url(url) as redis:
        redis.flushall()
