"""Progress: a bar for people on stderr, lines for machines in the run's folder."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.tiny_training import open_run
from training.progress import show_progress, track_job
from training.run_dir import RunDir


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.root / "metrics.jsonl").read_text().splitlines()]


def test_every_nth_and_the_last_step_are_logged(tmp_path: Path) -> None:
    run = open_run(tmp_path)

    with track_job(run, "generator", total=7, every=3) as report:
        for step in range(1, 8):
            report(step, mse=1 / step, kl=0.123456789)

    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert {line["job"] for line in lines} == {"generator"}
    assert lines[0]["mse"] == pytest.approx(1 / 3, abs=1e-6)
    assert lines[0]["kl"] == 0.123457


def test_the_bar_is_on_stderr_and_stdout_stays_clean(capfd: pytest.CaptureFixture[str]) -> None:
    with show_progress("adapter recipes", total=2) as report:
        report(1, loss=2.5)
        report(2, loss=2.25)

    shown = capfd.readouterr()
    assert shown.out == ""
    assert "adapter recipes" in shown.err
    assert "2/2" in shown.err
    assert "loss 2.25" in shown.err


def test_tensorboard_gets_the_same_values_where_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with track_job(open_run(tmp_path), "generator", total=4, every=2) as report:
        for step in range(1, 5):
            report(step, mse=0.5 * step)

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("generator/mse")
    assert [(event.step, event.value) for event in events] == [(2, 1.0), (4, 2.0)]


def test_tensorboard_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = open_run(tmp_path)

    with track_job(run, "generator", total=1) as report:
        report(1, mse=0.5)

    assert len(read_metrics(run)) == 1
    assert not (tmp_path / "tensorboard").exists()


def test_what_was_logged_is_kept_when_the_job_dies(tmp_path: Path) -> None:
    run = open_run(tmp_path)

    def fail() -> None:
        with track_job(run, "generator", total=4) as report:
            report(1, mse=0.5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()

    assert [line["step"] for line in read_metrics(run)] == [1]
