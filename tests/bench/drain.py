"""SIGTERM under load: whatever the service has accepted is answered."""

import asyncio
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.client import HttpClient
from tests.bench.measurement import Measurement
from tests.bench.servers import ServerProcess, our_service
from tests.bench.targets import (
    PROMPTS,
    AnyServer,
    Ask,
    CompletionServer,
    generate_adapters,
    list_tasks,
    open_ours,
)

CLIENTS = 24
TOKENS = 32
GRACE_SECONDS = 30.0
_LEAD_SECONDS = 6.0


@dataclass
class _Log:
    """What clients saw; requests count as accepted where they were sent before the signal."""

    signalled: float | None = None
    answered: int = 0
    lost: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


def measure_drain(log: Path) -> list[Measurement]:
    """Keeps clients asking, whole answers and streams, and sends SIGTERM in the middle.

    Args:
        log: file with the service's output.
    """
    settings = {
        "ICM_LORA_DRAIN_GRACE_SECONDS": str(GRACE_SECONDS),
        "ICM_LORA_SHUTDOWN_DELAY_SECONDS": "1",
    }
    with our_service(settings, log=log) as service:
        seen = asyncio.run(_load_and_signal(service))
        assert seen.signalled is not None
        status = service.process.wait(GRACE_SECONDS)
        seconds = time.perf_counter() - seen.signalled
    for line in seen.lost:
        print(f"LOST: {line}")
    print(f"after the signal: {dict(seen.refused)}")
    return [
        Measurement("SIGTERM: requests answered in all", seen.answered, "", CLIENTS),
        Measurement("SIGTERM: accepted requests without an answer", len(seen.lost), "", 0, True),
        Measurement("SIGTERM: seconds to the exit", seconds, "s", GRACE_SECONDS, True),
        Measurement("SIGTERM: exit status", status, "", 0, True),
    ]


async def _load_and_signal(service: ServerProcess) -> _Log:
    seen = _Log()
    async with HttpClient(service.url) as client:
        server = await open_ours(client)
        ids = await generate_adapters(client, list_tasks(), CLIENTS)
        async with asyncio.TaskGroup() as group:
            for number, adapter_id in enumerate(ids):
                stream = number % 2 == 1 and isinstance(server, CompletionServer)
                ask = Ask(adapter_id, PROMPTS[number % len(PROMPTS)], TOKENS)
                group.create_task(_keep_asking(server, ask, seen, stream=stream))
            await asyncio.sleep(_LEAD_SECONDS)
            seen.signalled = time.perf_counter()
            service.process.send_signal(signal.SIGTERM)
    return seen


async def _keep_asking(server: AnyServer, ask: Ask, seen: _Log, *, stream: bool) -> None:
    while True:
        sent = time.perf_counter()
        try:
            answer = await server.complete(ask, stream=stream)
        except (OSError, EOFError, TimeoutError) as error:
            outcome, done = repr(error), False
        else:
            outcome = f"status {answer.status}"
            done = answer.status == 200 and bool(answer.finish_reason)
        if done:
            seen.answered += 1
            continue
        if seen.signalled is None or sent < seen.signalled:
            seen.lost.append(f"{'stream' if stream else 'whole'}: {outcome}")
        else:
            seen.refused[outcome] += 1
        return
