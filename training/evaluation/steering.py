"""Steering margin: what the description's content is worth.

    margin = score under the true description - score under the best of the wrong ones

of adapters generated from each, on the true task's data; higher is better. Wrong ones are other
tasks' descriptions, gibberish, no words, and the same sentence for every task. A generator that
does as well from gibberish has learned the mean task, whatever its scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from service.errors import InvalidInputError
from service.synthesis.novelty import draw_nonsense
from service.synthesis.synthesizer import VECTOR_DTYPE, Synthesizer
from training.evaluation.statistics import Interval, Resampled
from training.evaluation.text import GIBBERISH

WRONG_KINDS = ("other task", "gibberish", "empty", "constant")

CONSTANT = "Perform the task."
"""Says that there is a task, and not which."""

NUM_NONSENSE = 4
"""Random texts beside `GIBBERISH`."""

_SEED = 5


@dataclass(frozen=True)
class SteeringMargin:
    """Margin of one task.

    Attributes:
        margin: with its paired interval; the best wrong description is chosen in each draw.
        best_wrong: kind of the best wrong description.
        scores: best score of each kind.
    """

    margin: Interval
    best_wrong: str
    scores: Mapping[str, float]


def list_wrong_descriptions(
    task: str, descriptions: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Wrong descriptions of a task, by kind.

    Args:
        task: that is meant.
        descriptions: a wording of each task, in any order.
    """
    others = tuple(text for name, text in descriptions.items() if name != task)
    gibberish = (GIBBERISH, *draw_nonsense(NUM_NONSENSE, seed=_SEED))
    return dict(zip(WRONG_KINDS, (others, gibberish, ("",), (CONSTANT,)), strict=True))


def decode_words(synthesizer: Synthesizer, words: str) -> Float[Tensor, " num_params"]:
    """The adapter of any words, with z = 0; also of none, which serving refuses."""
    return synthesizer.decode(synthesizer.encoder.encode([words])[0]).to(VECTOR_DTYPE)


def measure_steering(true: Resampled, wrong: Mapping[str, Sequence[Resampled]]) -> SteeringMargin:
    """Margin from scores on the same draws.

    Args:
        true: score under the true description; higher is better.
        wrong: scores under wrong ones, by kind.

    Raises:
        InvalidInputError: a kind is missing: a margin over fewer controls would look larger.
    """
    if set(wrong) != set(WRONG_KINDS) or not all(wrong.values()):
        raise InvalidInputError(f"a margin needs a wrong description of each: {WRONG_KINDS}")
    scores = {kind: max(each.value for each in wrong[kind]) for kind in WRONG_KINDS}
    best = max(scores, key=lambda kind: scores[kind])
    draws = np.max([each.draws for kind in WRONG_KINDS for each in wrong[kind]], axis=0)
    margin = true - Resampled(scores[best], draws)
    return SteeringMargin(margin.interval(), best, scores)
