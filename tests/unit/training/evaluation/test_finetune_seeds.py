"""Own adapters of further seeds are scored on the evaluation's windows, each by itself."""

from pathlib import Path

import pytest
import torch

from service.errors import InvalidRecipeError
from service.synthesis.attachment import Attachment
from tests.fixtures.tiny_training import open_run
from training.adapters import cut_windows, measure_nll, tokenize_documents
from training.checkpoint import read_tensors
from training.evaluation.finetune_seeds import score_seeds
from training.pipeline import Pipeline
from training.tasks.text import TextTask

SETTINGS = {"num_windows": 4, "window_tokens": 9, "seed": 3}


def test_every_seed_is_scored_on_the_windows_of_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("ICM_LORA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    pipeline = Pipeline(open_run(tmp_path, finetune={"seeds": [1, 2], "epochs": 1, "keep_last": 2}))
    with pytest.raises(InvalidRecipeError, match="is missing"):
        score_seeds(pipeline, SETTINGS)
    pipeline.fine_tune_adapters()
    scores = score_seeds(pipeline, SETTINGS)

    names = [task.name for task in pipeline.tasks]
    assert {seed: [*tasks] for seed, tasks in scores.items()} == {"1": names, "2": names}
    base, task = pipeline.base, pipeline.tasks[1]
    assert isinstance(task, TextTask)
    windows = cut_windows(tokenize_documents(base, task.test), 4, 9, seed=3)
    attachment = Attachment(base.model, pipeline.bases)
    for seed in (1, 2):
        kept = read_tensors(pipeline.run.adapter(task.name, seed))[0]["checkpoints"].float()
        attachment.rows.vectors = kept.mean(0, keepdim=True)
        with torch.no_grad():
            expected = float(measure_nll(base, windows).mean())
        assert scores[str(seed)][task.name] == pytest.approx(expected, rel=1e-4)
    assert scores["1"] != scores["2"]
