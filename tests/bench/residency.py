"""Memory of many resident adapters: the process cache filled with the shipped text layout's.

python -m tests.bench.residency
"""

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from service.adapters.cache import ProcessCache
from service.adapters.record import AdapterRecord
from service.synthesis.adapter_recipe import AdapterRecipe
from service.synthesis.bundle import read_bundle
from service.synthesis.synthesizer import NearestTask, digest_vector

BUNDLE = Path("service/bundles/text-smollm2")
NUM_ADAPTERS = 10_000
MAX_RSS_BYTES = 1_000_000_000
"""What so many may add to the process."""


@dataclass(frozen=True)
class Residency:
    """What resident adapters take.

    Attributes:
        adapters: resident at the end.
        vector_bytes: of one adapter's vector.
        cache_bytes: what the cache counts.
        rss_bytes: growth of the process's resident memory.
    """

    adapters: int
    vector_bytes: int
    cache_bytes: int
    rss_bytes: int


def measure_residency(num_adapters: int = NUM_ADAPTERS) -> Residency:
    """Fills a process cache with adapters as they come from Redis, each read from its bytes."""
    bundle = read_bundle(BUNDLE)
    layout = bundle.layout
    generator = torch.Generator().manual_seed(0)
    cache = ProcessCache(max_bytes=MAX_RSS_BYTES)
    gc.collect()
    before = read_rss_bytes()
    for seed in range(num_adapters):
        vector = torch.randn(layout.num_params, generator=generator).half()
        made = AdapterRecord(
            recipe=AdapterRecipe.build(
                task=bundle.tasks[seed % len(bundle.tasks)].descriptions[0],
                bundle_digest=bundle.digest,
                mode="sample",
                seed=seed,
            ),
            layout_digest=layout.digest,
            vector=vector,
            vector_sha256=digest_vector(vector),
            nearest=tuple(NearestTask(task.name, 0.5) for task in bundle.tasks),
            in_distribution=0.5,
        )
        cache.put(AdapterRecord.from_bytes(made.to_bytes(), layout), ttl_seconds=86_400)
    gc.collect()
    after = read_rss_bytes()
    size_bytes = layout.num_params * 2
    return Residency(len(cache), size_bytes, cache.size_bytes(), after - before)


def read_rss_bytes() -> int:
    """Resident memory of this process."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS:")
    )
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    residency = measure_residency()
    print(json.dumps(asdict(residency)))
    assert residency.adapters == NUM_ADAPTERS
    assert residency.rss_bytes <= MAX_RSS_BYTES
