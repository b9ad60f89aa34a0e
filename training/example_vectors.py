"""What a bundle knows of its text tasks by example: fitted to training documents alone."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from service.errors import InvalidTaskDataError
from service.inference.base_model import BaseModel
from service.synthesis.example_tasks import (
    MAX_EXAMPLE_CHARACTERS,
    MAX_EXAMPLE_TOKENS,
    ExampleVectors,
    center_states,
    weigh_evidence,
)
from service.synthesis.novelty import draw_nonsense
from service.synthesis.task_encoder import HiddenStateEncoder
from training.tasks.text import TextTask

TEMPERATURES = tuple(10 ** (exponent / 20) for exponent in range(-40, 1))
"""0.01 to 1: those that are tried."""


def encode_examples(base: BaseModel, tasks: Sequence[TextTask], num_samples: int) -> ExampleVectors:
    """Reads samples of every task with the base, which must have no adapter, and fits to them.

    A sample is the beginning of a training document; the documents are spread over all of a task's.

    Raises:
        InvalidTaskDataError: a task has only one document, so that none can be left out.
    """
    encoder = HiddenStateEncoder(base.model, base.tokenizer, base.digest, MAX_EXAMPLE_TOKENS)
    samples = [encoder.read_states(_choose_samples(task, num_samples)) for task in tasks]
    return fit_examples(encoder.encoder_id, samples, encoder.read_states(draw_nonsense()))


def fit_examples(
    encoder_id: str,
    samples: Sequence[Float[Tensor, "_ dim"]],
    nonsense: Float[Tensor, "texts dim"],
) -> ExampleVectors:
    """Vectors of tasks from the hidden states of their samples, two or more of each.

    Args:
        encoder_id: what made the states.
        samples: of each task.
        nonsense: of texts that mean nothing.
    """
    return ExampleVectors(
        encoder_id,
        vectors=_average(samples),
        spread=_measure_spread(samples),
        nonsense=nonsense,
        left_out=measure_left_out(samples, nonsense),
        temperature=choose_temperature(samples),
    )


def choose_temperature(samples: Sequence[Float[Tensor, "_ dim"]]) -> float:
    """The temperature at which a sample that was left out names its own task best.

    Every sample in turn is what somebody sends; its task's vector and the centre are made without
    it (the spread, over all samples of all tasks, is not). The least mean of `-log w` of the right
    task wins, so weights are as sure as they are right. A single sample is the least that anybody
    can send: more of them are right more often than they are sure.
    """
    cosines, owners = [], []
    vectors, spread = _average(samples), _measure_spread(samples)
    for owner, rows in enumerate(samples):
        for number, row in enumerate(rows):
            rest = torch.cat([rows[:number], rows[number + 1 :]])
            others = vectors.clone()
            others[owner] = rest.mean(0)
            center = others.mean(0)
            cosines.append(
                center_states(others, center, spread) @ center_states(row[None], center, spread)[0]
            )
            owners.append(owner)
    stacked, wanted = torch.stack(cosines), torch.tensor(owners)
    losses = [float(functional.cross_entropy(stacked / each, wanted)) for each in TEMPERATURES]
    return TEMPERATURES[losses.index(min(losses))]


def measure_left_out(
    samples: Sequence[Float[Tensor, "_ dim"]], nonsense: Float[Tensor, "texts dim"]
) -> Float[Tensor, " samples"]:
    """Sorted evidence of samples whose task is left out; none where there is one task only."""
    vectors = _average(samples)
    evidence = [nonsense.new_zeros(0)]
    for owner, rows in enumerate(samples):
        others = torch.cat([vectors[:owner], vectors[owner + 1 :]])
        if len(others):
            center = others.mean(0)
            spread = _measure_spread([*samples[:owner], *samples[owner + 1 :]])
            evidence.append(
                weigh_evidence(
                    center_states(rows, center, spread),
                    center_states(others, center, spread),
                    center_states(nonsense, center, spread),
                )
            )
    return torch.cat(evidence).sort().values


def _average(samples: Sequence[Tensor]) -> Float[Tensor, "tasks dim"]:
    """Eq. 1 of every task."""
    return torch.stack([rows.mean(0) for rows in samples])


def _measure_spread(samples: Sequence[Tensor]) -> Float[Tensor, " dim"]:
    """Standard deviation of samples around their own task's mean, tasks alike."""
    variance = torch.stack([rows.var(0, unbiased=False) for rows in samples]).mean(0)
    spread = variance.sqrt()
    return spread.clamp_min(0.01 * float(spread.mean()) + 1e-6)  # what never varies is not all


def _choose_samples(task: TextTask, count: int) -> list[str]:
    documents = list(dict.fromkeys(text.strip()[:MAX_EXAMPLE_CHARACTERS] for text in task.train))
    if len(documents) < 2:
        raise InvalidTaskDataError(
            f"task {task.name!r} has one training document: tasks by example need two or more"
        )
    count = min(count, len(documents))
    return [documents[number * len(documents) // count] for number in range(count)]
