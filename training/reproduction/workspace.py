"""The folder of a reproduction: what several rows and tables share is made once."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree

from jaxtyping import Float
from torch import Tensor, nn

from service.errors import InvalidRecipeError
from service.synthesis.bundle import read_bundle
from service.synthesis.synthesizer import VECTOR_DTYPE
from service.synthesis.task_encoder import build_task_encoder
from training.baselines import Baseline, TrainingTasks, build_baseline
from training.baselines.cond_p_diff import CondPDiff
from training.baselines.conditional_vae import ConditionalVaeBaseline
from training.checkpoint import read_metadata, read_tensors, write_tensors
from training.image_vectors import build_image_encoder, encode_pictures
from training.pipeline import Pipeline
from training.recipe import TRAINED_BASE, Recipe
from training.reproduction.variants import Row, adapters_digest
from training.run_dir import RunDir
from training.shipped import BUNDLES_DIR, SUITES
from training.task_vectors import TaskVectors, encode_tasks, encoder_spec

SHIPPED_BUNDLE = BUNDLES_DIR / SUITES["detection"]
"""Whose base the runs use, so that nobody trains it again."""


@dataclass(frozen=True)
class FittedAdapters:
    """What a method gives for every task under one seed, rounded as it is served.

    Attributes:
        vectors: by task.
        params: of the networks that generating needs; 0 where there are none.
        seconds: wall-clock time of the last attempt to fit.
        cpu_seconds: processor time of the same, which pauses do not count in.
    """

    vectors: Mapping[str, Float[Tensor, " num_params"]]
    params: int
    seconds: float
    cpu_seconds: float


@dataclass
class Workspace:
    """Paths of a reproduction.

        adapters/DIGEST/                     run folder of a rank: base, bases, fine-tuned adapters
        task_vectors/DIGEST.safetensors      of training wordings or pictures, and of unseen ones
        generators/DIGEST.SEED/              a generator, finished or not
        vectors/METHOD-DIGEST.SEED.safetensors   what a method gives for every task

    A DIGEST is over what the content depends on, so tables find each other's work.
    """

    root: Path
    _opened: Pipeline | None = field(default=None, init=False, repr=False)

    def open_adapters(self, recipe: Recipe) -> Pipeline:
        """The run of a recipe's adapters, with the shipped base; one at a time is open.

        Raises:
            InvalidRecipeError: the recipe trains another base than the shipped one.
        """
        folder = self.root / "adapters" / adapters_digest(recipe)[:12]
        if self._opened is None or self._opened.run.root != folder:
            run = RunDir.open(folder, recipe)
            if recipe.base.reference == TRAINED_BASE:
                install_base(run)
            self._opened = Pipeline(run)
        return self._opened

    def fit(self, row: Row, seed: int) -> FittedAdapters:
        """What the row's method gives under a seed; read where it was made before."""
        name = f"{row.method}-{row.stage[:12]}.{seed}"
        path = self.root / "vectors" / f"{name}.safetensors"
        if not path.exists():
            wall, processor = time.monotonic(), time.process_time()
            vectors, params = self._fit(row, seed)
            metadata = {
                "params": str(params),
                "seconds": f"{time.monotonic() - wall:.1f}",
                "cpu_seconds": f"{time.process_time() - processor:.1f}",
            }
            rounded = {task: vector.to(VECTOR_DTYPE) for task, vector in vectors.items()}
            write_tensors(path, rounded, metadata)
        kept = read_metadata(path)
        return FittedAdapters(
            read_tensors(path)[0],
            int(kept["params"]),
            float(kept["seconds"]),
            float(kept["cpu_seconds"]),
        )

    def encode(self, recipe: Recipe) -> tuple[TaskVectors, Float[Tensor, "tasks dim"]]:
        """Training task vectors, and of each task the one that an adapter is generated from."""
        path = self.root / "task_vectors" / f"{recipe.stage_digest('tasks', 'encoder')[:12]}"
        path = path.with_suffix(".safetensors")
        if not path.exists():
            vectors, unseen = self._encode(recipe)
            tensors = {"rows": vectors.rows, "owner": vectors.owner, "unseen": unseen}
            write_tensors(path, tensors, {"encoder_id": vectors.encoder_id})
        tensors, metadata = read_tensors(path)
        made = TaskVectors(metadata["encoder_id"], tensors["rows"], tensors["owner"])
        return made, tensors["unseen"]

    def _encode(self, recipe: Recipe) -> tuple[TaskVectors, Tensor]:
        pipeline = self.open_adapters(recipe)
        if recipe.encoder.kind == "open_clip_image":
            assert pipeline.detection is not None
            encoder = build_image_encoder(recipe.encoder)
            return encode_pictures(recipe.encoder, encoder, pipeline.detection)
        vectors = encode_tasks(recipe.encoder, pipeline.tasks, lambda: pipeline.base)
        words = build_task_encoder(encoder_spec(recipe.encoder, recipe.base))
        return vectors, words.encode([task.heldout_descriptions[0] for task in pipeline.tasks])

    def _fit(self, row: Row, seed: int) -> tuple[dict[str, Tensor], int]:
        pipeline = self.open_adapters(row.recipe)
        pipeline.fine_tune_adapters()
        checkpoints = pipeline.read_checkpoints()
        if row.method == "own":
            return {name: kept.mean(0) for name, kept in checkpoints.items()}, 0
        vectors, unseen = self.encode(row.recipe)
        families = dict(zip(checkpoints, pipeline.families, strict=True))
        tasks = TrainingTasks.from_stages(pipeline.bases.layout, checkpoints, vectors, families)
        baseline = self._build(row, seed)
        baseline.fit(tasks, seed)
        made = {
            name: baseline.generate(vector, seed)
            for name, vector in zip(checkpoints, unseen, strict=True)
        }
        return made, count_params(baseline)

    def _build(self, row: Row, seed: int) -> Baseline:
        preset = row.recipe.generator.preset
        if row.method != preset:
            return build_baseline(row.method)
        folder = self.root / "generators" / f"{row.stage[:12]}.{seed}"
        # The paper draws z (Eq. 9); ours are served with z = 0.
        sample = preset == "paper"
        return build_baseline(preset, recipe=row.recipe, sample=sample, folder=folder)


def install_base(run: RunDir) -> None:
    """Puts the shipped bundle's base where the run would train its own.

    Raises:
        InvalidRecipeError: the shipped base was made by another `[detector]` section or seed.
    """
    if (run.base / "model.safetensors").exists():
        return
    shipped = Recipe.model_validate(read_bundle(SHIPPED_BUNDLE).provenance["recipe"])
    if shipped.stage_digest("base", "detector") != run.recipe.stage_digest("base", "detector"):
        raise InvalidRecipeError(
            "the recipe's [base] and [detector] are not those of the shipped base: name a trained "
            "one in base.reference"
        )
    scratch = run.root / ".base.partial"
    copytree(SHIPPED_BUNDLE / "base", scratch, dirs_exist_ok=True)
    scratch.rename(run.base)


def count_params(baseline: Baseline) -> int:
    """Parameters of the networks that generating needs."""
    networks: tuple[nn.Module, ...] = ()
    if isinstance(baseline, ConditionalVaeBaseline):
        networks = (baseline.decoder,)
    elif isinstance(baseline, CondPDiff):
        networks = (baseline.autoencoder.decoder, baseline.denoiser)
    return sum(weight.numel() for network in networks for weight in network.parameters())
