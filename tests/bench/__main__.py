"""`make bench`: latency from words to a resident adapter, and mixed-adapter batches.

Every number is measured here and compared with its target; a missed target is exit status 1.
Latencies are seen by an HTTP client on this machine. Two services share one Redis, so that
an adapter made by the first is a Redis hit for the second.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.demo import find_free_port, post_json, running_service
from tests.bench.decode import measure_decode
from tests.bench.detection import measure_detection
from tests.bench.measurement import Measurement, conclude, quantile
from tests.bench.servers import ANY_WORDS

COLD_REQUESTS = 120
CACHED_REQUESTS = 200
TOPICS = ("soup", "sonnets", "sorting", "senators", "sails", "saffron", "satire", "science")
VERBS = ("Write about", "Continue a text on", "Explain", "Compose lines on", "Report on")


def main() -> int:
    """Measures everything, prints a table, returns 1 where a target is missed."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    rows = [*measure_latencies(), *_measure_engine(), *_measure_detection()]
    return conclude(
        rows,
        arguments.out,
        title="Words to adapter, mixed batches",
        setup={"cold_requests": COLD_REQUESTS, "cached_requests": CACHED_REQUESTS},
    )


def measure_latencies() -> list[Measurement]:
    """Words to a resident adapter: generated, from the process's cache, from Redis."""
    with _redis_server() as redis_url:
        environment = {**ANY_WORDS, "ICM_LORA_REDIS_URL": redis_url}
        with running_service(environment) as first, running_service(environment) as second:
            _generate(first, "warm up the encoder and the decoder")
            _generate(second, "warm up the encoder and the decoder of the other")
            tasks = [f"{VERBS[i % 5]} {TOPICS[i % 8]}, variant {i}" for i in range(COLD_REQUESTS)]
            cold = [_generate(first, task, "miss") for task in tasks]
            redis = [_generate(second, task, "hit") for task in tasks]
            cached = [
                _generate(first, tasks[i % len(tasks)], "hit") for i in range(CACHED_REQUESTS)
            ]
            stages = _stage_medians(first, tasks)
    print("stage medians of a cold generation, ms: " + json.dumps(stages))
    return [
        Measurement("description -> slot, cold, p50", quantile(cold, 50), "ms", 150, True),
        Measurement("description -> slot, cold, p99", quantile(cold, 99), "ms", 400, True),
        Measurement("description -> slot, in process, p50", quantile(cached, 50), "ms", 5, True),
        Measurement("description -> slot, Redis, p50", quantile(redis, 50), "ms", 10, True),
    ]


def _measure_engine() -> list[Measurement]:
    decode = measure_decode()
    return [
        Measurement("slot write, p50", decode.slot_write_p50_seconds * 1e3, "ms", 1, True),
        Measurement("slot write, p99", decode.slot_write_p99_seconds * 1e3, "ms", 1, True),
        Measurement("16 adapters / 16 base rows, decode tokens/s", decode.ratio, "x", 0.90, False),
    ]


def _measure_detection() -> list[Measurement]:
    detection = measure_detection()
    return [
        Measurement(
            "detection: 8 adapters / 8 base rows, images/s", detection.ratio, "x", 0.90, False
        ),
        Measurement(
            "detection: boxes of the batch as one by one", float(detection.identical), "", 1, False
        ),
    ]


def _generate(url: str, task: str, cache: str | None = None) -> float:
    """Milliseconds that a client waits for an adapter to be resident."""
    started = time.perf_counter()
    answer = post_json(url, "/generate-lora", {"task": task, "modality": "text"})
    elapsed = time.perf_counter() - started
    if cache is not None and (answer["cache"] != cache or answer["degraded"]):
        raise SystemExit(f"expected cache {cache}, got {answer['cache']} {answer['degraded']}")
    return elapsed * 1e3


def _stage_medians(url: str, tasks: list[str]) -> dict[str, float]:
    body: dict[str, Any] = {"cache": "bypass", "modality": "text"}
    answers = [post_json(url, "/generate-lora", {**body, "task": task}) for task in tasks[:20]]
    names = answers[0]["milliseconds"]
    return {n: round(quantile([a["milliseconds"][n] for a in answers], 50), 2) for n in names}


@contextlib.contextmanager
def _redis_server() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        port = find_free_port()
        command = ["redis-server", "--port", str(port), "--dir", folder, "--save", ""]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            time.sleep(0.5)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
