"""Functional training: generated adapters come to lower the loss, and kills change no byte."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import training.functional
from service.errors import InvalidInputError
from service.synthesis.attachment import Attachment
from service.synthesis.bundle import read_bundle
from service.synthesis.normalizer import AdapterNormalizer
from tests.fixtures.tiny_open_clip import TinyOpenClip
from tests.fixtures.tiny_training import make_recipe
from training.adapters import cut_windows, tokenize_documents
from training.baselines.prompt import prompt_with_description
from training.checkpoint import read_tensors
from training.detection_examples import build_detection_loss
from training.pipeline import Pipeline
from training.recipe import Recipe
from training.run_dir import RunDir
from training.tasks.detection_task import DetectionTask
from training.tasks.text import TextTask
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
    if preset == "in_context":
        shifts = [
            read_tensors(path)[0]["decoder.shift"]
            for path in (pipeline.run.seeded_generator(0), pipeline.run.functional_generator(0))
        ]
        assert not shifts[0].any()
        assert shifts[1].all()

    bundle = pipeline.make_bundle()
    trained = pipeline._load_generator(
        pipeline.run.functional_generator(0), 0, pipeline.encode_task_vectors()
    )
    shipped = read_bundle(pipeline.run.bundle).decoder.state_dict()
    for name, value in trained.decoder.state_dict().items():
        assert torch.equal(shipped[name], value.half().float())
    assert bundle.generator.preset == preset


def test_examples_stand_behind_a_training_wording(
    tmp_path: Path, tiny_open_clip: TinyOpenClip
) -> None:
    section = {**FUNCTIONAL, "behind_description": True}
    recipe = make_recipe(encoder=tiny_open_clip.section, functional=section)
    pipeline = open_pipeline(tmp_path, recipe)
    base, task, settings = pipeline.base, pipeline.tasks[0], recipe.finetune
    assert isinstance(task, TextTask)
    tokens = tokenize_documents(base, task.train)
    windows = cut_windows(tokens, settings.num_windows, settings.window_tokens, seed=0)
    vector = torch.randn(pipeline.bases.layout.num_params) * 0.1
    with pipeline.open_through_base(8, seed=0) as through_base:
        for numbers in (torch.tensor([1, 0, 3]), torch.tensor([2])):
            wording = task.descriptions[int(numbers[0]) % len(task.descriptions)]
            prompt = prompt_with_description(base, wording)
            ids = torch.cat([prompt.expand(len(numbers), -1), windows[numbers]], dim=1)
            through_base.attachment.rows.vectors = vector[None].to(base.dtype)
            logits = base.model(input_ids=ids).logits[:, len(prompt) : -1].float()
            expected = cross_entropy(logits.flatten(0, 1), windows[numbers][:, 1:].flatten())
            given = vector.clone().requires_grad_()
            loss = through_base.measure(given, task.name, numbers)
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
            loss.backward()
            assert given.grad is not None
            assert given.grad.abs().max() > 0


def test_scenes_are_asked_for_in_the_tasks_own_wordings(
    tmp_path: Path, tiny_detection_recipe: Recipe
) -> None:
    body = tiny_detection_recipe.to_json()
    body["functional"] = {**FUNCTIONAL, "behind_description": True}
    pipeline = open_pipeline(tmp_path, Recipe.model_validate(body))
    section, task, data = pipeline.run.recipe.detection, pipeline.tasks[0], pipeline.detection
    assert section is not None
    assert data is not None
    assert isinstance(task, DetectionTask)
    numbers = torch.arange(4)
    vector = torch.randn(pipeline.bases.layout.num_params) * 0.1
    with pipeline.open_through_base(4, seed=0) as through_base:
        loss = through_base.measure(vector, task.name, numbers)
        through_base.attachment.rows.vectors = vector[None]
        expected = {}
        for share in (1.0, 0.01):
            measure_loss = build_detection_loss(
                pipeline.base,
                task,
                data,
                section.model_copy(update={"own_prompt_share": share}),
                num_examples=pipeline.run.recipe.finetune.num_windows,
                seed=0,
            )
            expected[share] = measure_loss(numbers)
        with pytest.raises(InvalidInputError, match=f"'{task.name}' is unseen"):
            through_base.without([task.name]).measure(vector, task.name, numbers)
    assert torch.equal(loss, expected[1.0])
    assert not torch.equal(loss, expected[0.01])


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
