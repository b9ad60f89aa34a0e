"""Functional training: generated adapters come to lower the loss, and kills change no byte."""

from pathlib import Path
from typing import Any

import pytest
import torch

import training.functional
from service.synthesis.attachment import Attachment
from service.synthesis.bundle import read_bundle
from service.synthesis.normalizer import AdapterNormalizer
from tests.fixtures.tiny_open_clip import TinyOpenClip
from tests.fixtures.tiny_training import make_recipe
from training.pipeline import Pipeline
from training.recipe import Recipe
from training.run_dir import RunDir
from training.through_base import ThroughBase

FUNCTIONAL = {"num_steps": 100, "batch_size": 8, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICM_LORA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def open_pipeline(root: Path, recipe: Recipe) -> Pipeline:
    return Pipeline(RunDir.open(root, recipe))


def make(tiny_open_clip: TinyOpenClip, **sections: Any) -> Recipe:
    return make_recipe(encoder=tiny_open_clip.section, functional=FUNCTIONAL, **sections)


def measure_loss(pipeline: Pipeline, path: Path) -> float:
    """Mean training loss of the adapters that a generator gives for its training wordings."""
    vectors = pipeline.encode_task_vectors()
    decoder = pipeline._load_generator(path, 0, vectors).decoder
    normalizer = AdapterNormalizer.fit(pipeline.bases.layout, pipeline.read_checkpoints())
    attachment = Attachment(pipeline.base.model, pipeline.bases)
    losses = []
    with torch.no_grad():
        for index, task in enumerate(pipeline.tasks):
            decoded = decoder(torch.zeros(1, 4), vectors.of_task(index)[:1])
            attachment.rows.vectors = normalizer.denormalize(decoded)
            losses.append(float(pipeline._build_loss(task, 0)(torch.arange(8))))
    attachment.detach(pipeline.base.model)
    return sum(losses) / len(losses)


def run_until_generator(root: Path, recipe: Recipe) -> Pipeline:
    pipeline = open_pipeline(root, recipe)
    pipeline.fine_tune_adapters()
    pipeline.train_generator()
    return pipeline


@pytest.mark.parametrize("preset", ["token", "in_context"])
def test_adapters_lower_the_loss_that_the_base_has_with_them(
    tmp_path: Path, tiny_open_clip: TinyOpenClip, preset: str
) -> None:
    recipe = make(tiny_open_clip, generator={"preset": preset, "epochs": 1})
    pipeline = run_until_generator(tmp_path, recipe)
    before = measure_loss(pipeline, pipeline.run.seeded_generator(0))
    after = measure_loss(pipeline, pipeline.run.functional_generator(0))
    assert after < before - 0.01

    bundle = pipeline.make_bundle()
    trained = pipeline._load_generator(
        pipeline.run.functional_generator(0), 0, pipeline.encode_task_vectors()
    )
    shipped = read_bundle(pipeline.run.bundle).decoder.state_dict()
    for name, value in trained.decoder.state_dict().items():
        assert torch.equal(shipped[name], value.half().float())
    assert bundle.generator.preset == preset


def test_a_killed_training_resumes_to_the_same_bytes(
    tmp_path: Path, tiny_open_clip: TinyOpenClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.functional, "SAVE_EVERY_STEPS", 4)
    recipe = make(tiny_open_clip, generator={"preset": "in_context", "epochs": 1})
    whole = run_until_generator(tmp_path / "whole", recipe).run.functional_generator(0)
    measure, calls = ThroughBase.measure_batch, 0

    def die(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls in (3, 14):
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(ThroughBase, "measure_batch", die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_until_generator(tmp_path / "killed", recipe)
    resumed = run_until_generator(tmp_path / "killed", recipe).run.functional_generator(0)

    assert resumed.read_bytes() == whole.read_bytes()
