"""Tasks by example texts: what the base makes of them becomes a task vector of the bundle's space.

The paper's Eq. 1 describes a task by samples instead of words: the average over N of them of the
frozen base's last hidden state of the last token, `h = 1/N sum_n h_n`. A generator that was trained
on vectors of words cannot read that; but every training task has a vector of either kind, and so
they translate one into the other:

    w_i = softmax_i(cos((h - c) / s, (h_i - c) / s) / temperature)
    v   = sum_i w_i k_i, normalised

`h_i` is the Eq. 1 vector of training task i, `k_i` its mean task vector of words, and `c` the mean
of all `h_i`: raw hidden states share a large common part, beside which the tasks would look alike.
`s` is the standard deviation of samples within a task, so that what says little of the task (a few
dimensions vary more than all others together, with whatever the last token is) counts little.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from service.errors import InvalidBundleError, InvalidInputError

MAX_EXAMPLE_TEXTS = 32
MAX_EXAMPLE_CHARACTERS = 4_000

MAX_EXAMPLE_TOKENS = 256
"""Tokens of an example that the base reads; what follows says little more, and costs as much."""


@dataclass(frozen=True)
class ExampleTexts:
    """Texts that show a task, normalised, so that equal examples give equal adapters.

    Attributes:
        texts: in Unicode's NFC, lines ended by a line feed, without white space around them; in
            their own order, because the order of examples says nothing.
    """

    texts: tuple[str, ...] = field(repr=False)

    @classmethod
    def build(cls, texts: Sequence[str]) -> "ExampleTexts":
        """Normalises what a person sent.

        Raises:
            InvalidInputError: none or too many, or one that is empty, too long or no text.
        """
        if not 1 <= len(texts) <= MAX_EXAMPLE_TEXTS:
            raise InvalidInputError(
                f"a task by example needs 1 to {MAX_EXAMPLE_TEXTS} texts, not {len(texts)}"
            )
        return cls(tuple(sorted(_normalize(number, text) for number, text in enumerate(texts))))

    @property
    def digest(self) -> str:
        """As `digest_examples`."""
        return digest_examples(text.encode() for text in self.texts)


def digest_examples(examples: Iterable[bytes]) -> str:
    """sha256 over the examples' own, in their order; hexadecimal."""
    total = hashlib.sha256()
    for example in examples:
        total.update(hashlib.sha256(example).digest())
    return total.hexdigest()


def _normalize(number: int, text: str) -> str:
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    normalized = unicodedata.normalize("NFC", lines).strip()
    if not normalized:
        raise InvalidInputError(f"examples[{number}] is empty: leave it out")
    if len(normalized) > MAX_EXAMPLE_CHARACTERS:
        raise InvalidInputError(
            f"examples[{number}] has {len(normalized)} characters, at most "
            f"{MAX_EXAMPLE_CHARACTERS} are allowed: send an excerpt"
        )
    try:
        normalized.encode()
    except UnicodeEncodeError:
        raise InvalidInputError(f"examples[{number}] holds half a character: remove it") from None
    return normalized


