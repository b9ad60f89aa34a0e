"""The whole way: recipe -> killed and resumed training -> bundle -> service -> answer."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.demo import post_json, running_service
from training.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COMMAND = [sys.executable, "-m", "training.cli", "train", "smoke", "--threads", "1", "--out"]
KILLS = 5


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    subprocess.run([*COMMAND, str(run)], check=True, timeout=300)
    return run


def test_a_training_killed_five_times_gives_the_same_bundle(
    finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    rng = random.Random(0)
    for _ in range(KILLS):
        _kill_after_progress(run, lines=rng.randint(1, 60))
    subprocess.run([*COMMAND, str(run)], check=True, timeout=300)

    assert _read_all(run / "bundle") == _read_all(finished_run / "bundle")
    assert not list(run.rglob("*.partial"))


def test_finished_work_is_not_redone(finished_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.safetensors")}

    assert main(["adapters", "smoke", "--out", str(finished_run)]) == 0
    assert main(["generator", "smoke", "--out", str(finished_run)]) == 0

    after = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.safetensors")}
    assert after == before


def test_evaluation_of_the_run_writes_table_and_figure(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = finished_run / "own_adapters.safetensors"
    status = main(
        [
            *("evaluate", "--bundle", str(finished_run / "bundle"), "--own", str(own)),
            *("--windows", "16", "--window-tokens", "32", "--out", str(tmp_path)),
        ]
    )

    assert status == 0
    assert "generated / own" in capsys.readouterr().out
    document = json.loads((tmp_path / "evaluation.json").read_text())
    assert len(document["tasks"]) == 4
    for task in document["tasks"]:
        assert task["scores"]["own"]["ppl"] < task["scores"]["base"]["ppl"]
        ratio = task["ppl_ratio"]
        assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000


def test_the_trained_bundle_answers_over_http(finished_run: Path) -> None:
    settings = {"ICM_LORA_BUNDLE": str(finished_run / "bundle"), "ICM_LORA_DTYPE": "float32"}
    task = "Write Python code."
    with running_service(settings) as url:
        adapter = post_json(url, "/generate-lora", {"task": task})
        prompt = {"prompt": "def main", "max_tokens": 8}
        adapted = post_json(url, "/infer", {"task": task, **prompt})
        base = post_json(url, "/infer", {"adapter_id": "base", **prompt})

    assert adapter["bundle"]["name"] == "smoke"
    assert adapted["receipt"]["adapter_id"] == adapter["adapter_id"]
    assert adapted["receipt"]["slot"] > 0
    assert base["receipt"]["slot"] == 0
    assert adapted["text"] != base["text"]


def test_generate_writes_a_peft_directory(finished_run: Path, tmp_path: Path) -> None:
    bundle = str(finished_run / "bundle")
    assert main(["generate", "Write code.", "--bundle", bundle, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "adapter_model.safetensors").exists()


def _kill_after_progress(run: Path, lines: int) -> None:
    """Starts the training and kills it once it has reported that many more steps."""
    metrics = run / "metrics.jsonl"
    target = _count_lines(metrics) + lines
    process = subprocess.Popen([*COMMAND, str(run)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while _count_lines(metrics) < target and process.poll() is None:
        assert time.monotonic() < deadline, "the training reports no progress"
        time.sleep(0.005)
    process.kill()
    process.wait()


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
