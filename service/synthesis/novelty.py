"""How much words resemble a task: a score that is calibrated on tasks left out of training.

Similarity to the nearest training task alone does not tell a new task from no task: the nearest
task of "xqv blorft" is as near as that of many an honest request. Nonsense resembles nonsense
more, though. So the evidence is the similarity to the nearest training task less that to the
nearest of a few nonsense texts; and the scale that it is read on is that of real but unseen tasks:
every training task stands in for one, its wordings compared with the other tasks' only.
"""

import random
import string

from jaxtyping import Float, Int
from torch import Tensor

THRESHOLD = 0.05
"""Score from which words are in distribution: 95% of an unseen task's wordings reach it."""

NUM_NONSENSE = 12
"""Nonsense texts to compare with; more tell nonsense apart no better."""

_SEED = 20_261_124
_SIGNS = string.digits + "!#$%&()*+,-./:;<=>?@[]^_{}~"


def draw_nonsense(count: int = NUM_NONSENSE, seed: int = _SEED) -> list[str]:
    """Texts that mean nothing: random letters and random signs in turn."""
    draw = random.Random(seed)
    return [_draw_letters(draw) if i % 2 == 0 else _draw_signs(draw) for i in range(count)]


class NoveltyScale:
    """Reads the evidence for a task on the scale of left-out training tasks.

    Args:
        task_vectors: of the training wordings.
        owner: their tasks.
        nonsense: task vectors of nonsense texts; none where tasks are not described in words:
            then the similarity alone is the evidence.
    """

    def __init__(
        self,
        task_vectors: Float[Tensor, "wordings dim"],
        owner: Int[Tensor, " wordings"],
        nonsense: Float[Tensor, "texts dim"],
    ) -> None:
        self._nonsense = nonsense
        own = owner[:, None] == owner[None, :]
        self._left_out: Float[Tensor, " wordings"] | None = None
        if not own.all():
            nearest = (task_vectors @ task_vectors.T).masked_fill(own, -1.0).amax(1)
            self._left_out = nearest - self._resemble_nonsense(task_vectors)

    def score(self, task_vector: Float[Tensor, " dim"], similarity: float) -> float:
        """Share of left-out tasks' wordings with no more evidence, 0 to 1.

        A bundle of one task has no other to compare with: everything scores 1.

        Args:
            task_vector: of a description.
            similarity: of it to the nearest training task.
        """
        if self._left_out is None:
            return 1.0
        evidence = similarity - self._resemble_nonsense(task_vector[None])
        return float((self._left_out <= evidence).float().mean())

    def _resemble_nonsense(self, vectors: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        if not len(self._nonsense):
            return vectors.new_zeros(len(vectors))
        return (vectors @ self._nonsense.T).amax(1)


def _draw_letters(draw: random.Random) -> str:
    lengths = [draw.randint(2, 9) for _ in range(draw.randint(2, 8))]
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=size)) for size in lengths)


def _draw_signs(draw: random.Random) -> str:
    return "".join(draw.choices(_SIGNS, k=draw.randint(5, 40)))