@dataclass(frozen=True)
class ExampleVectors:
    """What a bundle knows of its training tasks by example.

    Attributes:
        encoder_id: what made the vectors: the base by its digest, and how much it reads.
        vectors: Eq. 1 vector of each training task, in the bundle's order; as the base gives it.
        spread: standard deviation of samples within a task, per dimension.
        nonsense: as `vectors`, of texts that mean nothing, each by itself.
        left_out: sorted evidence (`ExampleTasks.score`) of samples of tasks that were left out.
        temperature: of the softmax over cosines.
    """

    encoder_id: str
    vectors: Float[Tensor, "tasks dim"]
    spread: Float[Tensor, " dim"]
    nonsense: Float[Tensor, "texts dim"]
    left_out: Float[Tensor, " samples"]
    temperature: float

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a file; the encoder's id is kept beside them."""
        return {
            "vectors": self.vectors.float(),
            "spread": self.spread.float(),
            "nonsense": self.nonsense.float(),
            "left_out": self.left_out.float(),
            "temperature": torch.tensor(self.temperature),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], encoder_id: str) -> "ExampleVectors":
        """Reads `state_dict`.

        Raises:
            InvalidBundleError: shapes that do not belong together, or a spread or temperature that
                is not positive.
        """
        vectors, spread, nonsense, left_out = (
            state[each] for each in ("vectors", "spread", "nonsense", "left_out")
        )
        temperature = float(state["temperature"])
        fit = vectors.ndim == nonsense.ndim == 2 and (
            vectors.shape[1:] == nonsense.shape[1:] == spread.shape
        )
        if not fit or left_out.ndim != 1 or temperature <= 0 or not (spread > 0).all():
            raise InvalidBundleError(
                f"example vectors of shapes {[tuple(each.shape) for each in state.values()]}, "
                f"temperature {temperature}"
            )
        return cls(encoder_id, vectors, spread, nonsense, left_out.sort().values, temperature)


class ExampleTasks:
    """Reads the base's hidden state of examples as a bundle's generator reads words.

    Args:
        known: of the training tasks, by example.
        task_vectors: of the training tasks' wordings.
        owner: their tasks.
    """

    def __init__(
        self,
        known: ExampleVectors,
        task_vectors: Float[Tensor, "wordings cond"],
        owner: Int[Tensor, " wordings"],
    ) -> None:
        self.encoder_id = known.encoder_id
        self._temperature = known.temperature
        self._left_out = known.left_out
        self._center, self._spread = known.vectors.mean(0), known.spread
        self._tasks = center_states(known.vectors, self._center, self._spread)
        self._nonsense = center_states(known.nonsense, self._center, self._spread)
        means = [task_vectors[owner == task].mean(0) for task in range(len(known.vectors))]
        self._keys = functional.normalize(torch.stack(means), dim=1)  # [tasks, cond]

    def find_task_vector(self, state: Float[Tensor, " dim"]) -> Float[Tensor, " cond"]:
        """The unit task vector of examples: the words of the training tasks that they resemble."""
        cosine = self._tasks @ center_states(state[None], self._center, self._spread)[0]
        weights = (cosine / self._temperature).softmax(dim=0)
        return functional.normalize(weights @ self._keys, dim=0)

    def score(self, state: Float[Tensor, " dim"]) -> float:
        """How much of a task the examples are, 0 to 1, as `service.synthesis.novelty` does it.

        The share of samples of left-out training tasks with no more evidence. A bundle of one task
        has no other to compare with: everything scores 1. The scale is that of single samples, the
        least that anybody can send.
        """
        if not len(self._left_out):
            return 1.0
        evidence = weigh_evidence(
            center_states(state[None], self._center, self._spread), self._tasks, self._nonsense
        )
        return float((self._left_out <= evidence).float().mean())


def center_states(
    states: Float[Tensor, "n dim"], center: Float[Tensor, " dim"], spread: Float[Tensor, " dim"]
) -> Float[Tensor, "n dim"]:
    """Unit vectors of what hidden states have beside their common part, in units of the spread."""
    return functional.normalize((states - center) / spread, dim=1)


def weigh_evidence(
    states: Float[Tensor, "n dim"],
    tasks: Float[Tensor, "tasks dim"],
    nonsense: Float[Tensor, "texts dim"],
) -> Float[Tensor, " n"]:
    """Similarity to the nearest task less that to the nearest nonsense; all centred."""
    return (states @ tasks.T).amax(1) - (states @ nonsense.T).amax(1)


def merge_task_vectors(
    words: Float[Tensor, " cond"], examples: Float[Tensor, " cond"]
) -> Float[Tensor, " cond"]:
    """The unit mean of a description's task vector and of its examples'."""
    return functional.normalize(words + examples, dim=0)
