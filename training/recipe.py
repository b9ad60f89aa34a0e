"""Training recipes: one complete, named TOML file per run."""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import InvalidRecipeError
from service.synthesis.layout import AdapterKind

RECIPES_DIR = Path(__file__).parent / "recipes"

DETECTION_SOURCES = ("composites", "coco", "voc")
"""Sources of detection tasks; all others are of text."""

TRAINED_BASE = "bundle:base"
"""Reference of a base that the run itself trains, and that its bundle ships."""


class _Section(BaseModel):
    """A recipe table: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseSection(_Section):
    """`[base]`: the frozen base model."""

    reference: str = Field(description="embedded:..., bundle:base, a folder or a hub id")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    architecture: dict[str, Any] | None = Field(
        default=None,
        description="transformers config for --dry-run where the base itself is out of reach",
    )


class DetectorSection(_Section):
    """`[detector]`: training of the embedded detector that is the run's base."""

    width: int = Field(ge=16, description="d_model of the encoder-decoder")
    layers: int = Field(ge=1, description="encoder layers, and as many decoder layers")
    heads: int = Field(ge=1)
    feed_forward: int = Field(ge=16)
    num_scenes: int = Field(ge=1, description="composited scenes of the base categories")
    num_steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    present_share: float = Field(
        default=0.75, gt=0, le=1, description="rows whose prompt names what is in the scene"
    )
    smoothing_bins: float = Field(default=8.0, ge=0, description="std of location targets")
    cell_weight: float = Field(default=1.0, ge=0, description="of the auxiliary per-cell loss")


class DetectionSection(_Section):
    """`[detection]`: what only runs of detection tasks need."""

    present_share: float = Field(
        default=0.6, gt=0, le=1, description="fine-tuning examples whose scene holds the object"
    )
    own_prompt_share: float = Field(
        default=0.7, gt=0, le=1, description="fine-tuning examples prompted with own wordings"
    )
    smoothing_bins: float = Field(default=8.0, ge=0, description="std of location targets")
    images: Literal["", "conse"] = Field(
        default="", description="encoder of example images that serving offers beside the words"
    )


class TasksSection(_Section):
    """`[tasks]`: where the tasks come from."""

    source: str = Field(
        description="text: domains | families | smoke | folder:PATH | jsonl:PATH | hub:DATASET; "
        "detection: composites | composites:wide | coco:PATH | voc:PATH"
    )
    names: tuple[str, ...] | None = Field(default=None, description="subset; all when absent")


class AdapterSection(_Section):
    """`[adapter]`: parameterisation of the adapters."""

    kind: AdapterKind
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    target_modules: tuple[str, ...] = Field(min_length=1)


class FinetuneSection(_Section):
    """`[finetune]`: one adapter per task, late checkpoints kept."""

    num_windows: int = Field(
        ge=1, description="training examples per task (one epoch): windows, or prompted scenes"
    )
    window_tokens: int = Field(default=64, ge=8, description="text: tokens per window")
    batch_size: int = Field(ge=1, description="examples per optimiser step")
    epochs: int = Field(ge=1)
    checkpoints_per_epoch: int = Field(default=1, ge=1)
    keep_last: int = Field(ge=1, description="late checkpoints kept per task")
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(default=5, ge=0)
    final_learning_rate_share: float = Field(
        default=0.1, ge=0, le=1, description="cosine decay ends at this share of the peak"
    )
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="runs per task")

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch."""
        return self.num_windows // self.batch_size

    @property
    def num_steps(self) -> int:
        """Optimiser steps of a whole run."""
        return self.epochs * self.steps_per_epoch

    @model_validator(mode="after")
    def _check_counts(self) -> "FinetuneSection":
        if self.num_windows % self.batch_size:
            raise ValueError("num_windows must be a multiple of batch_size")
        if self.steps_per_epoch % self.checkpoints_per_epoch:
            raise ValueError("checkpoints_per_epoch must divide the steps of an epoch")
        if self.keep_last > self.epochs * self.checkpoints_per_epoch:
            raise ValueError("keep_last exceeds the number of checkpoints")
        return self


class EncoderSection(_Section):
    """`[encoder]`: what turns a description into a task vector."""

    kind: Literal["open_clip_text", "open_clip_image", "hidden_states"]
    model: str = Field(default="", description="open_clip model, or embedded:minilm-l6-v2")
    pretrained: str = Field(default="", description="open_clip pretrained tag or file")
    num_samples: int = Field(default=16, ge=1, description="hidden_states: samples averaged (N)")


class GeneratorSection(_Section):
    """`[generator]`: the conditional VAE and its training."""

    preset: Literal["paper", "token", "in_context"]
    latent_dim: int = Field(ge=1)
    depth: int = Field(default=12, ge=1, description="convolutional layers each way")
    width: int = Field(ge=1, description="channels (paper: the widest layer)")
    chunk_size: int = Field(default=256, ge=1, description="not paper: values per token at most")
    attention_temperature: float = Field(
        default=0.03, gt=0, description="not paper: of the attention over task vectors, in cosine"
    )
    epochs: int = Field(ge=1, description="passes over all (checkpoint, task) pairs")
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    kl_weight: float = Field(default=0.005, ge=0, description="paper Eq. 8")
    wording_noise: float = Field(
        default=0.0, ge=0, description="std of Gaussian noise on unit task vectors, x sqrt(dim)"
    )


class ContextSection(_Section):
    """`[context]`: what the decoder of preset `in_context` sees of the training tasks."""

    num_neighbours: int = Field(ge=1, description="nearest training tasks that are looked at")
    episode_share: float = Field(
        ge=0, le=1, description="of examples that hide their task's family from the decoder"
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="of each other task being hidden, in every example"
    )


class FunctionalSection(_Section):
    """`[functional]`: training of the generator through the frozen base, after reconstruction."""

    num_steps: int = Field(ge=1, description="of one task each")
    batch_size: int = Field(ge=1, description="training examples of a step")
    learning_rate: float = Field(gt=0)
    behind_description: bool = Field(
        default=False,
        description="text: a training wording stands before every example, as when it is used so; "
        "detection: every example is asked in own wordings, whatever `own_prompt_share` says",
    )
    contrast_weight: float = Field(
        default=0.0, ge=0, description="of the loss by which wrong words may come near true ones"
    )
    contrast_margin: float = Field(
        default=0.1, gt=0, description="by which the adapter of wrong words must be worse, in nats"
    )


class EvaluationSection(_Section):
    """`[evaluation]`: what is trained only to be compared with."""

    generator_seeds: tuple[int, ...] = Field(
        min_length=1, description="seeds of further generators, which no bundle ships"
    )


class ExamplesSection(_Section):
    """`[examples]`: makes the bundle take tasks by example texts."""

    num_samples: int = Field(
        default=16, ge=2, description="training documents that the base reads per task"
    )


class BundleSection(_Section):
    """`[bundle]`: what is handed to serving."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    version: str


