"""Progress of long jobs: a bar with ETA for people, JSONL (and TensorBoard) for machines."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from training.run_dir import RunDir

LINE_SECONDS = 30.0
"""Time between two lines of progress where stderr is no terminal."""


@runtime_checkable
class Report(Protocol):
    """Called with the number of steps done and named values at that step."""

    def __call__(self, step: int, **values: float) -> None:
        """Reports one step."""
        ...


@contextmanager
def show_progress(job: str, total: int) -> Iterator[Report]:
    """Shows a bar with ETA on stderr; where that is no terminal, a line now and then."""
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(job, total=total, values="")
        next_line = time.monotonic() + LINE_SECONDS

        def report(step: int, **values: float) -> None:
            nonlocal next_line
            shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            progress.update(task, completed=step, values=shown)
            if not progress.console.is_terminal and time.monotonic() >= next_line:
                next_line = time.monotonic() + LINE_SECONDS
                left = progress.tasks[task].time_remaining
                eta = "?" if left is None else f"{left:.0f}"
                print(f"{job}: {step}/{total} {shown}, {eta} s left", file=sys.stderr, flush=True)

        yield report


@contextmanager
def track_job(run: RunDir, job: str, total: int, every: int = 1) -> Iterator[Report]:
    """Shows a bar and logs every `every`-th step to the run's metrics (and TensorBoard)."""
    board = _open_tensorboard(run)
    with show_progress(job, total) as show:

        def report(step: int, **values: float) -> None:
            show(step, **values)
            if step % every == 0 or step == total:
                run.log(job=job, step=step, **{k: round(v, 6) for k, v in values.items()})
                for name, value in values.items() if board else ():
                    board.add_scalar(f"{job}/{name}", value, step)

        try:
            yield report
        finally:
            if board:
                board.close()


def _open_tensorboard(run: RunDir) -> Any:
    """A TensorBoard writer where the optional package is installed, else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(run.root / "tensorboard")
