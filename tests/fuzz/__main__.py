"""`make fuzz`: at least 5,000 requests from the OpenAPI document, with a key and without.

schemathesis generates valid and invalid requests for every operation of a service that has API
keys: first with a key, then as a stranger. No answer may be a 5xx, an undocumented status or
shape, and to a stranger nothing but the probes may answer anything but 401. The service's own
metrics are read at the end: they count the same requests from the other side.
"""

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from pathlib import Path

from service.api.auth import OPEN_PATHS
from service.api.keys import make_key
from tests.bench.client import HttpClient
from tests.bench.measurement import RESULTS, Measurement, conclude
from tests.bench.servers import our_service
from tests.fixtures.tiny_bundle import write_tiny_bundle
from tests.fuzz.run import STRANGER_CHECKS, count_statuses, run_schemathesis

_LEAST_CASES = 5_000


def main() -> int:
    """Fuzzes and returns 1 where anything was found."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "fuzz.json")
    parser.add_argument("--max-examples", type=int, default=400)
    parser.add_argument("--stranger-examples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least-cases", type=int, default=_LEAST_CASES)
    parser.add_argument("--logs", type=Path, default=Path("runs") / "fuzz")
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = write_tiny_bundle(folder)
        key, entry = make_key("fuzzer", ["infer", "generate", "admin"])
        (folder / "keys.json").write_text(f"[{entry}]")
        settings = {
            "ICM_LORA_BUNDLE": str(tiny.folder),
            "ICM_LORA_CACHE_DIR": str(tiny.cache_dir),
            "ICM_LORA_DETECTION_BUNDLE": "service/bundles/detection-embedded",
            "ICM_LORA_DTYPE": "auto",
            "ICM_LORA_API_KEYS_FILE": str(folder / "keys.json"),
            "ICM_LORA_REQUEST_DEADLINE_SECONDS": "100",
            "ICM_LORA_RUNTIME_LORA_UPDATING": "true",
        }
        with our_service(settings, log=arguments.logs / "service.log") as service:
            known = {"Authorization": f"Bearer {key}"}
            document = folder / "openapi.json"
            document.write_bytes(asyncio.run(_read(service.url, "/openapi.json", known)))
            first = count_statuses(asyncio.run(_read(service.url, "/metrics", known)).decode())
            friend = run_schemathesis(
                service.url,
                document,
                max_examples=arguments.max_examples,
                headers=known,
                seed=arguments.seed,
            )
            (arguments.logs / "with-key.txt").write_text(friend.output)
            before = count_statuses(asyncio.run(_read(service.url, "/metrics", known)).decode())
            stranger = run_schemathesis(
                service.url,
                document,
                max_examples=arguments.stranger_examples,
                checks=STRANGER_CHECKS,
                seed=arguments.seed + 1,
            )
            (arguments.logs / "without-key.txt").write_text(stranger.output)
            after = count_statuses(asyncio.run(_read(service.url, "/metrics", known)).decode())
            alive = service.process.poll() is None
    grown = after - before
    leaks = Counter(
        {
            f"{route} {status}": count
            for (route, status), count in grown.items()
            if status not in (401, 404, 405) and route not in OPEN_PATHS
        }
    )
    leaks["/metrics 200"] -= 1  # our own question, with the key
    num_leaks = sum(count for count in leaks.values() if count > 0)
    answered = after - first  # while it was loading, its probe answered 503
    errors = sum(count for (_, status), count in answered.items() if status >= 500)
    cases = friend.cases + stranger.cases
    for result, title in ((friend, "with a key"), (stranger, "without a key")):
        if not result.passed:
            print(f"--- {title}\n{result.output[-20_000:]}")
    print({f"{route} {status}": count for (route, status), count in sorted(answered.items())})
    rows = [
        Measurement("cases", cases, "", arguments.least_cases),
        Measurement("runs without a finding", friend.passed + stranger.passed, "", 2),
        Measurement("answers of 5xx, as the service counts them", errors, "", 0, True),
        Measurement("answers to strangers that are not refusals", num_leaks, "", 0, True),
        Measurement("service still runs", alive, "", 1),
    ]
    return conclude(
        rows,
        arguments.out,
        title="Requests from the OpenAPI document",
        setup={
            "max_examples": arguments.max_examples,
            "stranger_examples": arguments.stranger_examples,
            "seed": arguments.seed,
            "bundles": "tiny random text, shipped detection",
        },
        raw={
            "cases": {"with a key": friend.cases, "without": stranger.cases},
            "statuses": {f"{r} {s}": count for (r, s), count in sorted(answered.items())},
        },
    )


async def _read(url: str, path: str, headers: dict[str, str]) -> bytes:
    async with HttpClient(url, headers=headers) as client:
        reply = await client.request("GET", path)
        assert reply.status == 200, reply
        return reply.body


if __name__ == "__main__":
    sys.exit(main())
