"""Decoding with 16 adapters in one batch against decoding with none, side by side."""

import time
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from service.adapters.slot_bank import SlotBank
from service.inference.base_model import EMBEDDED_SMOLLM2, load_base_model
from service.inference.text import Completion, CompletionRequest, TextEngine
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterLayout

ROWS = 16
TOKENS = 32
REPEATS = 21
PROMPT = "The committee met on Tuesday to discuss the"


@dataclass(frozen=True)
class DecodeMeasurement:
    """Medians over interleaved repeats.

    Attributes:
        adapted_tokens_per_second: 16 rows, 16 different adapters.
        base_tokens_per_second: 16 rows of the base, no adapter code active.
        ratio: median of the repeats' ratios, adapted over base.
        slot_write_p50_seconds: copy of one adapter into its slot.
        slot_write_p99_seconds: the same, 99th percentile.
    """

    adapted_tokens_per_second: float
    base_tokens_per_second: float
    ratio: float
    slot_write_p50_seconds: float
    slot_write_p99_seconds: float


def measure_decode(rows: int = ROWS, tokens: int = TOKENS) -> DecodeMeasurement:
    """Alternates base and adapted batches of the shipped base, decode steps only."""
    base = load_base_model(EMBEDDED_SMOLLM2)
    layout = AdapterLayout.from_model(
        base.model,
        kind="core",
        rank=16,
        alpha=16.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )
    bases = AdapterBases.from_model(layout, base.model)
    engine = TextEngine(base, layout, bases, num_slots=256, max_prompt_tokens=512)
    engine._eos_ids = frozenset()  # rows of equal length: end of text would shrink one batch only
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(rows, layout.num_params, generator=generator).half() * 0.2
    adapted = [
        CompletionRequest(PROMPT, f"adapter-{i}", vectors[i], max_tokens=tokens)
        for i in range(rows)
    ]
    plain = [CompletionRequest(PROMPT, max_tokens=tokens) for _ in range(rows)]
    for batch in (plain, adapted):
        _decode_rate(engine, batch)
    pairs = [(_decode_rate(engine, plain), _decode_rate(engine, adapted)) for _ in range(REPEATS)]
    writes = _time_slot_writes(engine.slots, vectors[0])
    cuts = quantiles(writes, n=100, method="inclusive")
    return DecodeMeasurement(
        adapted_tokens_per_second=median(fast for _, fast in pairs),
        base_tokens_per_second=median(slow for slow, _ in pairs),
        ratio=median(with_adapters / without for without, with_adapters in pairs),
        slot_write_p50_seconds=cuts[49],
        slot_write_p99_seconds=cuts[98],
    )


def _decode_rate(engine: TextEngine, batch: list[CompletionRequest]) -> float:
    """Tokens per second of the decode steps, the prefill left out."""
    outcomes = engine.complete(batch)
    completions = [outcome for outcome in outcomes if isinstance(outcome, Completion)]
    assert all(each.completion_tokens == batch[0].max_tokens for each in completions)
    assert len(completions) == len(batch)
    seconds = max(each.seconds["decode"] for each in completions)
    return len(batch) * (batch[0].max_tokens - 1) / seconds


def _time_slot_writes(bank: SlotBank, vector: torch.Tensor) -> list[float]:
    """More adapters than slots, so that every load also evicts."""
    seconds = []
    for number in range(1000):
        with bank.acquire(f"written-{number}", vector) as lease:
            seconds.append(lease.write_seconds)
        time.sleep(0)
    return seconds
