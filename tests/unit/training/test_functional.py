"""Functional training: generated adapters come to lower the loss, and kills change no byte."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import training.functional
from service.errors import InvalidInputError
from service.synthesis.attachment import Attachment
from service.synthesis.bundle import read_bundle
from service.synthesis.normalizer import AdapterNormalizer
from tests.fixtures.kernel import normal
from tests.fixtures.tiny_open_clip import TinyOpenClip
from tests.fixtures.tiny_training import (
    TINY_LAYOUT,
    draw_checkpoints,
    draw_task_vectors,
    make_recipe,
    open_run,
)
from training.adapters import cut_windows, tokenize_documents
from training.baselines.prompt import prompt_with_description
from training.checkpoint import read_tensors
from training.detection_examples import build_detection_loss
from training.functional import draw_wrong_words, train_functionally
from training.generator import build_generator
from training.pipeline import Pipeline
from training.recipe import Recipe
from training.run_dir import RunDir
from training.task_vectors import TaskVectors
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


class Valleys(ThroughBase):
    """Loss of an adapter vector: its squared distance to the task's own one; there is no base."""

    def __init__(self) -> None:
        vars(self).update(
            base=SimpleNamespace(device=torch.device("cpu")), num_examples=8, batch_size=4
        )

    def measure(self, vector: Tensor, task: str, examples: Tensor) -> Tensor:
        return (vector - draw_checkpoints()[task].mean(0)).square().mean()


def test_contrast_makes_wrong_words_worse(tmp_path: Path) -> None:
    vectors, checkpoints = draw_task_vectors(), draw_checkpoints()
    own = {name: rows.mean(0) for name, rows in checkpoints.items()}
    normalizer = AdapterNormalizer.fit(TINY_LAYOUT, checkpoints)
    gaps, losses = [], []
    for weight in (0.0, 1.0):
        contrast = {"contrast_weight": weight, "contrast_margin": 3.0}
        section = {**FUNCTIONAL, "num_steps": 200, **contrast}
        run = open_run(tmp_path / str(weight), functional=section)
        model = build_generator(TINY_LAYOUT, run.recipe, vectors)
        names = list(checkpoints)
        train_functionally(run, model, normalizer, vectors, names, names, Valleys(), seed=0)
        with torch.no_grad():
            nonsense = normalize(normal(1, vectors.dim, seed=9), dim=1)
            told = torch.cat([*(vectors.of_task(task)[:1] for task in range(3)), nonsense])
            made = normalizer.denormalize(model.decoder(torch.zeros(4, 4), told))
        true = [float((made[i] - own[name]).square().mean()) for i, name in enumerate(names)]
        wrong = [float((made[3] - target).square().mean()) for target in own.values()]
        losses.append(sum(true) / 3)
        gaps.append(sum(wrong) / 3 - losses[-1])
    assert gaps[1] > gaps[0] + 0.3
    assert max(losses) < 0.2  # the mean adapter has 0.69


def test_wrong_words_are_of_other_families_or_of_no_task() -> None:
    rows = torch.eye(8)
    vectors = TaskVectors("test", rows, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    families = ("a", "b", "a", "c")
    drawn = [
        draw_wrong_words(vectors, families, 0, torch.Generator().manual_seed(seed))
        for seed in range(200)
    ]
    wordings = [int(row.argmax()) for row in drawn if int((row == 1).sum())]
    assert {*wordings} == {2, 3, 6, 7}
    assert 80 < len(wordings) < 120
    for row in drawn:
        torch.testing.assert_close(row.norm(dim=1), torch.ones(1))


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


@pytest.mark.parametrize("contrast_weight", [0.0, 1.0])
def test_a_killed_training_resumes_to_the_same_bytes(
    tmp_path: Path,
    tiny_open_clip: TinyOpenClip,
    monkeypatch: pytest.MonkeyPatch,
    contrast_weight: float,
) -> None:
    monkeypatch.setattr(training.functional, "SAVE_EVERY_STEPS", 4)
    recipe = make_recipe(
        encoder=tiny_open_clip.section,
        generator={"preset": "in_context", "epochs": 1},
        functional={**FUNCTIONAL, "num_steps": 20, "contrast_weight": contrast_weight},
    )
    whole = run_until_generator(tmp_path / "whole", recipe).run.functional_generator(0)
    measure, calls = ThroughBase.measure, 0

    def die(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls in (3, 14):
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(ThroughBase, "measure", die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_until_generator(tmp_path / "killed", recipe)
    resumed = run_until_generator(tmp_path / "killed", recipe).run.functional_generator(0)

    assert resumed.read_bytes() == whole.read_bytes()
