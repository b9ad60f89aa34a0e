"""Synthesis: a task description becomes an adapter, the same recipe always the same bytes."""

import contextlib
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from service.errors import IcmLoraError, InvalidAdapterError, InvalidInputError
from service.synthesis.adapter_recipe import AdapterRecipe, GenerationMode, normalize_description
from service.synthesis.bundle import Bundle, read_bundle
from service.synthesis.cvae import Decoder
from service.synthesis.example_tasks import (
    ExampleTasks,
    merge_task_vectors,
)
from service.synthesis.image_encoder import ImageEncoder, build_image_encoder
from service.synthesis.novelty import NoveltyScale, draw_nonsense
from service.synthesis.refinement import Refined, Refinement
from service.synthesis.row_decoding import RowDecoder
from service.synthesis.task_encoder import TaskEncoder, build_task_encoder

if TYPE_CHECKING:
    from PIL.Image import Image

VECTOR_DTYPE = torch.float16
"""Dtype of a generated adapter vector: what is hashed, cached, served and exported."""

Examples = Sequence["Image"] | Float[Tensor, " hidden"]
"""Example images; or what the base makes of example texts, the mean of their hidden states."""

SynthesisOrder = tuple[AdapterRecipe, Examples | None]
"""A recipe and, where it was built from some, its examples."""


@dataclass(frozen=True)
class NearestTask:
    """A training task and its cosine similarity to a description (best wording)."""

    name: str
    similarity: float


@dataclass(frozen=True)
class SynthesizedAdapter:
    """A generated adapter.

    Attributes:
        recipe: what determined it.
        vector: adapter vector, float16 on the CPU.
        nearest: training tasks by falling similarity.
        in_distribution: how much of a task the description is, 0 to 1, on the scale of training
            tasks that are left out (`service.synthesis.novelty`): below `THRESHOLD`, unlike
            anything trained on. Of words with example texts, the lesser of both: nonsense beside
            good examples is still nonsense.
        seconds: time of the stages `encode` and `decode`.
    """

    recipe: AdapterRecipe
    vector: Float[Tensor, " num_params"]
    nearest: tuple[NearestTask, ...]
    in_distribution: float
    seconds: Mapping[str, float]

    @property
    def adapter_id(self) -> str:
        """The recipe's sha256."""
        return self.recipe.adapter_id

    @cached_property
    def vector_sha256(self) -> str:
        """sha256 of the vector's little-endian float16 bytes."""
        return digest_vector(self.vector)


def digest_vector(vector: Float[Tensor, " num_params"]) -> str:
    """sha256 of an adapter vector's bytes, in the dtype in which it is kept."""
    return hashlib.sha256(vector.to(VECTOR_DTYPE).contiguous().numpy().tobytes()).hexdigest()


