"""This project's generators, each preset as a baseline of the others."""

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from service.errors import InvalidInputError
from service.synthesis.normalizer import AdapterNormalizer
from training.baselines.base import TrainingTasks
from training.checkpoint import read_tensors
from training.functional import train_functionally
from training.generator import build_generator, train_generator
from training.recipe import Recipe
from training.run_dir import RunDir
from training.task_vectors import TaskVectors
from training.through_base import ThroughBase


@dataclass
class ConditionalVaeBaseline:
    """The conditional VAE of a recipe, trained on the tasks as `icm-lora train` does it.

    Attributes:
        preset: `paper`, `token` or `in_context`.
        recipe: its sections say how to train; `[generator]` must be of that preset.
        sample: whether z is drawn, as the paper does (Eq. 9), or is 0, as serving does by default.
        through_base: needed where the recipe has a section `[functional]`.
        folder: where the training is kept, and resumed from; None: nothing is kept.
    """

    uses_target: ClassVar[bool] = False

    preset: str
    recipe: Recipe
    sample: bool = False
    through_base: ThroughBase | None = None
    folder: Path | None = None
    decoder: nn.Module = field(init=False, repr=False)
    normalizer: AdapterNormalizer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.recipe.generator.preset != self.preset:
            raise InvalidInputError(
                f"baseline {self.preset!r} needs a recipe of that preset, not "
                f"{self.recipe.generator.preset!r}"
            )
        if (self.through_base is None) != (self.recipe.functional is None):
            raise InvalidInputError("through_base goes with a section [functional] of the recipe")

    @property
    def name(self) -> str:
        """The preset."""
        return self.preset

    def fit(self, tasks: TrainingTasks, seed: int) -> None:
        """Trains, or goes on with a training of the same recipe and seed.

        Raises:
            InvalidRecipeError: the folder holds the generator of another recipe.
        """
        tasks.require_finite()
        counts = torch.tensor([len(rows) for rows in tasks.task_vectors])
        owner = torch.arange(len(counts)).repeat_interleave(counts)
        vectors = TaskVectors("baseline", torch.cat(tasks.task_vectors).float(), owner)
        checkpoints = dict(zip(tasks.names, tasks.checkpoints, strict=True))
        with TemporaryDirectory() as scratch:
            run = RunDir.open(self.folder or Path(scratch), self.recipe)
            path = run.seeded_generator(seed)
            if path.exists():
                model = build_generator(tasks.layout, self.recipe, vectors, seed)
                model.load_state_dict(read_tensors(path)[0])
            else:
                model = train_generator(
                    run, tasks.layout, checkpoints, vectors, seed, tasks.families
                )
            if self.through_base is not None:
                train_functionally(
                    run,
                    model,
                    tasks.normalizer,
                    vectors,
                    tasks.names,
                    tasks.families,
                    self.through_base,
                    seed,
                )
        self.normalizer = tasks.normalizer
        self.decoder = model.decoder.cpu().eval().requires_grad_(False)

    def generate(
        self, task_vector: Float[Tensor, " d_task"], seed: int
    ) -> Float[Tensor, " num_params"]:
        """One decoder pass; the seed draws z where it is drawn."""
        z = torch.zeros(1, self.recipe.generator.latent_dim)
        if self.sample:
            z = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
        return self.normalizer.denormalize(self.decoder(z, task_vector[None].float())[0])
