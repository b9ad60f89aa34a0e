"""`make bench-serving`: our service beside vLLM and transformers, over HTTP, on one machine.

Throughput: 16 concurrent completions of 48 tokens by the base model and by 16 different
adapters; one completion at a time. The same adapters on both sides: ours exports them as PEFT
directories, the peer loads them. Servers take turns round by round, and the ones whose turn it
is not are frozen. Then the time from a description that was never seen to the first adapted token,
beside the peer's from a ready LoRA on disk.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.bench.client import HttpClient
from tests.bench.generate_peer import GeneratePeer, load_generate_peer
from tests.bench.measurement import RESULTS, Measurement, conclude, quantile
from tests.bench.peers.vllm import (
    MISSING,
    VARIANTS,
    find_vllm,
    read_version,
    vllm_server,
)
from tests.bench.servers import ServerProcess, our_service
from tests.bench.targets import (
    PROMPTS,
    AnyServer,
    Ask,
    CompletionServer,
    ask_all,
    choose_endless,
    count_tokens,
    export_adapters,
    generate_adapters,
    list_tasks,
    load_lora,
    open_ours,
    open_vllm,
    unload_lora,
)

_RANK = 16  # of our exported adapters, and the least that vLLM must be started with for them
_PAUSE_SECONDS = 0.5  # until threads of who ran before have stopped spinning
_FIRST_TOKENS = 4
_PAIRS = 4  # per round; even, as their order alternates
_SINGLES = 3  # of one stream per pair: short, so one says little


@dataclass
class Contender:
    """A server in the comparison.

    Attributes:
        process: of the server.
        server: to ask it.
        base: requests to the base model.
        adapted: requests to different adapters.
        rates: tokens per second of each round by case.
        pairs: the same, measured within seconds of what it is compared with (ours only).
    """

    process: ServerProcess
    server: AnyServer
    base: list[Ask]
    adapted: list[Ask]
    rates: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    pairs: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    short_rows: int = 0

    def best(self, case: str) -> float:
        """Median over the rounds."""
        return median(self.rates[case])

    @property
    def streams(self) -> bool:
        """Whether it answers with server-sent events."""
        return isinstance(self.server, CompletionServer)


def main() -> int:
    """Measures what is asked for and returns 1 where a target is missed."""
    parser = argparse.ArgumentParser(prog="make bench-serving", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "serving.json")
    parser.add_argument("--vllm", type=Path, help="executable; default: $ICM_BENCH_VLLM")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--descriptions", type=int, default=40)
    parser.add_argument("--logs", type=Path, default=Path("runs") / "bench")
    arguments = parser.parse_args()
    vllm = find_vllm(arguments.vllm)
    variants = arguments.variants if vllm is not None else []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ours = stack.enter_context(our_service(log=arguments.logs / "icm-lora.log"))
        peers = []
        for variant in variants:
            assert vllm is not None
            log = arguments.logs / f"vllm-{variant.replace(' ', '-')}.log"
            ours.suspend()
            peers.append(
                stack.enter_context(
                    vllm_server(vllm, variant, max_loras=arguments.streams, max_rank=_RANK, log=log)
                )
            )
            peers[-1].suspend()
            ours.resume()
        rows, raw = asyncio.run(_compare(ours, peers, folder, arguments))
    setup = {
        "base": "SmolLM2-135M, bfloat16",
        "adapters": f"{arguments.streams} generated, kind core, exported as PEFT of rank {_RANK}",
        "rounds": arguments.rounds,
        "streams": arguments.streams,
        "tokens": arguments.tokens,
        "descriptions": arguments.descriptions,
        "torch_threads": torch.get_num_threads(),
        "vllm": None if vllm is None else read_version(vllm),
        "vllm_variants": {name: asdict(VARIANTS[name]) for name in variants},
    }
    status = conclude(rows, arguments.out, title="Serving beside its peers", setup=setup, raw=raw)
    if vllm is None:
        print(MISSING, file=sys.stderr)
        return 1
    return status


async def _compare(
    ours: ServerProcess,
    peers: Sequence[ServerProcess],
    folder: Path,
    arguments: argparse.Namespace,
) -> tuple[list[Measurement], dict[str, Any]]:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(HttpClient(ours.url))
        us = await _prepare_ours(ours, client, arguments)
        ids = [ask.model for ask in us.adapted]
        folders = await export_adapters(client, ids, folder)
        generate = load_generate_peer(folders[0])
        others = []
        for peer in peers:
            ours.suspend()
            peer.resume()
            peer_client = await stack.enter_async_context(HttpClient(peer.url))
            others.append(await _prepare_peer(peer, peer_client, us, folders))
            peer.suspend()
            ours.resume()
        everyone = [us, *others]
        single: dict[str, list[float]] = defaultdict(list)
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", flush=True)
            await _run_round(everyone, generate, single, arguments)
        first = await _measure_first_tokens(everyone, folders, arguments.descriptions)
    raw = {
        **{each.process.name: dict(each.rates) for each in everyone},
        "icm-lora, pairs": dict(us.pairs),
        "transformers": dict(single),
        "first token, ms": first,
        "rows that ended early": {each.process.name: each.short_rows for each in everyone},
    }
    return [*_judge_rates(us, others, single), *_judge_first(us, others, first)], raw


async def _prepare_ours(
    process: ServerProcess, client: HttpClient, arguments: argparse.Namespace
) -> Contender:
    server = await open_ours(client)
    ids = await generate_adapters(client, list_tasks(), arguments.streams)
    base = await choose_endless(server, ["base"] * arguments.streams, arguments.tokens)
    adapted = await choose_endless(server, ids, arguments.tokens)
    return Contender(process, server, base, adapted)


async def _prepare_peer(
    process: ServerProcess, client: HttpClient, us: Contender, folders: Sequence[Path]
) -> Contender:
    """Loads the same adapters and asks each once, so that nothing is lazily made later."""
    server = await open_vllm(client)
    for ask, folder in zip(us.adapted, folders, strict=True):
        await load_lora(client, ask.model, folder)
    contender = Contender(process, server, us.base, us.adapted)
    for asks in (contender.base, contender.adapted):
        answers, _ = await ask_all(server, asks, at_once=len(asks))
        count_tokens(answers)
    return contender


async def _run_round(
    everyone: Sequence[Contender],
    generate: GeneratePeer,
    single: dict[str, list[float]],
    arguments: argparse.Namespace,
) -> None:
    for each in everyone:
        each.process.suspend()
    for each in everyone:
        each.process.resume()
        await asyncio.sleep(_PAUSE_SECONDS)
        await _measure_rates(each, arguments.tokens)
        each.process.suspend()
    for number in range(_PAIRS):
        await _measure_pairs(everyone[0], generate, single, arguments.tokens, number % 2 == 1)
    for each in everyone:
        each.process.resume()


async def _measure_pairs(
    us: Contender, generate: GeneratePeer, single: dict[str, list[float]], tokens: int, turn: bool
) -> None:
    """Ours with and without adapters, and beside transformers, within seconds of each other.

    What comes second on a busy machine may have the worse of it: `turn` has the other one first.
    """
    us.process.resume()
    await asyncio.sleep(_PAUSE_SECONDS)
    cases = [("base", us.base), ("adapted", us.adapted)]
    for name, asks in reversed(cases) if turn else cases:
        us.pairs[name].append(await _measure_rate(us, asks))
    us.process.suspend()
    for name, ask in (("one base", us.base[0]), ("one adapted", us.adapted[0])) * _SINGLES:
        us.process.resume()
        await asyncio.sleep(_PAUSE_SECONDS)
        us.pairs[name].append(await _measure_rate(us, [ask]))
        us.process.suspend()
        await asyncio.sleep(_PAUSE_SECONDS)
        single[name].append(generate.rate(ask.prompt, tokens, adapted=name == "one adapted"))


async def _measure_rates(each: Contender, tokens: int) -> None:
    cases = {"base": each.base, "adapted": each.adapted}
    for name, asks in cases.items():
        for stream in (False, True) if each.streams else (False,):
            rate = await _measure_rate(each, asks, tokens, stream=stream)
            each.rates[f"{name}, events" if stream else name].append(rate)
        each.rates[f"one {name}"].append(await _measure_rate(each, asks[:1]))


async def _measure_rate(
    each: Contender, asks: Sequence[Ask], tokens: int | None = None, *, stream: bool = False
) -> float:
    """Tokens per second of requests at once; counts rows of other than so many tokens."""
    answers, seconds = await ask_all(each.server, asks, at_once=len(asks), stream=stream)
    if tokens is not None:
        each.short_rows += sum(answer.tokens != tokens for answer in answers)
    return count_tokens(answers) / seconds


async def _measure_first_tokens(
    everyone: Sequence[Contender], folders: Sequence[Path], count: int
) -> dict[str, list[float]]:
    """Milliseconds from words (or a LoRA on disk) to the first token, in turns."""
    found: dict[str, list[float]] = defaultdict(list)
    for each in everyone:
        each.process.suspend()
    for number in range(-2, count):  # the first two warm up
        for each in everyone:
            each.process.resume()
            await asyncio.sleep(0.05)
            prompt = PROMPTS[number % len(PROMPTS)]
            if each is everyone[0]:
                seconds = await _first_token_of_words(each.server, number, prompt)
            else:
                seconds = await _first_token_of_lora(
                    each.server, f"fresh-{number}", folders[number % len(folders)], prompt
                )
            each.process.suspend()
            if number >= 0:
                found[each.process.name].append(seconds * 1e3)
    for each in everyone:
        each.process.resume()
    return dict(found)


async def _first_token_of_words(server: AnyServer, number: int, prompt: str) -> float:
    words = f"{list_tasks()[(number * 7) % 100]} Variation {number + 1000}, never seen before."
    if isinstance(server, CompletionServer):
        ask = Ask(f"task:{words}", prompt, _FIRST_TOKENS)
        answer = await server.complete(ask, stream=True)
        count_tokens([answer])
        assert answer.first_seconds is not None
        return answer.first_seconds
    answer = await server.complete(Ask(f"task:{words}", prompt, 1))
    count_tokens([answer])
    return answer.seconds


async def _first_token_of_lora(server: AnyServer, name: str, folder: Path, prompt: str) -> float:
    started = time.perf_counter()
    await load_lora(server.client, name, folder)
    loaded = time.perf_counter() - started
    answer = await server.complete(Ask(name, prompt, _FIRST_TOKENS), stream=True)
    count_tokens([answer])
    assert answer.first_seconds is not None
    await unload_lora(server.client, name)
    return loaded + answer.first_seconds


def _judge_rates(
    us: Contender, others: Sequence[Contender], single: dict[str, list[float]]
) -> list[Measurement]:
    rows = [
        Measurement(f"{each.process.name}: {case}", median(values), "tok/s")
        for each in (us, *others)
        for case, values in each.rates.items()
    ]
    rows += [
        Measurement(f"transformers: {case}", median(values), "tok/s")
        for case, values in single.items()
    ]
    ratio = _median_ratio(us.pairs["adapted"], us.pairs["base"])
    rows.append(Measurement("16 adapters / own base", ratio, "x", 0.95))
    if others:
        for case, target in (("adapted", 2.0), ("base", 1.0)):
            for suffix in ("", ", events") if us.streams else ("",):
                best = max(others, key=lambda each: each.best(case + suffix))
                rows.append(
                    Measurement(
                        f"{case}{suffix} / {best.process.name}, the fastest one",
                        us.best(case + suffix) / best.best(case + suffix),
                        "x",
                        None if suffix else target,
                    )
                )
    for case in ("one base", "one adapted"):
        value = _median_ratio(us.pairs[case], single[case])
        peer = "generate" if case == "one base" else "generate with PEFT"
        rows.append(Measurement(f"{case} / transformers' {peer}", value, "x", 1.0))
    return rows


def _median_ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    return median(a / b for a, b in zip(ours, others, strict=True))


def _judge_first(
    us: Contender, others: Sequence[Contender], first: dict[str, list[float]]
) -> list[Measurement]:
    rows = []
    for name, values in first.items():
        for percent in (50, 95):
            title = f"{name}: first adapted token, p{percent}"
            rows.append(Measurement(title, quantile(values, percent), "ms"))
    if others:
        best = min(median(first[each.process.name]) for each in others)
        value = median(first[us.process.name]) / best
        rows.append(Measurement("words to first token / a ready LoRA to it", value, "x", 0.5, True))
    return rows


if __name__ == "__main__":
    sys.exit(main())