class Recipe(_Section):
    """A complete run; see `training/recipes/*.toml`."""

    seed: int = 0
    base: BaseSection
    detector: DetectorSection | None = None
    detection: DetectionSection | None = None
    tasks: TasksSection
    adapter: AdapterSection
    finetune: FinetuneSection
    encoder: EncoderSection
    generator: GeneratorSection
    context: ContextSection | None = None
    functional: FunctionalSection | None = None
    evaluation: EvaluationSection | None = None
    examples: ExamplesSection | None = None
    bundle: BundleSection

    @model_validator(mode="after")
    def _check_base(self) -> "Recipe":
        if (self.detector is not None) != (self.base.reference == TRAINED_BASE):
            raise ValueError(f"[detector] trains the base {TRAINED_BASE!r}: give both or neither")
        is_detection = self.tasks.source.partition(":")[0] in DETECTION_SOURCES
        if is_detection != (self.detection is not None):
            raise ValueError(f"[detection] goes with the sources {', '.join(DETECTION_SOURCES)}")
        if is_detection and self.examples is not None:
            raise ValueError("[examples] goes with tasks of text")
        return self

    @model_validator(mode="after")
    def _check_context(self) -> "Recipe":
        if (self.context is not None) != (self.generator.preset == "in_context"):
            raise ValueError("[context] goes with the generator's preset in_context")
        return self

    @property
    def generator_seeds(self) -> tuple[int, ...]:
        """Seed of the shipped generator, then those of the ones to compare with."""
        return (self.seed, *(self.evaluation.generator_seeds if self.evaluation else ()))

    @property
    def digest(self) -> str:
        """sha256 over the whole recipe."""
        return _digest(self.to_json())

    def stage_digest(self, *sections: str) -> str:
        """sha256 over the seed and the sections that a stage depends on."""
        body = self.to_json()
        return _digest({name: body.get(name) for name in ("seed", *sections)})

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain data, without optional sections that it does not have."""
        body = self.model_dump(mode="json")
        return {name: section for name, section in body.items() if section is not None}


def read_recipe(path: str | Path) -> Recipe:
    """Reads a recipe from a file, or a shipped one by its name (`text-embedded`).

    Raises:
        InvalidRecipeError: no such file, not TOML, an unknown key, a wrong type or value.
    """
    file = Path(path)
    if not file.is_file():  # a folder of that name may be a run of the shipped recipe
        file = RECIPES_DIR / f"{file.name.removesuffix('.toml')}.toml"
    if not file.is_file():
        known = sorted(p.stem for p in RECIPES_DIR.glob("*.toml"))
        raise InvalidRecipeError(f"no recipe {str(path)!r}; shipped recipes: {', '.join(known)}")
    try:
        return Recipe.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRecipeError(f"{file.name} is not valid TOML: {error}") from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors()]
        raise InvalidRecipeError(f"{file.name}: " + "; ".join(lines)) from error


def _digest(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
