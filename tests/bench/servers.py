"""Servers that are measured, each a group of processes that can be frozen while another runs."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from service.demo import find_free_port
from service.settings import Settings
from tests.bench.client import HttpClient

ROOT = Path(__file__).parents[2]
START_SECONDS = 300.0
_STOP_SECONDS = 60.0

ANY_WORDS = (
    {"ICM_LORA_OUT_OF_DISTRIBUTION": "generate"}
    if "out_of_distribution" in Settings.model_fields
    else {}
)
"""Settings under which every description gets an adapter: all will do for a stopwatch."""

QUIET = {"ICM_LORA_LOG_LEVEL": "warning", "ICM_LORA_DETECTION_BUNDLE": "none", **ANY_WORDS}
"""Settings of our service when it is measured with text."""


@dataclass(frozen=True)
class ServerProcess:
    """A server and all processes that it started.

    Attributes:
        name: for tables.
        url: where it listens.
        process: its first process, the leader of its own group.
        log: file with its output.
    """

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def suspend(self) -> None:
        """Freezes every process, so that an idle server that spins costs nothing."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Undoes `suspend`."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def read_resident_bytes(self) -> int:
        """Memory of the first process and its children."""
        first = psutil.Process(self.process.pid)
        return sum(each.memory_info().rss for each in (first, *first.children(recursive=True)))


@contextmanager
def running_server(
    name: str,
    command: Sequence[str],
    *,
    url: str,
    ready_path: str,
    environment: Mapping[str, str],
    log: Path,
) -> Iterator[ServerProcess]:
    """Starts a server, waits until it is ready, and ends its whole group at the end.

    Raises:
        RuntimeError: it ended, or was not ready in time; with the end of its log.
    """
    # ended by a signal, a benchmark must still end its servers: they are in groups of their own
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env={**environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = ServerProcess(name, url, process, log)
    try:
        _wait_until_ready(server, ready_path)
        yield server
    finally:
        _end(server)


@contextmanager
def our_service(
    settings: Mapping[str, str] | None = None, *, log: Path, name: str = "icm-lora"
) -> Iterator[ServerProcess]:
    """`python -m service` with the shipped text bundle, `settings` on top of `QUIET`."""
    port = find_free_port()
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("ICM_")}
    with running_server(
        name,
        [sys.executable, "-m", "service"],
        url=f"http://127.0.0.1:{port}",
        ready_path="/health/ready",
        environment={**inherited, **QUIET, **(settings or {}), "ICM_LORA_PORT": str(port)},
        log=log,
    ) as server:
        yield server


def _wait_until_ready(server: ServerProcess, path: str) -> None:
    started = time.monotonic()
    while not asyncio.run(_answers(server.url, path)):
        if server.process.poll() is not None or time.monotonic() - started > START_SECONDS:
            tail = server.log.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"{server.name} did not become ready; its log ends:\n{tail}")
        time.sleep(0.3)


async def _answers(url: str, path: str) -> bool:
    async with HttpClient(url, timeout_seconds=5) as client:
        try:
            return (await client.request("GET", path)).status == 200
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            return False


def _end(server: ServerProcess) -> None:
    """SIGTERM first; whatever of the group is left after a minute is killed."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        server.resume()
        server.process.terminate()
        server.process.wait(_STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
