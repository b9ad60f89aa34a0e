"""Adapter recipes: everything that determines a generated adapter, and its id."""

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, NotRequired, TypedDict, Unpack

from service.errors import InvalidInputError
from service.synthesis.example_tasks import ExampleTexts, digest_examples
from service.synthesis.refinement import MAX_REFINE_STEPS

MAX_TASK_CHARACTERS = 1000

_REFUSED_CATEGORIES = {
    "Cc": "control",
    "Cs": "surrogate",
    "Co": "private-use",
    "Cn": "unassigned",
}
_DIRECTION_CONTROLS = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
"""Unicode's property Bidi_Control."""


class GenerationMode(StrEnum):
    """Where z comes from: `mode` is the prior's mode (z = 0), `sample` draws z ~ N(0, T^2 I)."""

    MODE = "mode"
    SAMPLE = "sample"


class RecipeOptions(TypedDict):
    """How a task becomes an adapter; what is left out is as `AdapterRecipe._build` has it."""

    bundle_digest: str
    mode: NotRequired[str]
    seed: NotRequired[int]
    temperature: NotRequired[float]
    strength: NotRequired[float]
    refine_steps: NotRequired[int]
    tenant: NotRequired[str]


@dataclass(frozen=True)
class AdapterRecipe:
    """Everything that determines a generated adapter; its sha256 is the adapter's id.

    Attributes:
        tenant: owner; equal words of two tenants give two ids.
        task: normalised description.
        mode: where z comes from.
        seed: of the noise; 0 in mode `mode`.
        temperature: standard deviation of z; 0 in mode `mode`.
        strength: factor on the whole update; 1 is as generated.
        bundle_digest: generator that makes it.
        examples: sha256 of the examples that describe the task: images instead of words, which
            are then empty; texts instead of words or beside them. Empty for a task in words.
        refine_steps: gradient steps on the decoder's code with the example texts
            (`service.synthesis.refinement`).
    """

    tenant: str
    task: str
    mode: GenerationMode
    seed: int
    temperature: float
    strength: float
    bundle_digest: str
    examples: str = ""
    refine_steps: int = 0

    @classmethod
    def build(cls, *, task: str, **options: Unpack[RecipeOptions]) -> "AdapterRecipe":
        """Normalises a request, so that requests for the same adapter get the same id.

        Raises:
            InvalidInputError: an empty or over-long description, or a number out of range.
        """
        return cls._build(normalize_description(task), "", **options)

    @classmethod
    def build_from_images(
        cls, images: Sequence[bytes], **options: Unpack[RecipeOptions]
    ) -> "AdapterRecipe":
        """As `build`, for a task that example images describe: the same files, the same id.

        Raises:
            InvalidInputError: no images, or a number out of range.
        """
        if not images:
            raise InvalidInputError("a task by example needs at least one image")
        return cls._build("", digest_examples(images), **options)

    @classmethod
    def build_from_texts(
        cls, examples: ExampleTexts, *, task: str | None = None, **options: Unpack[RecipeOptions]
    ) -> "AdapterRecipe":
        """As `build`, for a task that example texts describe, with words beside them or without.

        Raises:
            InvalidInputError: words that are empty or too long, or a number out of range.
        """
        words = "" if task is None else normalize_description(task)
        return cls._build(words, examples.digest, **options)

    @classmethod
    def _build(
        cls,
        task: str,
        examples: str,
        *,
        bundle_digest: str,
        mode: str = "mode",
        seed: int = 0,
        temperature: float = 1.0,
        strength: float = 1.0,
        refine_steps: int = 0,
        tenant: str = "public",
    ) -> "AdapterRecipe":
        if mode not in set(GenerationMode):
            raise InvalidInputError(f"mode {mode!r} is unknown: use mode or sample")
        if not 0 <= seed < 2**63:
            raise InvalidInputError("seed must be between 0 and 2^63 - 1")
        if not (math.isfinite(temperature) and 0 < temperature <= 2):
            raise InvalidInputError("temperature must be greater than 0 and at most 2")
        if not (math.isfinite(strength) and 0 < strength <= 4):
            raise InvalidInputError("strength must be greater than 0 and at most 4")
        if not 0 <= refine_steps <= MAX_REFINE_STEPS:
            raise InvalidInputError(f"refine_steps must be between 0 and {MAX_REFINE_STEPS}")
        if refine_steps and not examples:
            raise InvalidInputError("refine_steps needs example texts")
        sampled = mode == GenerationMode.SAMPLE
        return cls(
            tenant=tenant,
            task=task,
            mode=GenerationMode(mode),
            seed=seed if sampled else 0,
            temperature=float(temperature) if sampled else 0.0,
            strength=float(strength),
            bundle_digest=bundle_digest,
            examples=examples,
            refine_steps=refine_steps,
        )

    @cached_property
    def adapter_id(self) -> str:
        """sha256 of the recipe, 64 hexadecimal digits."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary; `examples` and `refine_steps` only where there are some."""
        body = asdict(self)
        for name in ("examples", "refine_steps"):
            if not body[name]:
                del body[name]
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "AdapterRecipe":
        """Reads `to_json`.

        Raises:
            InvalidInputError: malformed.
        """
        try:
            return cls(**{**body, "mode": GenerationMode(body["mode"])})
        except (TypeError, ValueError, KeyError) as error:
            raise InvalidInputError(f"malformed adapter recipe: {error}") from error


def normalize_description(task: str) -> str:
    """Unicode NFKC with white space collapsed.

    Raises:
        InvalidInputError: empty, longer than `MAX_TASK_CHARACTERS`, or with characters that are
            no text: controls, also of direction (they make words look like others), private and
            unassigned ones.
    """
    normalized = " ".join(unicodedata.normalize("NFKC", task).split())
    if not normalized:
        raise InvalidInputError("the task description is empty: say in words what to do")
    if len(normalized) > MAX_TASK_CHARACTERS:
        raise InvalidInputError(
            f"the task description has {len(normalized)} characters, at most "
            f"{MAX_TASK_CHARACTERS} are allowed"
        )
    for character in normalized:
        category = unicodedata.category(character)
        if category in _REFUSED_CATEGORIES or character in _DIRECTION_CONTROLS:
            kind = _REFUSED_CATEGORIES.get(category, "control")
            raise InvalidInputError(
                f"the task description holds the {kind} character U+{ord(character):04X}: remove it"
            )
    return normalized
