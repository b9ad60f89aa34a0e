"""schemathesis against a running service, and what the service itself counted meanwhile."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "ignored_auth",
)
"""What is checked of every answer: no 5xx, nothing undocumented, nothing open without a key."""

STRANGER_CHECKS = CHECKS[:-1]
"""Of answers to requests without a key, which cannot be repeated without one."""


@dataclass(frozen=True)
class FuzzResult:
    """Outcome of one run.

    Attributes:
        passed: schemathesis found nothing.
        cases: requests that it generated.
        output: what it printed.
    """

    passed: bool
    cases: int
    output: str


def run_schemathesis(
    url: str,
    document: Path,
    *,
    max_examples: int,
    checks: tuple[str, ...] = CHECKS,
    headers: Mapping[str, str] | None = None,
    phases: str = "examples,coverage,fuzzing",
    seed: int = 0,
) -> FuzzResult:
    """Generates requests from an OpenAPI document, valid ones and others, and checks the answers.

    Args:
        url: of the service.
        document: file of its OpenAPI document.
        max_examples: most requests of the fuzzing phase for each operation.
        checks: names of schemathesis's checks.
        headers: sent with every request, say a key.
        phases: of schemathesis.
        seed: of what is generated.
    """
    # one worker: in CPython 3.11 hypothesis' parsing of lambdas fails now and then in threads
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", str(document.resolve())),
        *("--url", url, "--checks", ",".join(checks), "--phases", phases),
        *("--max-examples", str(max_examples), "--workers", "1", "--seed", str(seed)),
        *("--suppress-health-check", "all", "--warnings", "off", "--no-color"),
        *("--continue-on-failure", "--no-shrink", "--request-timeout", "120"),
    ]
    for name, value in (headers or {}).items():
        command += ["--header", f"{name}:{value}"]
    # its own folder of examples, so that nothing of a former run is repeated
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=document.resolve().parent
    )
    output = done.stdout + done.stderr
    found = re.search(r"(\d[\d,]*) generated", output)
    cases = int(found[1].replace(",", "")) if found else 0
    return FuzzResult(done.returncode == 0, cases, output)


def count_statuses(metrics: str) -> Counter[tuple[str, int]]:
    """Answers by (route, status), as the service counts them in its metrics."""
    counts: Counter[tuple[str, int]] = Counter()
    for line in metrics.splitlines():
        if line.startswith("icm_lora_http_requests_total{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            counts[labels["route"], int(labels["status"])] += int(float(line.rsplit(" ", 1)[1]))
    return counts
