"""`make bench-scaling`: throughput as the number of adapters grows, under four request mixes.

As in Punica's evaluation: with Distinct every request has another adapter than the one before
(in turn), with Uniform a random one, with Zipf (s = 1.1) few are popular, with Identical all have
the same. A fixed number of requests is answered by a closed loop of clients; all adapters are
known to the service, whether or not they fit into its slots.
"""

import argparse
import asyncio
import random
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.client import HttpClient
from tests.bench.measurement import RESULTS, Measurement, conclude
from tests.bench.servers import our_service
from tests.bench.targets import (
    PROMPTS,
    Ask,
    ask_all,
    count_tokens,
    generate_adapters,
    list_tasks,
    open_ours,
)

COUNTS = (1, 4, 16, 64, 256, 1_000)
MIXES = ("Distinct", "Uniform", "Zipf", "Identical")
ZIPF_EXPONENT = 1.1
_TARGET = 0.85

Rates = dict[str, dict[int, list[float]]]


def main() -> int:
    """Measures every mix at every count and returns 1 where the target is missed."""
    parser = argparse.ArgumentParser(prog="make bench-scaling", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--counts", type=int, nargs="*", default=list(COUNTS))
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--log", type=Path, default=Path("runs") / "bench" / "scaling.log")
    arguments = parser.parse_args()
    with our_service(log=arguments.log) as ours:
        rates = asyncio.run(_measure(ours.url, arguments))
    medians = {
        mix: {count: median(each) for count, each in by.items()} for mix, by in rates.items()
    }
    least, most = min(arguments.counts), max(arguments.counts)
    rows = [
        Measurement(f"{mix}, {count} adapters", value, "tok/s")
        for mix, by_count in medians.items()
        for count, value in by_count.items()
    ]
    # of one round, so that a machine that slows down in the meantime slows both
    ratio = median(
        many / one for many, one in zip(rates["Zipf"][most], rates["Zipf"][least], strict=True)
    )
    rows.append(Measurement(f"Zipf, {most} adapters / {least}", ratio, "x", _TARGET))
    setup = {name: getattr(arguments, name) for name in ("requests", "tokens", "clients", "rounds")}
    table = arguments.out.with_suffix(".md")
    status = conclude(
        rows,
        arguments.out,
        title="Throughput by number of adapters",
        setup={**setup, "base": "SmolLM2-135M, bfloat16", "zipf_exponent": ZIPF_EXPONENT},
        raw=rates,
    )
    table.write_text(render_table(medians))
    draw_curves(medians, arguments.out.with_suffix(".png"))
    print(render_table(medians))
    return status


async def _measure(url: str, arguments: argparse.Namespace) -> Rates:
    async with HttpClient(url) as client:
        server = await open_ours(client)
        ids = await generate_adapters(client, list_tasks(), max(arguments.counts))
        print(f"{len(ids)} adapters generated", flush=True)
        warm = build_requests("Identical", ids[:1], arguments.clients, 4, seed=0)
        await ask_all(server, warm, at_once=arguments.clients)
        rates: Rates = {mix: defaultdict(list) for mix in MIXES}
        for turn in range(arguments.rounds):
            for count in arguments.counts:
                for mix in MIXES:
                    asks = build_requests(
                        mix, ids[:count], arguments.requests, arguments.tokens, seed=turn
                    )
                    answers, seconds = await ask_all(server, asks, at_once=arguments.clients)
                    rates[mix][count].append(count_tokens(answers) / seconds)
                    print(
                        f"round {turn + 1}, {mix}, {count}: {rates[mix][count][-1]:.1f} tok/s",
                        flush=True,
                    )
    return {mix: dict(by_count) for mix, by_count in rates.items()}


def build_requests(
    mix: str, ids: Sequence[str], count: int, tokens: int, *, seed: int
) -> list[Ask]:
    """Requests of one mix, the same ones for the same seed.

    Args:
        mix: one of `MIXES`.
        ids: adapters to choose from.
        count: requests.
        tokens: of each.
        seed: of the random choices.
    """
    chance = random.Random(seed)
    match mix:
        case "Distinct":
            chosen = [ids[index % len(ids)] for index in range(count)]
        case "Uniform":
            chosen = chance.choices(ids, k=count)
        case "Zipf":
            weights = [(rank + 1) ** -ZIPF_EXPONENT for rank in range(len(ids))]
            chosen = chance.choices(ids, weights, k=count)
        case "Identical":
            chosen = [ids[0]] * count
        case _:
            raise ValueError(f"unknown mix {mix!r}: choose one of {MIXES}")
    return [Ask(each, PROMPTS[index % len(PROMPTS)], tokens) for index, each in enumerate(chosen)]


def render_table(medians: Mapping[str, Mapping[int, float]]) -> str:
    """Markdown: tokens per second, a row for each number of adapters."""
    mixes = list(medians)
    lines = [f"| adapters | {' | '.join(mixes)} |", "|--:|" + "--:|" * len(mixes)]
    for count in medians[mixes[0]]:
        values = " | ".join(f"{medians[mix][count]:.1f}" for mix in mixes)
        lines.append(f"| {count} | {values} |")
    return "\n".join(lines) + "\n"


def draw_curves(medians: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """The table as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for mix, by_count in medians.items():
        axes.plot(list(by_count), list(by_count.values()), marker="o", label=mix)
    axes.set_xscale("log")
    axes.set_xticks(list(next(iter(medians.values()))))
    axes.get_xaxis().set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("adapters")
    axes.set_ylabel("tokens/s")
    axes.set_title("Throughput by number of adapters")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
