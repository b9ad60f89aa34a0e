"""vLLM on the CPU, the peer that serving is compared with; see vllm.md for its environment.

Nothing of it is a dependency: the executable is named by an environment variable, and what needs
it says so and is left out where there is none.
"""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from service.demo import find_free_port
from service.inference.base_model import EMBEDDED_SMOLLM2, prepare_embedded_model
from tests.bench.servers import ServerProcess, running_server

VARIABLE = "ICM_BENCH_VLLM"
"""Environment variable that names the `vllm` executable."""

MISSING = (
    f"vLLM was not measured: set {VARIABLE} to the executable `vllm` of an environment of its own "
    "(tests/bench/peers/vllm.md)"
)

MAX_TOKENS = 1_024


@dataclass(frozen=True)
class Variant:
    """A way to start it.

    Attributes:
        environment: what it is told there.
        dtype: of its weights and computation.
    """

    environment: Mapping[str, str]
    dtype: str = "bfloat16"


_ALL_CORES = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"}

VARIANTS: Mapping[str, Variant] = {
    "default": Variant({}),
    "all cores": Variant(_ALL_CORES),
    "all cores, float32": Variant(_ALL_CORES, "float32"),
}
"""By default it computes on all cores but one, and keeps that for its API process; with all cores
it may be faster or slower. A CPU without products of bfloat16 is faster with float32, at twice the
memory. The fastest one is the peer."""


def find_vllm(executable: Path | None = None) -> Path | None:
    """The executable: as given, else the environment variable's, else None.

    Raises:
        FileNotFoundError: it is named and is not there.
    """
    found = executable or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if found is not None and not found.is_file():
        raise FileNotFoundError(f"{found} is no file: see tests/bench/peers/vllm.md")
    return found


def read_version(executable: Path) -> str:
    """What it calls itself."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [executable, "--version"], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.strip().splitlines()[-1]


@contextmanager
def vllm_server(
    executable: Path, variant: str, *, max_loras: int, max_rank: int, log: Path
) -> Iterator[ServerProcess]:
    """Runs vLLM with the embedded base model and room for `max_loras` LoRAs.

    Args:
        executable: `vllm`.
        variant: key of `VARIANTS`.
        max_loras: LoRAs in one batch, and resident.
        max_rank: of a LoRA; a larger one makes all of them slower.
        log: file with its output.
    """
    port = find_free_port()
    environment = {
        **os.environ,
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
        "VLLM_NO_USAGE_STATS": "1",
        **VARIANTS[variant].environment,
    }
    options = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": VARIANTS[variant].dtype,
        "--max-model-len": str(MAX_TOKENS),
        "--max-lora-rank": str(max_rank),
        "--max-loras": str(max_loras),
    }
    with running_server(
        f"vLLM ({variant})",
        [
            str(executable),
            "serve",
            str(prepare_embedded_model(EMBEDDED_SMOLLM2)),
            "--enable-lora",
            "--enforce-eager",  # no compiler for its kernels on this kind of machine
            "--disable-uvicorn-access-log",
            *(part for option in options.items() for part in option),
        ],
        url=f"http://127.0.0.1:{port}",
        ready_path="/health",
        environment=environment,
        log=log,
    ) as server:
        yield server
