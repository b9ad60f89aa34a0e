"""The trained baselines: they memorise, they follow the task vector, and schedules are exact."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import training.baselines.conditional_vae
from tests.fixtures.kernel import normal
from tests.fixtures.tiny_tasks import draw_tasks
from tests.fixtures.tiny_training import TINY_LAYOUT, open_run
from training.baselines import Baseline, TrainingTasks
from training.baselines.cond_p_diff import (
    CondPDiff,
    build_scheduler,
    embed_timesteps,
    sample_codes,
)
from training.baselines.conditional_vae import ConditionalVaeBaseline
from training.baselines.hypernet import HyperNet
from training.baselines.multi_task import MultiTask
from training.baselines.networks import Sampler, fit_network
from training.baselines.soup import Soup
from training.generator import train_generator
from training.task_vectors import TaskVectors

VECTOR = normal(12, seed=12)


def measure_errors(baseline: Baseline, tasks: TrainingTasks) -> Tensor:
    """Squared error to each task's own adapter, as a share of the soup's."""
    soup = Soup()
    soup.fit(tasks, 0)
    errors = []
    for vectors, own in zip(tasks.task_vectors, tasks.own_adapters.float(), strict=True):
        error = (baseline.generate(vectors[0], 0) - own).square().sum()
        errors.append(error / (soup.generate(vectors[0], 0) - own).square().sum())
    return torch.stack(errors)


def test_an_untrained_hypernetwork_is_the_soup() -> None:
    tasks, untrained, soup = draw_tasks(), HyperNet(width=8, num_steps=0), Soup()
    untrained.fit(tasks, 0)
    soup.fit(tasks, 0)

    assert torch.equal(untrained.generate(VECTOR, 0), soup.generate(VECTOR, 0))


def test_a_hypernetwork_memorises_the_tasks_by_their_task_vectors() -> None:
    tasks, hypernet = draw_tasks(), HyperNet(width=32, depth=1, num_steps=150, learning_rate=1e-2)
    hypernet.fit(tasks, 0)

    assert measure_errors(hypernet, tasks).max() < 0.05


def test_end_to_end_training_lowers_the_task_loss_that_it_is_given() -> None:
    """Each task wants another adapter than its own: the loss alone can say so."""
    tasks = draw_tasks()
    wanted = {name: normal(64, seed=200 + i) for i, name in enumerate(tasks.names)}

    def task_loss(vector: Tensor, task: str, _: torch.Generator) -> Tensor:
        return (vector - wanted[task]).square().mean()

    def measure_loss(hypernet: HyperNet) -> float:
        hypernet.fit(tasks, 0)
        pairs = zip(tasks.names, tasks.task_vectors, strict=True)
        made = ((hypernet.generate(v[0], 0), name) for name, v in pairs)
        return sum(float(task_loss(*each, torch.Generator())) for each in made) / 6

    short = {"width": 32, "depth": 1, "num_steps": 10}
    before = measure_loss(HyperNet(**short))
    after = measure_loss(
        HyperNet(**short, task_loss=task_loss, num_task_steps=300, task_learning_rate=1e-2)
    )

    assert after < 0.2 * before


def test_cond_p_diff_draws_each_tasks_adapter_under_its_task_vector() -> None:
    tasks = draw_tasks()
    diffusion = CondPDiff(
        latent_dim=8,
        depth=2,
        width=16,
        autoencoder_steps=150,
        denoiser_width=32,
        denoiser_depth=2,
        denoiser_steps=200,
        denoiser_batch_size=32,
        learning_rate=1e-2,
        num_inference_steps=50,
    )
    diffusion.fit(tasks, 0)

    assert measure_errors(diffusion, tasks).max() < 0.1
    adapters = tasks.normalizer.normalize(torch.cat(tasks.checkpoints))
    with torch.no_grad():
        lost = diffusion.autoencoder.decode(diffusion.autoencoder.encode(adapters)) - adapters
    share = float(lost.square().sum() / adapters.square().sum())
    assert diffusion.reconstruction_error == pytest.approx(share, rel=1e-3)
    assert share < 0.1
    first, second = (diffusion.generate(tasks.task_vectors[0][0], seed) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_the_sampler_finds_a_code_that_an_exact_denoiser_knows() -> None:
    """Where all codes are one, `eps = (x_t - sqrt(abar_t) code) / sqrt(1 - abar_t)` (Ho et al.)."""
    code = normal(1, 8, seed=3)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0)

    def predict_noise(noisy: Tensor, timesteps: Tensor) -> Tensor:
        share = abar[timesteps][:, None]
        return (noisy - share.sqrt() * code) / (1 - share).sqrt()

    found = sample_codes(predict_noise, normal(1, 8, seed=4), build_scheduler(1000), 100, seed=0)

    torch.testing.assert_close(found, code, atol=1e-4, rtol=0)


def test_the_sampler_draws_the_gaussian_that_an_exact_denoiser_knows() -> None:
    """Of codes `N(mean, std^2)` the noise is known in closed form, and so is what comes out."""
    mean, std = 1.5, 0.5
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0)

    def predict_noise(noisy: Tensor, timesteps: Tensor) -> Tensor:
        share = abar[timesteps][:, None]
        variance = share * std**2 + 1 - share
        return (1 - share).sqrt() * (noisy - share.sqrt() * mean) / variance

    start = normal(4000, 1, seed=4)
    drawn = sample_codes(predict_noise, start, build_scheduler(1000), 1000, seed=0)

    assert float(drawn.mean()) == pytest.approx(mean, abs=5 * std / 4000**0.5)
    assert float(drawn.std()) == pytest.approx(std, rel=5 / 8000**0.5)


def test_noise_is_added_as_ddpm_has_it() -> None:
    clean, noise = normal(3, 8, seed=1), normal(3, 8, seed=2)
    timesteps = torch.tensor([0, 400, 999])
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[[0, 400, 999]]

    noisy = build_scheduler(1000).add_noise(clean, noise, timesteps)

    expected = np.sqrt(abar)[:, None] * clean.numpy() + np.sqrt(1 - abar)[:, None] * noise.numpy()
    np.testing.assert_allclose(noisy.numpy(), expected, atol=1e-5)


def test_timesteps_are_told_apart() -> None:
    embedded = embed_timesteps(torch.arange(1000), 32)

    distances = torch.cdist(embedded, embedded) + torch.eye(1000) * 9
    assert distances.min() > 0.1
    assert torch.equal(embedded[0], torch.cat([torch.ones(16), torch.zeros(16)]))


@pytest.mark.parametrize("preset", ["paper", "token", "in_context"])
def test_a_preset_is_what_training_makes_of_the_tasks(tmp_path: Path, preset: str) -> None:
    run = open_run(tmp_path, generator={"preset": preset, "epochs": 2})
    tasks = draw_tasks(("prose", "code", "news"), checkpoints=2)
    checkpoints = dict(zip(tasks.names, tasks.checkpoints, strict=True))
    owner = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    vectors = TaskVectors("drawn", torch.cat(tasks.task_vectors), owner)
    model = train_generator(run, TINY_LAYOUT, checkpoints, vectors, 5, tasks.families).cpu().eval()

    for sample, z in ((False, torch.zeros(1, 4)), (True, normal(1, 4, seed=9))):
        baseline = ConditionalVaeBaseline(preset, run.recipe, sample)
        baseline.fit(tasks, 5)
        with torch.no_grad():
            expected = tasks.normalizer.denormalize(model.decoder(z, VECTOR[None])[0])
        assert torch.equal(baseline.generate(VECTOR, 9), expected)


def test_a_sampler_pairs_a_tasks_checkpoints_with_its_own_wordings() -> None:
    tasks = draw_tasks()
    sampler, generator = Sampler.build(tasks), torch.Generator().manual_seed(0)

    chosen = sampler.draw_tasks(600, generator)
    rows = sampler.draw_adapters(chosen, generator)
    vectors = sampler.draw_wordings(chosen, generator)

    counts = chosen.bincount()
    assert len(counts) == 6
    assert ((counts - 100).abs() < 40).all()
    owner = [index for index, own in enumerate(tasks.checkpoints) for _ in own]
    assert [owner[row] for row in rows] == chosen.tolist()
    assert set(rows.tolist()) == set(range(len(owner)))
    for index, vector in zip(chosen.tolist(), vectors, strict=True):
        assert (tasks.task_vectors[index] == vector).all(1).any()


def test_a_network_is_trained_with_warm_up_and_decay_to_zero() -> None:
    """Under a constant gradient AdamW's step is the learning rate, so the rates can be read."""
    weight, path = torch.nn.Parameter(torch.zeros(1)), []

    def measure_loss(_generator: torch.Generator) -> Tensor:
        path.append(weight.item())
        return weight.sum()

    fit_network([weight], measure_loss, num_steps=40, learning_rate=0.1, seed=0)

    rates = -np.diff([*path, weight.item()])
    warm = np.minimum(1, np.arange(1, 41) / 2)
    expected = 0.1 * warm * 0.5 * (1 + np.cos(np.pi * np.arange(40) / 40))
    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_the_multi_task_adapter_is_best_for_the_tasks_together() -> None:
    tasks = draw_tasks(("prose", "code", "news"))
    targets = {name: float(index) for index, name in enumerate(tasks.names)}
    baseline = MultiTask(
        lambda vector, task, _: (vector - targets[task]).square().mean(),
        num_steps=400,
        learning_rate=0.05,
    )
    baseline.fit(tasks, 0)
    torch.testing.assert_close(baseline.vector, torch.ones(64), atol=0.2, rtol=0)


def test_a_kept_training_is_resumed_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = draw_tasks()
    recipe = open_run(tmp_path / "run", generator={"epochs": 2}).recipe
    fresh = ConditionalVaeBaseline("token", recipe)
    fresh.fit(tasks, 3)
    kept = ConditionalVaeBaseline("token", recipe, folder=tmp_path / "kept")
    kept.fit(tasks, 3)

    monkeypatch.delattr(training.baselines.conditional_vae, "train_generator")
    again = ConditionalVaeBaseline("token", recipe, folder=tmp_path / "kept")
    again.fit(tasks, 3)

    assert torch.equal(again.generate(VECTOR, 0), fresh.generate(VECTOR, 0))
    assert torch.equal(kept.generate(VECTOR, 0), fresh.generate(VECTOR, 0))
