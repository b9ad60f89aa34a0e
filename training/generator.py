"""Training of the conditional VAE: one generator over all tasks."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from service.synthesis.cvae import ConditionalVAE, GeneratorConfig, TokenDecoder
from service.synthesis.layout import AdapterLayout
from service.synthesis.normalizer import AdapterNormalizer
from training.checkpoint import optimizer_tensors, read_tensors, restore_optimizer, write_tensors
from training.objective import evaluate_objective
from training.progress import track_job
from training.recipe import Recipe
from training.run_dir import RunDir
from training.task_vectors import TaskVectors

SAVE_EVERY_STEPS = 100


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
        model.decoder.task.set_keys(torch.stack(means))
    return model


def train_generator(
    run: RunDir,
    layout: AdapterLayout,
    checkpoints: Mapping[str, Float[Tensor, "checkpoints num_params"]],
    vectors: TaskVectors,
    seed: int | None = None,
) -> ConditionalVAE:
    """Trains on pairs (late checkpoint, task vector of a random wording) and saves the result.

    An epoch passes once over all checkpoints of all tasks. Weights, order, wordings and noise
    follow from (seed, step) alone: a killed run resumes to the same bytes.
    """
    recipe = run.recipe
    seed = recipe.seed if seed is None else seed
    section = recipe.generator
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_generator(layout, recipe, vectors, seed).to(device)
    normalizer = AdapterNormalizer.fit(layout, checkpoints)
    adapters = normalizer.normalize(torch.cat(list(checkpoints.values()))).to(device)
    tasks = torch.cat([torch.full((len(rows),), i) for i, rows in enumerate(checkpoints.values())])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=section.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    steps_per_epoch = math.ceil(len(adapters) / section.batch_size)
    num_steps = section.epochs * steps_per_epoch
    path = run.seeded_generator(seed)
    state_path = run.state(path.stem)
    first_step = 0
    if state_path.exists():
        tensors, metadata = read_tensors(state_path)
        model.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("optimizer.")})
        restore_optimizer(optimizer, tensors)
        first_step = int(metadata["step"])
    with track_job(run, path.stem, num_steps, every=20) as report:
        for step in range(first_step, num_steps):
            epoch, position = divmod(step, steps_per_epoch)
            order = torch.randperm(len(adapters), generator=_generator(seed, epoch, stream=0))
            chosen = order[position * section.batch_size :][: section.batch_size]
            noise = _generator(seed, step, stream=1)
            condition = _draw_wordings(vectors, tasks[chosen], section.wording_noise, noise)
            eps = torch.randn(len(chosen), section.latent_dim, generator=noise)
            for group in optimizer.param_groups:
                group["lr"] = section.learning_rate * _schedule(step, num_steps)
            reconstructed, mean, log_variance = model(
                adapters[chosen], condition.to(device), eps.to(device)
            )
            objective = evaluate_objective(
                reconstructed, adapters[chosen], mean, log_variance, section.kl_weight
            )
            objective.loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % SAVE_EVERY_STEPS == 0:
                state = {**model.state_dict(), **optimizer_tensors(optimizer)}
                write_tensors(state_path, state, {"step": str(step + 1)})
            report(step + 1, mse=objective.reconstruction.item(), kl=objective.kl.item())
    write_tensors(path, model.state_dict())
    state_path.unlink(missing_ok=True)
    return model


def _draw_wordings(
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


def _schedule(step: int, num_steps: int) -> float:
    """Linear warm-up over 2% of the steps, then cosine decay to zero."""
    warm = min(1.0, (step + 1) / max(1, num_steps // 50))
    return warm * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _generator(seed: int, index: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 2 + stream) * 1_000_003 + index)
