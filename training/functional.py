"""Functional training of the generator: an adapter is judged by what the frozen base does with it.

Reconstruction asks for the weights that a fine-tuning happened to end at; this asks for the loss
that they give. Gradients pass through the frozen base and the attached adapter into the decoder,
which was trained by reconstruction before. Where the decoder looks at training tasks, they are
hidden in the same episodes, so that it learns what helps a task that it cannot look up. A loss of
contrast asks as well that wrong words give a worse adapter: else a good adapter for all tasks,
whatever is said, would do.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from service.synthesis.cvae import ConditionalVAE
from service.synthesis.in_context import InContextDecoder
from service.synthesis.normalizer import AdapterNormalizer
from training.checkpoint import restore_training_state, write_tensors, write_training_state
from training.episodes import Episodes
from training.generator import draw_wordings
from training.progress import track_job
from training.run_dir import RunDir
from training.schedule import warm_cosine
from training.task_vectors import TaskVectors
from training.through_base import ThroughBase

SAVE_EVERY_STEPS = 10

SHIFT_RATE = 50
"""Times the learning rate: what preset `in_context` adds to all adapters, in units of the spread
between tasks. It is not behind a network, which moves an adapter by much more than its weights."""


def train_functionally(
    run: RunDir,
    model: ConditionalVAE,
    normalizer: AdapterNormalizer,
    vectors: TaskVectors,
    names: Sequence[str],
    families: Sequence[str],
    through_base: ThroughBase,
    seed: int,
) -> None:
    """Trains the decoder through the base and saves the generator; equal seeds, equal bytes.

    A step is one task: a wording, z = 0, and a batch of the task's training examples. Tasks come
    in random order, each once before any comes again. With contrast, wrong words are decoded in
    the same episode and measured on the same batch.

    Args:
        run: its recipe says how (`[functional]`); the result goes there.
        model: trained by reconstruction; its decoder is changed.
        normalizer: of that training.
        vectors: task vectors of each task's wordings.
        names: of the tasks, in the same order.
        families: of the tasks, for episodes.
        through_base: loss of an adapter on a task.
        seed: of order, wordings, episodes and batches.
    """
    section, recipe = run.recipe.functional, run.recipe
    assert section is not None, "the recipe has no section [functional]"
    device = through_base.base.device
    decoder = model.decoder.to(device).train()
    episodes = None
    if recipe.context is not None:
        episodes = Episodes(families, recipe.context)
    weights = [weight for name, weight in decoder.named_parameters() if name != "shift"]
    groups = [{"params": weights, "rate": 1.0}]
    if isinstance(decoder, InContextDecoder):
        groups.append({"params": [decoder.shift.requires_grad_()], "rate": SHIFT_RATE})
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
    path = run.functional_generator(seed)
    state_path = run.state(path.stem)
    first_step = restore_training_state(state_path, decoder, optimizer)
    with track_job(run, path.stem, section.num_steps) as report:
        for step in range(first_step, section.num_steps):
            draws = torch.Generator().manual_seed(seed * 1_000_003 + step)
            task = _pick_task(step, len(names), seed)
            condition = draw_wordings(vectors, task, recipe.generator.wording_noise, draws)
            z = torch.zeros(1, recipe.generator.latent_dim, device=device)
            context = {}
            if episodes is not None:
                context["hidden"] = episodes.hide(task, draws).to(device)
            examples = through_base.draw_batch(draws)
            told = [condition]
            if section.contrast_weight:
                told.append(draw_wrong_words(vectors, families, int(task), draws))
            losses = []
            for words in told:
                normalized = decoder(z, words.to(device), **context)[0].cpu()
                vector = normalizer.denormalize(normalized)
                losses.append(through_base.measure(vector, names[int(task)], examples))
            loss = losses[0]
            if section.contrast_weight:
                missing = section.contrast_margin - (losses[1] - losses[0])
                loss = loss + section.contrast_weight * missing.clamp_min(0)
            for group in optimizer.param_groups:
                share = warm_cosine(step, section.num_steps, section.num_steps // 20)
                group["lr"] = section.learning_rate * group["rate"] * share
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % SAVE_EVERY_STEPS == 0:
                write_training_state(state_path, decoder, optimizer, step + 1)
            report(step + 1, loss=losses[0].item())
    write_tensors(path, model.state_dict())
    state_path.unlink(missing_ok=True)


def draw_wrong_words(
    vectors: TaskVectors, families: Sequence[str], task: int, generator: torch.Generator
) -> Float[Tensor, "1 dim"]:
    """A task vector of words that are wrong for a task: a unit row.

    As often as not it is a training wording of a task of another family; else it is of no task, a
    random direction, as those of gibberish are.
    """
    others = [index for index, family in enumerate(families) if family != families[task]]
    is_wording, which = torch.rand(2, generator=generator).tolist()
    if others and is_wording < 0.5:
        rows = vectors.of_task(others[int(which * len(others))])
        return rows[torch.randint(len(rows), (1,), generator=generator)]
    return normalize(torch.randn(1, vectors.dim, generator=generator), dim=1)


def _pick_task(step: int, num_tasks: int, seed: int) -> Tensor:
    """Index `[1]` of the task of a step."""
    turn, position = divmod(step, num_tasks)
    order = torch.Generator().manual_seed(seed * 1_000_003 + turn + 2**40)
    return torch.randperm(num_tasks, generator=order)[position : position + 1]
