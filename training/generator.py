"""Training of the conditional VAE: one generator over all tasks."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from service.inference.base_model import resolve_device
from service.synthesis.cvae import ConditionalVAE
from service.synthesis.generator_config import GeneratorConfig
from service.synthesis.in_context import InContextDecoder
from service.synthesis.layout import AdapterLayout
from service.synthesis.normalizer import AdapterNormalizer
from service.synthesis.token_networks import TokenDecoder
from training.checkpoint import restore_training_state, write_tensors, write_training_state
from training.episodes import Episodes
from training.objective import evaluate_objective
from training.progress import track_job
from training.recipe import Recipe
from training.run_dir import RunDir
from training.schedule import warm_cosine
from training.task_vectors import TaskVectors

SAVE_EVERY_STEPS = 100

TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Candidates for preset `in_context`, in units of cosine."""


def configure_generator(recipe: Recipe, condition_dim: int, num_tasks: int) -> GeneratorConfig:
    """The recipe's networks for a number of tasks and task vectors of a length."""
    section = recipe.generator
    return GeneratorConfig(
        preset=section.preset,
        condition_dim=condition_dim,
        latent_dim=section.latent_dim,
        depth=section.depth,
        width=section.width,
        chunk_size=section.chunk_size,
        num_prototypes=num_tasks,
        attention_temperature=section.attention_temperature,
        **({} if recipe.context is None else {"num_neighbours": recipe.context.num_neighbours}),
    )


def build_generator(
    layout: AdapterLayout, recipe: Recipe, vectors: TaskVectors, seed: int | None = None
) -> ConditionalVAE:
    """The untrained networks, initialised from a seed (the recipe's) and the task vectors."""
    seed = recipe.seed if seed is None else seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = configure_generator(recipe, vectors.dim, vectors.num_tasks)
        model = ConditionalVAE(layout, config)
    if isinstance(model.decoder, TokenDecoder):
        means = [vectors.of_task(task).mean(0) for task in range(vectors.num_tasks)]
        model.decoder.set_keys(torch.stack(means))
    return model


def train_generator(
    run: RunDir,
    layout: AdapterLayout,
    checkpoints: Mapping[str, Float[Tensor, "checkpoints num_params"]],
    vectors: TaskVectors,
    seed: int | None = None,
    families: Sequence[str] = (),
) -> ConditionalVAE:
    """Trains on pairs (late checkpoint, task vector of a random wording) and saves the result.

    An epoch passes once over all checkpoints of all tasks. Weights, order, wordings and noise
    follow from (seed, step) alone: a killed run resumes to the same bytes.

    Args:
        run: where the recipe is from and the result goes.
        layout: of the adapters.
        checkpoints: late checkpoints of each task.
        vectors: task vectors of each task's wordings, tasks in the same order.
        seed: the recipe's where None.
        families: of the tasks in the same order, for episodes; each a family of its own if empty.
    """
    recipe = run.recipe
    seed = recipe.seed if seed is None else seed
    section = recipe.generator
    device = resolve_device("auto")
    model = build_generator(layout, recipe, vectors, seed).to(device)
    normalizer = AdapterNormalizer.fit(layout, checkpoints)
    adapters = normalizer.normalize(torch.cat(list(checkpoints.values()))).to(device)
    tasks = torch.cat([torch.full((len(rows),), i) for i, rows in enumerate(checkpoints.values())])
    if isinstance(model.decoder, InContextDecoder):
        own = torch.stack([rows.mean(0) for rows in checkpoints.values()])
        model.decoder.set_adapters(normalizer.normalize(own))
        model.decoder.shift.requires_grad_(False)  # it is for functional training
    episodes = None
    if recipe.context is not None:
        episodes = Episodes(families or list(checkpoints), recipe.context)
        assert isinstance(model.decoder, InContextDecoder), "[context] is of that preset"
        choose_temperature(model.decoder, vectors, episodes)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=section.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    steps_per_epoch = math.ceil(len(adapters) / section.batch_size)
    num_steps = section.epochs * steps_per_epoch
    path = run.seeded_generator(seed)
    state_path = run.state(path.stem)
    first_step = restore_training_state(state_path, model, optimizer)
    with track_job(run, path.stem, num_steps, every=20) as report:
        for step in range(first_step, num_steps):
            epoch, position = divmod(step, steps_per_epoch)
            order = torch.randperm(len(adapters), generator=_generator(seed, epoch, stream=0))
            chosen = order[position * section.batch_size :][: section.batch_size]
            noise = _generator(seed, step, stream=1)
            condition = draw_wordings(vectors, tasks[chosen], section.wording_noise, noise)
            eps = torch.randn(len(chosen), section.latent_dim, generator=noise)
            for group in optimizer.param_groups:
                group["lr"] = section.learning_rate * warm_cosine(step, num_steps, num_steps // 50)
            condition, eps = condition.to(device), eps.to(device)
            context = {}
            if episodes is not None:
                context["hidden"] = episodes.hide(tasks[chosen], noise).to(device)
            reconstructed, mean, log_variance = model(adapters[chosen], condition, eps, **context)
            objective = evaluate_objective(
                reconstructed, adapters[chosen], mean, log_variance, section.kl_weight
            )
            loss = objective.loss
            if episodes is not None:  # and what serving does: z = 0
                expected = model.decoder(torch.zeros_like(eps), condition, **context)
                loss = loss + (expected - adapters[chosen]).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % SAVE_EVERY_STEPS == 0:
                write_training_state(state_path, model, optimizer, step + 1)
            report(step + 1, mse=objective.reconstruction.item(), kl=objective.kl.item())
    write_tensors(path, model.state_dict())
    state_path.unlink(missing_ok=True)
    return model


@torch.no_grad()
def choose_temperature(decoder: InContextDecoder, vectors: TaskVectors, episodes: Episodes) -> None:
    """Sets the temperature at which retrieval comes nearest to tasks whose family is hidden.

    The error is squared, a mean over the values of normalised own adapters and over wordings.
    """
    device = decoder.adapters.device
    rows, owner = vectors.rows.to(device), vectors.owner
    hidden = episodes.hide_families(owner).to(device)
    errors = []
    for candidate in TEMPERATURES:
        decoder.temperature.fill_(candidate)
        retrieved = decoder.weigh_tasks(rows, hidden) @ decoder.adapters
        errors.append(float((retrieved - decoder.adapters[owner]).square().mean()))
    decoder.temperature.fill_(TEMPERATURES[errors.index(min(errors))])


def draw_wordings(
    vectors: TaskVectors, tasks: Tensor, noise_std: float, generator: torch.Generator
) -> Float[Tensor, "batch dim"]:
    """A task vector per task: a random convex mix of two wordings plus noise, of unit length.

    The mixing and the noise make the decoder smooth between wordings, so that a wording that
    it never saw lands near its task's own.
    """
    rows = []
    for task in tasks.tolist():
        own = vectors.of_task(task)
        first, second = torch.randint(len(own), (2,), generator=generator).tolist()
        share = torch.rand(1, generator=generator)
        rows.append(share * own[first] + (1 - share) * own[second])
    mixed = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    jitter = torch.randn(mixed.shape, generator=generator) * noise_std / mixed.shape[1] ** 0.5
    return torch.nn.functional.normalize(mixed + jitter, dim=1)


def _generator(seed: int, index: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 2 + stream) * 1_000_003 + index)
