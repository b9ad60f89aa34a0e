"""One number beside its target, a table of them, and the file that keeps them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import quantiles
from typing import Any

from training.checkpoint import write_text
from training.evaluation.report import describe_hardware
from training.pipeline import describe_commit

RESULTS = Path("training") / "results" / "serving"
"""Where measurements that are committed lie."""

_VERSIONS = ("icm-lora", "torch", "transformers", "peft", "fastapi", "uvicorn")


@dataclass(frozen=True)
class Measurement:
    """One number, with its target where it has one.

    Attributes:
        name: what was measured.
        value: the number.
        unit: its unit; empty for a ratio or a count.
        target: None for a number that is only reported.
        at_most: whether the value may not be above the target, or not below it.
    """

    name: str
    value: float
    unit: str
    target: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the value is on the right side of the target; true where there is none."""
        if self.target is None:
            return True
        return self.value <= self.target if self.at_most else self.value >= self.target

    def render(self) -> str:
        """One line."""
        line = f"{self.name:<64} {self.value:>9.3f} {self.unit:<5}"
        if self.target is None:
            return line.rstrip()
        sign = "<=" if self.at_most else ">="
        return f"{line} {sign} {self.target:g}  {'ok' if self.met else 'MISSED'}"


def conclude(
    rows: Sequence[Measurement],
    out: Path | None,
    *,
    title: str,
    setup: Mapping[str, Any],
    raw: Mapping[str, Any] | None = None,
) -> int:
    """Prints the table, writes the document, and returns the exit status.

    Args:
        rows: what was measured.
        out: file of the document; None writes none.
        title: what the whole is.
        setup: what it was measured with: models, settings, peers, counts.
        raw: single repeats, for whoever wants to look closer.

    Returns:
        1 where a target is missed, else 0.
    """
    print("\n".join(row.render() for row in rows))
    if out is not None:
        document = {
            "title": title,
            "commit": describe_commit(),
            "hardware": describe_hardware(),
            "versions": describe_versions(),
            "setup": setup,
            "measurements": [{**asdict(row), "met": row.met} for row in rows],
            **({"raw": raw} if raw is not None else {}),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(document, indent=1) + "\n")
        print(f"written: {out}")
    with_target = [row for row in rows if row.target is not None]
    missed = sum(not row.met for row in with_target)
    print(f"{len(with_target) - missed} of {len(with_target)} targets met")
    return 1 if missed else 0


def describe_versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on."""
    found: dict[str, str] = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def quantile(values: Sequence[float], percent: int) -> float:
    """A percentile, interpolated; of a single value that value."""
    if len(values) == 1:
        return values[0]
    return quantiles(values, n=100, method="inclusive")[percent - 1]
