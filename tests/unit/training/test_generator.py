"""Training of the generator: it memorises, it is deterministic, and it survives being killed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import training.generator
from service.synthesis.cvae import ConditionalVAE
from service.synthesis.in_context import InContextDecoder
from service.synthesis.normalizer import AdapterNormalizer
from service.synthesis.token_networks import TokenDecoder
from tests.fixtures.kernel import normal
from tests.fixtures.tiny_training import (
    TINY_LAYOUT,
    draw_checkpoints,
    draw_task_vectors,
    make_recipe,
    open_run,
)
from training.baselines.base import TrainingTasks
from training.baselines.leave_one_out import choose_by_leave_one_out
from training.baselines.top_k import mix_top_k
from training.episodes import Episodes
from training.generator import TEMPERATURES, build_generator, choose_temperature, train_generator
from training.run_dir import RunDir

PRESETS = pytest.mark.parametrize("preset", ["paper", "token", "in_context"])


def train(root: Path, **generator: Any) -> ConditionalVAE:
    run = open_run(root, generator=generator)
    return train_generator(run, TINY_LAYOUT, draw_checkpoints(), draw_task_vectors()).cpu().eval()


def decode_error(model: ConditionalVAE, conditions: Tensor) -> Tensor:
    """Mean squared error per task of z = 0, in normalised values: 1 is a task's variance."""
    checkpoints = draw_checkpoints()
    normalizer = AdapterNormalizer.fit(TINY_LAYOUT, checkpoints)
    own = normalizer.normalize(torch.stack([rows.mean(0) for rows in checkpoints.values()]))
    with torch.no_grad():
        decoded = model.decoder(torch.zeros(len(own), 4), conditions)
    return (decoded - own).square().mean(1)


def test_the_token_preset_memorises_the_tasks_adapters(tmp_path: Path) -> None:
    model = train(tmp_path, depth=12, width=32, epochs=150)
    vectors = draw_task_vectors()
    trained = torch.stack([vectors.of_task(task)[0] for task in range(3)])
    unseen = torch.stack([normal(12, seed=t) + normal(12, seed=70 + t, std=0.2) for t in range(3)])

    assert decode_error(model, trained).max() < 0.02
    assert decode_error(model, torch.nn.functional.normalize(unseen, dim=1)).max() < 0.05


def test_the_paper_preset_lowers_its_loss(tmp_path: Path) -> None:
    vectors = draw_task_vectors()
    conditions = torch.stack([vectors.of_task(task)[0] for task in range(3)])
    recipe = make_recipe(generator={"preset": "paper"})
    before = decode_error(build_generator(TINY_LAYOUT, recipe, vectors), conditions).mean()

    model = train(tmp_path, preset="paper", depth=4, width=32, epochs=100, learning_rate=5e-3)

    assert decode_error(model, conditions).mean() < 0.5 * before


@PRESETS
def test_an_untrained_generator_is_the_soup(preset: str) -> None:
    vectors = draw_task_vectors()
    model = build_generator(TINY_LAYOUT, make_recipe(generator={"preset": preset}), vectors)

    with torch.no_grad():
        assert not model.decoder(normal(3, 4), vectors.rows[:3]).any()


def test_the_keys_are_the_tasks_mean_task_vectors() -> None:
    vectors = draw_task_vectors()
    decoder = build_generator(TINY_LAYOUT, make_recipe(), vectors).decoder
    assert isinstance(decoder, TokenDecoder)

    for task, key in enumerate(decoder.task.keys):
        mean = vectors.of_task(task).mean(0)
        torch.testing.assert_close(key, mean / mean.norm())


@PRESETS
def test_the_recipe_determines_the_networks(preset: str) -> None:
    recipe, vectors = make_recipe(generator={"preset": preset}), draw_task_vectors()
    reseeded = recipe.model_copy(update={"seed": 1})
    state = torch.random.get_rng_state()

    first = build_generator(TINY_LAYOUT, recipe, vectors).state_dict()

    assert torch.equal(torch.random.get_rng_state(), state)  # the global one is left alone
    again = build_generator(TINY_LAYOUT, recipe, vectors).state_dict()
    other = build_generator(TINY_LAYOUT, reseeded, vectors).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    log = RunDir.log

    def log_or_die(run: RunDir, **fields: Any) -> None:
        log(run, **fields)
        if fields["step"] == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunDir, "log", log_or_die)


@PRESETS
@pytest.mark.parametrize("stops", [[20], [40], [20, 40], [60]])
def test_a_killed_training_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, stops: list[int]
) -> None:
    monkeypatch.setattr(training.generator, "SAVE_EVERY_STEPS", 7)
    section = {"preset": preset, "epochs": 30}  # 60 steps, logged at 20, 40 and 60
    train(tmp_path / "uninterrupted", **section)

    for stop in stops:
        with monkeypatch.context() as patch:
            interrupt_at(patch, stop)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "killed", **section)
        assert (tmp_path / "killed" / "state" / "generator.safetensors").exists()
        assert not (tmp_path / "killed" / "generator.safetensors").exists()
    train(tmp_path / "killed", **section)

    files = [tmp_path / name / "generator.safetensors" for name in ("uninterrupted", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "killed" / "state" / "generator.safetensors").exists()


def test_training_learns_from_every_task_and_the_seed_matters(tmp_path: Path) -> None:
    first = train(tmp_path / "a", epochs=2).state_dict()
    again = train(tmp_path / "b", epochs=2).state_dict()
    run = RunDir.open(
        tmp_path / "c", make_recipe(generator={"epochs": 2}).model_copy(update={"seed": 1})
    )
    other = train_generator(run, TINY_LAYOUT, draw_checkpoints(), draw_task_vectors())

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["decoder.heads"], other.cpu().state_dict()["decoder.heads"])
    assert (first["decoder.heads"] != 0).any()


def test_the_papers_twelve_layers_learn_more_than_the_mean_adapter(tmp_path: Path) -> None:
    """Under torch's own initialisation a signal is lost on its way through so many layers."""
    train(tmp_path, preset="paper", depth=12, width=16, epochs=150, learning_rate=2e-3)

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["mse"] < 0.5 * lines[0]["mse"]


def test_the_temperature_of_retrieval_is_that_of_leave_one_family_out() -> None:
    """As the baseline `top_k` chooses its own, family by family."""
    vectors, checkpoints = draw_task_vectors(6), draw_checkpoints(6)
    families = dict(zip(checkpoints, "aabbcd", strict=True))
    recipe = make_recipe(generator={"preset": "in_context"}, context={"num_neighbours": 2})
    decoder = build_generator(TINY_LAYOUT, recipe, vectors).decoder
    assert isinstance(decoder, InContextDecoder)
    tasks = TrainingTasks.from_stages(TINY_LAYOUT, checkpoints, vectors, families)
    decoder.set_adapters(tasks.normalizer.normalize(tasks.own_adapters.float()))
    assert recipe.context is not None
    choose_temperature(decoder, vectors, Episodes([*families.values()], recipe.context))
    expected = choose_by_leave_one_out(
        tasks, TEMPERATURES, lambda rest, rows: mix_top_k(rest, rows, 2, TEMPERATURES)
    )
    assert float(decoder.temperature) == pytest.approx(expected)
