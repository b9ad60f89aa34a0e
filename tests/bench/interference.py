"""`make bench-interference`: what long completions do to short ones beside them.

Some clients ask for 16 tokens again and again: first alone, then while other clients keep
completions of 512 tokens running. Short and long ones have adapters of their own. The two
situations take turns, and the latencies of all turns are put together.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench.client import HttpClient
from tests.bench.measurement import RESULTS, Measurement, conclude, quantile
from tests.bench.servers import our_service
from tests.bench.targets import (
    PROMPTS,
    AnyServer,
    Ask,
    ask_all,
    count_tokens,
    generate_adapters,
    list_tasks,
    open_ours,
)

_TARGET = 2.0
_LEAD_SECONDS = 2.0  # that the long ones have been running when the first short one comes


def main() -> int:
    """Measures both situations and returns 1 where the target is missed."""
    parser = argparse.ArgumentParser(prog="make bench-interference", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "interference.json")
    parser.add_argument("--short-clients", type=int, default=4)
    parser.add_argument("--long-clients", type=int, default=4)
    parser.add_argument("--short-tokens", type=int, default=16)
    parser.add_argument("--long-tokens", type=int, default=512)
    parser.add_argument("--requests", type=int, default=60, help="short ones in each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--log", type=Path, default=Path("runs") / "bench" / "interference.log")
    arguments = parser.parse_args()
    with our_service({"ICM_LORA_REQUEST_DEADLINE_SECONDS": "600"}, log=arguments.log) as ours:
        alone, beside = asyncio.run(_measure(ours.url, arguments))
    rows = [
        Measurement(f"short {name}, p{percent}", quantile(values, percent) * 1e3, "ms")
        for name, values in (("alone", alone), ("beside long ones", beside))
        for percent in (50, 95, 99)
    ]
    ratio = quantile(beside, 95) / quantile(alone, 95)
    rows.append(Measurement("short ones' p95, beside / alone", ratio, "x", _TARGET, True))
    setup = {
        name: getattr(arguments, name)
        for name in (
            "short_clients",
            "long_clients",
            "short_tokens",
            "long_tokens",
            "requests",
            "rounds",
        )
    }
    return conclude(
        rows,
        arguments.out,
        title="Short completions beside long ones",
        setup={**setup, "base": "SmolLM2-135M, bfloat16"},
        raw={"alone, s": alone, "beside, s": beside},
    )


async def _measure(url: str, arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    async with HttpClient(url) as client:
        server = await open_ours(client)
        count = arguments.short_clients + arguments.long_clients
        ids = await generate_adapters(client, list_tasks(), count)
        short = [
            Ask(
                ids[number % arguments.short_clients],
                PROMPTS[number % len(PROMPTS)],
                arguments.short_tokens,
            )
            for number in range(arguments.requests)
        ]
        long_ids = ids[arguments.short_clients :]
        await _ask_short(server, short[: 2 * arguments.short_clients], arguments.short_clients)
        alone: list[float] = []
        beside: list[float] = []
        for turn in range(arguments.rounds):
            alone += await _ask_short(server, short, arguments.short_clients)
            asking = asyncio.create_task(_keep_asking(server, long_ids, arguments.long_tokens))
            await asyncio.sleep(_LEAD_SECONDS)
            beside += await _ask_short(server, short, arguments.short_clients)
            if asking.done():
                await asking  # says why it ended
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await asyncio.sleep(1.0)  # the service notices that nobody waits
            print(f"round {turn + 1} of {arguments.rounds}", flush=True)
    return alone, beside


async def _ask_short(server: AnyServer, asks: Sequence[Ask], clients: int) -> list[float]:
    answers, _ = await ask_all(server, asks, at_once=clients)
    count_tokens(answers)
    return [answer.seconds for answer in answers]


async def _keep_asking(server: AnyServer, ids: Sequence[str], tokens: int) -> None:
    """So many long completions are running at any time, until this is cancelled."""

    async def ask_on(adapter_id: str, number: int) -> None:
        while True:
            ask = Ask(adapter_id, PROMPTS[number % len(PROMPTS)], tokens)
            answer = await server.complete(ask)
            count_tokens([answer])
            number += 1

    async with asyncio.TaskGroup() as group:
        for number, adapter_id in enumerate(ids):
            group.create_task(ask_on(adapter_id, number))


if __name__ == "__main__":
    sys.exit(main())