class Synthesizer:
    """Turns recipes into adapters with a bundle's decoder and its task encoder.

    Each description is decoded alone, so what else is asked for at the same time cannot change
    a bit of the result. Safe to call from several threads.

    Args:
        bundle: the generator.
        encoder: the bundle's encoder of words.
        device: where the decoder runs.
        image_encoder: reads example images, for bundles that take them.

    Attributes:
        example_tasks: reads the hidden state of example texts, for bundles that take them.

    Raises:
        TaskEncoderMismatchError: the encoder is not the one that the bundle was trained with.
    """

    def __init__(
        self,
        bundle: Bundle,
        encoder: TaskEncoder,
        device: str = "cpu",
        image_encoder: ImageEncoder | None = None,
    ) -> None:
        bundle.check_encoder(encoder.encoder_id)
        self.bundle = bundle
        self.encoder = encoder
        self.image_encoder = image_encoder
        self.example_tasks = (
            None
            if bundle.examples is None
            else ExampleTasks(bundle.examples, bundle.task_vectors, bundle.owner)
        )
        nonsense = torch.zeros(0, encoder.dim)
        with contextlib.suppress(InvalidInputError):  # an encoder that reads images only
            nonsense = torch.cat([encoder.encode([text]) for text in draw_nonsense()])
        self._novelty = NoveltyScale(bundle.task_vectors, bundle.owner, nonsense)
        self._device = torch.device(device)
        self._decode = RowDecoder(bundle.decoder.to(self._device))

    def synthesize(
        self, recipe: AdapterRecipe, examples: Examples | None = None
    ) -> SynthesizedAdapter:
        """Generates one recipe's adapter; blocking.

        Args:
            recipe: what to generate.
            examples: of the task, where the recipe was built from some.

        Raises:
            InvalidInputError: the recipe is another bundle's, or the bundle takes no such examples.
            InvalidAdapterError: the result is not finite in float16.
        """
        (result,) = self.synthesize_batch([(recipe, examples)])
        if isinstance(result, IcmLoraError):
            raise result
        return result

    def synthesize_words(self, task: str) -> SynthesizedAdapter:
        """The adapter of a description, everything else as it is by default; blocking.

        Raises: as `synthesize`; InvalidInputError also for an empty or over-long description.
        """
        return self.synthesize(AdapterRecipe.build(task=task, bundle_digest=self.bundle.digest))

    def synthesize_batch(
        self, orders: Sequence[SynthesisOrder]
    ) -> list[SynthesizedAdapter | IcmLoraError]:
        """Generates the adapters of several recipes in one decoder forward; blocking.

        Each is, byte for byte, what it is alone (`row_decoding`). For the same reason each
        description is encoded by itself: the encoder is transformers' and gains little from
        batches on a CPU, so nothing is risked there.

        Args:
            orders: recipes, each with its examples where it was built from some.

        Returns:
            For each order its adapter, or the error that its caller should see (as
            `synthesize` raises); one that fails takes nothing from the others.
        """
        results: list[SynthesizedAdapter | IcmLoraError | None] = [None] * len(orders)
        task_vectors: dict[int, Tensor] = {}
        scores: dict[int, float] = {}
        encode_seconds: dict[int, float] = {}
        for index, (recipe, examples) in enumerate(orders):
            started = time.perf_counter()
            try:
                task_vectors[index], scores[index] = self._read_task(recipe, examples)
            except IcmLoraError as error:
                results[index] = error
            encode_seconds[index] = time.perf_counter() - started
        started = time.perf_counter()
        recipes = [orders[index][0] for index in task_vectors]
        decoded = self._decode_rows(list(task_vectors.values()), recipes)
        decode_seconds = time.perf_counter() - started
        for (index, task_vector), recipe, vector in zip(
            task_vectors.items(), recipes, decoded, strict=True
        ):
            seconds = {"encode": encode_seconds[index], "decode": decode_seconds}
            results[index] = self._finish(recipe, task_vector, scores[index], vector, seconds)
        return [result for result in results if result is not None]

    def _finish(
        self,
        recipe: AdapterRecipe,
        task_vector: Tensor,
        score: float,
        vector: Tensor,
        seconds: Mapping[str, float],
    ) -> SynthesizedAdapter | IcmLoraError:
        if not torch.isfinite(vector).all():
            return InvalidAdapterError("the generated adapter is not finite: lower the strength")
        return SynthesizedAdapter(recipe, vector, self._rank_tasks(task_vector), score, seconds)

    def open_refinement(self, recipe: AdapterRecipe, examples: Examples) -> Refinement:
        """The steps of a recipe's adapter, which begin where `synthesize` ends; blocking.

        Raises: as `synthesize`.
        """
        task_vector, _ = self._read_task(recipe, examples)
        decoder = self.bundle.decoder
        assert isinstance(decoder, Decoder)
        return Refinement(
            decoder,
            self.bundle.normalizer,
            self._draw_z(recipe).to(self._device),
            task_vector.to(self._device),
        )

    def take_refined(self, adapter: SynthesizedAdapter, refined: Refined) -> SynthesizedAdapter:
        """An adapter with the values that its refinement came to.

        Raises:
            InvalidAdapterError: they are not finite in float16.
        """
        vector = self._scale(refined.vector, adapter.recipe.strength).to(VECTOR_DTYPE)
        if not torch.isfinite(vector).all():
            raise InvalidAdapterError("the refined adapter is not finite: ask for fewer steps")
        return replace(adapter, vector=vector)

    def score(self, task: str) -> float:
        """The in-distribution score of a description, 0 to 1.

        Raises:
            InvalidInputError: an empty or over-long description.
        """
        return self._score(self.encoder.encode([normalize_description(task)])[0])

    def similarity(self, task: str) -> float:
        """Cosine of a description to the nearest training wording, -1 to 1.

        Raises:
            InvalidInputError: an empty or over-long description.
        """
        return self._rank_tasks(self.encoder.encode([normalize_description(task)])[0])[0].similarity

    def describe_task(self, name: str) -> str:
        """A training task in words, normalised: the first of its training wordings."""
        task = next(task for task in self.bundle.tasks if task.name == name)
        return normalize_description(task.descriptions[0])

    def _read_task(
        self, recipe: AdapterRecipe, examples: Examples | None
    ) -> tuple[Float[Tensor, " dim"], float]:
        """The task vector of a recipe, and how much of a task it is."""
        if recipe.bundle_digest != self.bundle.digest:
            raise InvalidInputError("the recipe belongs to another bundle")
        if not recipe.examples:
            task_vector = self.encoder.encode([recipe.task])[0]
            return task_vector, self._score(task_vector)
        assert examples is not None, "a recipe of examples came without them"
        if not isinstance(examples, Tensor):
            task_vector = self._encode_images(examples)
            return task_vector, self._score(task_vector)
        known = self.need_example_tasks()
        task_vector, score = known.find_task_vector(examples), known.score(examples)
        if recipe.task:
            words = self.encoder.encode([recipe.task])[0]
            return merge_task_vectors(words, task_vector), min(score, self._score(words))
        return task_vector, score

    def _encode_images(self, images: Sequence["Image"]) -> Float[Tensor, " dim"]:
        if self.image_encoder is None:
            raise InvalidInputError(
                f"bundle {self.bundle.name} has no image encoder: describe the task in words"
            )
        return self.image_encoder.encode_examples(images)

    def need_example_tasks(self) -> ExampleTasks:
        """What reads example texts.

        Raises:
            InvalidInputError: the bundle takes none.
        """
        if self.example_tasks is None:
            raise InvalidInputError(
                f"bundle {self.bundle.name} has no example vectors: describe the task in words"
            )
        return self.example_tasks

    def _score(self, task_vector: Float[Tensor, " dim"]) -> float:
        return self._novelty.score(task_vector, self._rank_tasks(task_vector)[0].similarity)

    def decode(self, task_vector: Float[Tensor, " dim"]) -> Float[Tensor, " num_params"]:
        """The adapter of a task vector: of the mode of z, and strength 1."""
        recipe = AdapterRecipe.build(task="-", bundle_digest=self.bundle.digest)
        return self._decode_rows([task_vector], [recipe])[0]

    def _decode_rows(
        self, task_vectors: Sequence[Tensor], recipes: Sequence[AdapterRecipe]
    ) -> list[Tensor]:
        """Adapter vectors (paper Eq. 9): sample z, decode, denormalise, scale."""
        if not recipes:
            return []
        z = torch.stack([self._draw_z(recipe) for recipe in recipes]).to(self._device)
        condition = torch.stack(list(task_vectors)).to(self._device)
        with torch.inference_mode():
            normalized = self._decode(z, condition).float().cpu()
            vectors = self.bundle.normalizer.denormalize(normalized)
        # A copy each: a view would keep the whole batch in memory for as long as one lives.
        return [
            self._scale(vector, recipe.strength).to(VECTOR_DTYPE, copy=True)
            for vector, recipe in zip(vectors, recipes, strict=True)
        ]

    def _draw_z(self, recipe: AdapterRecipe) -> Tensor:
        size = self.bundle.generator.latent_dim
        if recipe.mode is not GenerationMode.SAMPLE:
            return torch.zeros(size)
        generator = torch.Generator().manual_seed(recipe.seed)
        return torch.randn(1, size, generator=generator)[0] * recipe.temperature

    def _scale(self, vector: Tensor, strength: float) -> Tensor:
        """Scales the update `delta W` by `strength`: all trained factors but `lora_A`."""
        if strength == 1.0:
            return vector
        vector = vector.clone()
        for entry in self.bundle.layout.entries:
            if entry.tensor != "lora_A":
                vector[entry.span] *= strength
        return vector

    def _rank_tasks(self, task_vector: Tensor) -> tuple[NearestTask, ...]:
        similarity = self.bundle.task_vectors @ task_vector  # [wordings]
        best = torch.full((len(self.bundle.tasks),), -1.0)
        best = best.scatter_reduce(0, self.bundle.owner, similarity, "amax")
        order = best.argsort(descending=True).tolist()
        return tuple(NearestTask(self.bundle.tasks[i].name, float(best[i])) for i in order)


def load_synthesizer(folder: Path, device: str = "cpu") -> Synthesizer:
    """Reads a bundle and builds the encoder that it names.

    Raises:
        InvalidBundleError: the bundle cannot be trusted, or its encoder cannot be built.
    """
    return build_synthesizer(read_bundle(folder), device)


def build_synthesizer(
    bundle: Bundle, device: str = "cpu", encoder: TaskEncoder | None = None
) -> Synthesizer:
    """Builds the encoders that a bundle names.

    Args:
        bundle: the generator.
        device: where everything runs.
        encoder: the encoder of words, where it is loaded already (for another bundle).

    Raises:
        InvalidBundleError: an encoder cannot be built, or `encoder` is not the bundle's.
    """
    encoder = encoder or build_task_encoder(bundle.encoder_spec, device)
    images = build_image_encoder(bundle.encoder_spec, encoder)
    return Synthesizer(bundle, encoder, device, images)
