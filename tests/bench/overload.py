"""`make bench-overload`: more load than the service can bear, Redis faults, and SIGTERM.

Load: requests arrive at random (Poisson) at three times the measured capacity for a minute,
whether or not earlier ones are answered. Those that are accepted must be answered within the
service's deadline, the others refused with 429 at once, and memory must not grow. Then what can
happen to Redis happens under traffic, and last SIGTERM comes in the middle of it.
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.client import HttpClient
from tests.bench.drain import measure_drain
from tests.bench.measurement import RESULTS, Measurement, conclude, quantile
from tests.bench.redis_faults import measure_redis_faults
from tests.bench.scaling import build_requests
from tests.bench.servers import ServerProcess, our_service
from tests.bench.targets import (
    AnyServer,
    Ask,
    ask_all,
    generate_adapters,
    list_tasks,
    open_ours,
)

PARTS = ("load", "redis", "drain")
_ADAPTERS = 32
_MOST_GROWTH_MB = 50.0
_MOST_REFUSAL_MS = 50.0


@dataclass
class _Arrivals:
    """Outcomes of an open loop, and the service's memory every second."""

    statuses: Counter[int] = field(default_factory=Counter)
    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    late: list[float] = field(default_factory=list)  # seconds that requests were sent after time
    megabytes: list[float] = field(default_factory=list)


def main() -> int:
    """Measures the parts that are asked for and returns 1 where a target is missed."""
    parser = argparse.ArgumentParser(prog="make bench-overload", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "overload.json")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--factor", type=float, default=3.0, help="load over capacity")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--deadline", type=float, default=20.0, help="of the service, in seconds")
    parser.add_argument("--capacity-requests", type=int, default=96)
    parser.add_argument("--phase-seconds", type=float, default=5.0, help="of each Redis fault")
    parser.add_argument("--logs", type=Path, default=Path("runs") / "bench")
    arguments = parser.parse_args()
    rows: list[Measurement] = []
    raw: dict[str, Any] = {}
    if "load" in arguments.parts:
        settings = {"ICM_LORA_REQUEST_DEADLINE_SECONDS": str(arguments.deadline)}
        with our_service(settings, log=arguments.logs / "overload.log") as service:
            capacity, arrivals = asyncio.run(_measure_load(service, arguments))
        rows += _judge(capacity, arrivals, arguments.deadline)
        raw["memory every second, MB"] = arrivals.megabytes
        raw["statuses"] = {str(status): count for status, count in arrivals.statuses.items()}
    if "redis" in arguments.parts:
        log = arguments.logs / "redis-faults.log"
        rows += measure_redis_faults(log, phase_seconds=arguments.phase_seconds)
    if "drain" in arguments.parts:
        rows += measure_drain(arguments.logs / "drain.log")
    setup = {
        name: getattr(arguments, name)
        for name in ("parts", "seconds", "factor", "tokens", "deadline", "phase_seconds")
    }
    return conclude(
        rows,
        arguments.out,
        title="Load above capacity, faults, shutdown",
        setup={**setup, "adapters": _ADAPTERS, "base": "SmolLM2-135M, bfloat16"},
        raw=raw,
    )


async def _measure_load(
    service: ServerProcess, arguments: argparse.Namespace
) -> tuple[float, _Arrivals]:
    async with HttpClient(service.url) as client:
        server = await open_ours(client)
        ids = await generate_adapters(client, list_tasks(), _ADAPTERS)
        count = arguments.capacity_requests
        warm = build_requests("Uniform", ids, 16, 4, seed=0)
        await ask_all(server, warm, at_once=16)
        asks = build_requests("Zipf", ids, count, arguments.tokens, seed=1)
        answers, seconds = await ask_all(server, asks, at_once=16)
        capacity = sum(answer.status == 200 for answer in answers) / seconds
        assert capacity > 0, answers[0]
        print(f"capacity {capacity:.2f} requests/s", flush=True)
        arrivals = _Arrivals()
        watching = asyncio.create_task(_watch_memory(service, arrivals))
        await _arrive(server, ids, capacity * arguments.factor, arguments, arrivals)
        watching.cancel()
    return capacity, arrivals


async def _arrive(
    server: AnyServer,
    ids: list[str],
    rate: float,
    arguments: argparse.Namespace,
    arrivals: _Arrivals,
) -> None:
    chance = random.Random(2)
    asks = iter(build_requests("Zipf", ids, 100_000, arguments.tokens, seed=2))
    started = due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        while due - started < arguments.seconds:
            due += chance.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            arrivals.late.append(time.perf_counter() - due)
            group.create_task(_ask(server, next(asks), arrivals))


async def _ask(server: AnyServer, ask: Ask, arrivals: _Arrivals) -> None:
    started = time.perf_counter()
    try:
        answer = await server.complete(ask)
    except (OSError, EOFError, TimeoutError) as error:
        arrivals.others.append(repr(error))
        return
    seconds = time.perf_counter() - started
    arrivals.statuses[answer.status] += 1
    if answer.status == 200:
        arrivals.accepted.append(seconds)
    elif answer.status == 429:
        arrivals.refused.append(seconds)
    else:
        arrivals.others.append(f"{answer.status}: {answer.text[:200]}")


async def _watch_memory(service: ServerProcess, arrivals: _Arrivals) -> None:
    while True:
        arrivals.megabytes.append(service.read_resident_bytes() / 2**20)
        await asyncio.sleep(1.0)


def _judge(capacity: float, arrivals: _Arrivals, deadline: float) -> list[Measurement]:
    for line in arrivals.others[:20]:
        print(f"FAILED: {line}")
    tenth = max(1, len(arrivals.megabytes) // 6)
    early = median(arrivals.megabytes[tenth : 2 * tenth] or arrivals.megabytes)
    growth = median(arrivals.megabytes[-tenth:]) - early
    total = sum(arrivals.statuses.values()) + len(arrivals.others)
    rows = [
        Measurement("load: capacity", capacity, "req/s"),
        Measurement("load: requests", total, ""),
        Measurement("load: sent after time, p99", quantile(arrivals.late, 99) * 1e3, "ms"),
        Measurement("load: accepted", len(arrivals.accepted), "", 1),
        Measurement("load: refused with 429", len(arrivals.refused), "", 1),
        Measurement("load: neither (late, failed)", len(arrivals.others), "", 0, True),
        Measurement("load: memory growth", growth, "MB", _MOST_GROWTH_MB, True),
    ]
    if arrivals.accepted:
        slowest = max(arrivals.accepted)
        rows.append(Measurement("load: slowest accepted", slowest, "s", deadline, True))
    if arrivals.refused:
        for percent, target in ((50, None), (99, _MOST_REFUSAL_MS)):
            value = quantile(arrivals.refused, percent) * 1e3
            rows.append(Measurement(f"load: 429 after, p{percent}", value, "ms", target, True))
        rows.append(Measurement("load: 429 after, most", max(arrivals.refused) * 1e3, "ms"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
