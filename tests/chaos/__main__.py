"""`make chaos`: random generate, infer, delete, alias and leave; zero wrong answers.

A service with three slots, in float32, is asked by many clients for two minutes. Every answer is
compared with what the same request alone was answered with, every receipt with the adapter's
hash, and every slot and alias generation with what others saw of it.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.bench.measurement import RESULTS, Measurement, conclude
from tests.bench.servers import our_service
from tests.bench.targets import list_tasks
from tests.chaos.run import LOUD_ALPHA, SETTINGS, run_chaos
from tests.fixtures.tiny_bundle import TINY_TASKS, show_every_token, write_tiny_bundle

_LEAST_VERIFIED_A_SECOND = 1.0


def main() -> int:
    """Runs the chaos and returns 1 where anything was wrong."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "chaos.json")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shipped", action="store_true", help="the shipped bundle, and not a tiny random one"
    )
    parser.add_argument("--log", type=Path, default=Path("runs") / "chaos" / "service.log")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        settings = {
            **{f"ICM_LORA_{key.upper()}": str(value) for key, value in SETTINGS.items()},
            "ICM_LORA_DEVICE": "cpu",
            "ICM_LORA_DTYPE": "float32",
        }
        tasks = tuple(list_tasks()[:4])
        if not arguments.shipped:
            tiny = write_tiny_bundle(Path(name), alpha=LOUD_ALPHA)
            show_every_token(tiny)
            settings |= {
                "ICM_LORA_BUNDLE": str(tiny.folder),
                "ICM_LORA_CACHE_DIR": str(tiny.cache_dir),
            }
            tasks = tuple(task.descriptions[0] for task in TINY_TASKS)
        with our_service(settings, log=arguments.log) as service:
            ledger = asyncio.run(
                run_chaos(
                    service.url,
                    tasks,
                    seconds=arguments.seconds,
                    clients=arguments.clients,
                    seed=arguments.seed,
                )
            )
            alive = service.process.poll() is None
    print(ledger.render())
    least = _LEAST_VERIFIED_A_SECOND * arguments.seconds
    rows = [
        Measurement("answers compared with their own", ledger.verified, "", least),
        Measurement("wrong answers, receipts, slots, aliases", ledger.num_violations, "", 0, True),
        Measurement("service still runs", alive, "", 1),
    ]
    return conclude(
        rows,
        arguments.out,
        title="Chaos",
        setup={
            **SETTINGS,
            "bundle": "text-smollm2" if arguments.shipped else "tiny, random",
            "seconds": arguments.seconds,
            "clients": arguments.clients,
            "seed": arguments.seed,
        },
        raw={"outcomes": dict(sorted(ledger.counts.items()))},
    )


if __name__ == "__main__":
    sys.exit(main())
