"""Own adapters of further seeds are scored on the evaluation's windows, each by itself."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.errors import InvalidRecipeError
from service.synthesis.attachment import Attachment
from tests.fixtures.tiny_open_clip import TinyOpenClip
from tests.fixtures.tiny_training import open_run
from training.adapters import cut_windows, measure_nll, tokenize_documents
from training.baselines import TrainingTasks
from training.checkpoint import read_tensors
from training.evaluation import finetune_seeds
from training.evaluation.finetune_seeds import generate_by_cond_p_diff, read_own, score_adapters
from training.pipeline import Pipeline
from training.tasks.text import TextTask

FINETUNE = {"seeds": [1, 2], "epochs": 1, "keep_last": 2}
SETTINGS = {"num_windows": 4, "window_tokens": 9, "seed": 3}


def test_every_seed_is_scored_on_the_windows_of_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("ICM_LORA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    pipeline = Pipeline(open_run(tmp_path, finetune=FINETUNE))
    with pytest.raises(InvalidRecipeError, match="is missing"):
        read_own(pipeline, 1)
    pipeline.fine_tune_adapters()
    adapters = {f"own.{seed}": read_own(pipeline, seed) for seed in (1, 2)}
    scores = score_adapters(pipeline, adapters, SETTINGS)

    names = [task.name for task in pipeline.tasks]
    assert {label: [*tasks] for label, tasks in scores.items()} == {"own.1": names, "own.2": names}
    base, task = pipeline.base, pipeline.tasks[1]
    assert isinstance(task, TextTask)
    windows = cut_windows(tokenize_documents(base, task.test), 4, 9, seed=3)
    attachment = Attachment(base.model, pipeline.bases)
    for seed in (1, 2):
        kept = read_tensors(pipeline.run.adapter(task.name, seed))[0]["checkpoints"].float()
        attachment.rows.vectors = kept.mean(0, keepdim=True)
        with torch.no_grad():
            expected = float(measure_nll(base, windows).mean())
        assert scores[f"own.{seed}"][task.name] == pytest.approx(expected, rel=1e-4)
    assert scores["own.1"] != scores["own.2"]


class InTurn:
    """Gives the first checkpoint of each task that it is fitted on, in turn."""

    def fit(self, tasks: TrainingTasks, seed: int) -> None:
        self.counts = [len(rows) for rows in tasks.checkpoints]
        self.left = [rows[0] for rows in tasks.checkpoints]

    def generate(self, task_vector: Tensor, seed: int) -> Tensor:
        return self.left.pop(0)


def test_cond_p_diff_learns_from_one_seed_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_open_clip: TinyOpenClip,
) -> None:
    monkeypatch.setenv("ICM_LORA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    baseline = InTurn()
    monkeypatch.setattr(finetune_seeds, "build_baseline", {"cond_p_diff": baseline}.__getitem__)
    sections = {"encoder": tiny_open_clip.section, "finetune": FINETUNE}
    pipeline = Pipeline(open_run(tmp_path, **sections))
    pipeline.fine_tune_adapters()
    made = generate_by_cond_p_diff(pipeline, 2)

    assert baseline.counts == [2, 2]
    for task in pipeline.tasks:
        kept = read_tensors(pipeline.run.adapter(task.name, 2))[0]["checkpoints"].float()
        assert torch.equal(made[task.name], kept[0])
