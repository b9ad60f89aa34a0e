"""Dry runs: what a recipe would build and cost, without weights, data or training."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from service.inference.base_model import prepare_embedded_model
from service.inference.embedded_detector import GRID, EmbeddedDetector, build_embedded_detector
from service.synthesis.cvae import ConditionalVAE
from service.synthesis.layout import AdapterKind, AdapterLayout
from training.detector_prompts import build_processor
from training.generator import configure_generator
from training.recipe import TRAINED_BASE, Recipe
from training.tasks.cache import default_cache_dir
from training.tasks.composites import read_base_tasks, read_categories
from training.tasks.text_families import read_families

CONDITION_DIMS = {"embedded:minilm-l6-v2": 384, "ViT-B-32": 512, "ViT-L-14": 768}
"""Text embedding sizes of encoders that a dry run should not have to load."""

OPTIMIZER_BYTES = 16
"""float32 weight, gradient and two Adam moments."""

FLORENCE2_PIXELS = 768
"""Side of the picture that Florence-2's processor makes."""

PROMPT_TOKENS = 16
ANSWER_TOKENS = 16
"""Detection: of an example, on average; two boxes with names, or nearly four without."""


@dataclass(frozen=True)
class Estimate:
    """Sizes in numbers or bytes, work in floating-point operations.

    Work counts multiply-adds as two operations: a forward is `2 * parameters` per token; the
    backward through a frozen base, which has no weight gradients, about as much again. A frozen
    image tower sees every picture once for all tasks; that work is not counted.
    """

    base_params: int
    adapter_params: int
    adapter_modules: int
    adapter_bytes: int
    generator_params: int
    decoder_params: int
    finetune_flops_per_task: float
    generator_flops_per_task: float
    finetune_peak_bytes: int
    generator_peak_bytes: int
    checkpoints_bytes_per_task: int
    base_training_flops: float = 0.0

    def render(self, flops_per_second: float, num_tasks: int) -> str:
        """A readable summary; hours are for the given sustained rate."""
        finetune_hours = self.finetune_flops_per_task / flops_per_second / 3600
        generator_hours = self.generator_flops_per_task * num_tasks / flops_per_second / 3600
        rows = [
            ("base parameters", f"{self.base_params:,}"),
            ("adapted modules", f"{self.adapter_modules:,}"),
            ("adapter parameters", f"{self.adapter_params:,}"),
            ("adapter size (float16)", f"{self.adapter_bytes / 1e6:,.2f} MB"),
            ("kept checkpoints per task", f"{self.checkpoints_bytes_per_task / 1e6:,.1f} MB"),
            ("generator parameters", f"{self.generator_params:,}"),
            ("decoder parameters (shipped)", f"{self.decoder_params:,}"),
            ("peak memory, fine-tuning", f"{self.finetune_peak_bytes / 2**30:,.1f} GiB"),
            ("peak memory, generator", f"{self.generator_peak_bytes / 2**30:,.1f} GiB"),
            ("fine-tuning, per task", f"{finetune_hours:,.2f} h"),
            (f"generator, {num_tasks} tasks", f"{generator_hours:,.2f} h"),
        ]
        if self.base_training_flops:
            base_hours = self.base_training_flops / flops_per_second / 3600
            rows.insert(1, ("training of the base", f"{base_hours:,.2f} h"))
        return "\n".join(f"{name:<30} {value:>18}" for name, value in rows)


@dataclass(frozen=True)
class ExampleCost:
    """What one fine-tuning example costs the frozen base.

    Attributes:
        forward_flops: of one pass.
        hidden_rows: hidden states that it makes, over all layers.
        answer_tokens: tokens with logits.
    """

    forward_flops: float
    hidden_rows: int
    answer_tokens: int


def estimate_recipe(recipe: Recipe, num_tasks: int) -> Estimate:
    """Builds base, layout and networks without weights and counts.

    Raises:
        InvalidInputError: a target module that the base does not have, or a rank too large.
        MissingDependencyError: the recipe trains a detector whose image tower is not installed.
        OSError: the base is a hub id that cannot be reached and has no `base.architecture`.
    """
    model = build_meta_model(recipe)
    config = model.config.get_text_config()
    adapter = recipe.adapter
    layout = AdapterLayout.from_model(model, **adapter.model_dump())
    base_params = _count_params(model)
    dim = CONDITION_DIMS.get(recipe.encoder.model, int(config.hidden_size))
    with torch.device("meta"):
        generator = ConditionalVAE(layout, configure_generator(recipe, dim, num_tasks))
    generator_params = _count_params(generator)
    section = recipe.finetune
    cost = measure_example(model, recipe)
    examples = section.num_windows * section.epochs * len(section.seeds)
    weight_bytes = 2 if recipe.base.dtype == "bfloat16" else 4
    # Saved activations: about 16 hidden-size rows a layer, plus float32 logits and gradient.
    hidden = cost.hidden_rows * int(config.hidden_size) * 16 * weight_bytes
    logits = cost.answer_tokens * int(config.vocab_size) * (2 * 4 + weight_bytes)
    vectors = len(section.seeds) * section.keep_last
    generator_flops = 6.0 * _generator_macs(generator, layout)  # forward, and twice backward
    bases = layout.num_params * 2 if adapter.kind is not AdapterKind.LORA else 0
    steps = recipe.detector.num_steps * recipe.detector.batch_size if recipe.detector else 0
    return Estimate(
        base_params=base_params,
        adapter_params=layout.num_params,
        adapter_modules=len(layout.modules),
        adapter_bytes=layout.num_params * 2,
        generator_params=generator_params,
        decoder_params=_count_params(generator.decoder),
        finetune_flops_per_task=2.0 * cost.forward_flops * examples,
        generator_flops_per_task=generator_flops * recipe.generator.epochs * vectors,
        finetune_peak_bytes=base_params * weight_bytes
        + layout.num_params * OPTIMIZER_BYTES
        + bases
        + section.batch_size * (hidden + logits),
        generator_peak_bytes=generator_params * OPTIMIZER_BYTES
        + layout.num_params * 4 * recipe.generator.batch_size * 2 * recipe.generator.depth,
        checkpoints_bytes_per_task=layout.num_params * 4 * vectors,
        base_training_flops=3.0 * cost.forward_flops * steps,  # forward, and twice backward
    )


def count_tasks(recipe: Recipe) -> int:
    """Number of tasks that a recipe's source has; for one that only its data tells, a guess."""
    if recipe.tasks.names:
        return len(recipe.tasks.names)
    kind, _, place = recipe.tasks.source.partition(":")
    match kind:
        case "composites":
            return len(read_categories(wide=place == "wide"))
        case "families":
            return len(read_families())
        case "coco":
            return 80
        case "voc":
            return 20
        case _:
            return 12


def measure_example(model: Any, recipe: Recipe) -> ExampleCost:
    """Cost of a window of text, or of a prompted picture: image tokens, prompt and answer."""
    if recipe.detection is None:
        tokens = recipe.finetune.window_tokens
        layers = int(model.config.num_hidden_layers)
        return ExampleCost(2.0 * _count_params(model) * tokens, tokens * layers, tokens)
    config = model.config.text_config
    language = model.model.language_model
    read = count_image_tokens(model) + PROMPT_TOKENS
    encoder = _count_params(language.encoder.layers) * read
    decoder = _count_params(language.decoder.layers) + config.vocab_size * config.d_model
    rows = read * config.encoder_layers + ANSWER_TOKENS * config.decoder_layers
    return ExampleCost(2.0 * (encoder + decoder * ANSWER_TOKENS), rows, ANSWER_TOKENS)


def count_image_tokens(model: Any) -> int:
    """Tokens that a detector makes of a picture; Florence-2 adds the mean of its grid."""
    if isinstance(model, EmbeddedDetector):
        return GRID * GRID
    side: int = FLORENCE2_PIXELS // math.prod(model.config.vision_config.patch_stride)
    return side * side + 1


def build_meta_model(recipe: Recipe) -> Any:
    """The base's architecture without weights; the embedded detector is small enough as it is.

    Raises:
        MissingDependencyError: the embedded detector's image tower is not installed.
        OSError: a hub id that cannot be reached and has no `base.architecture`.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        Florence2Config,
        Florence2ForConditionalGeneration,
    )

    section = recipe.base
    if section.reference == TRAINED_BASE:
        return _build_detector(recipe)
    if section.architecture is not None:
        fields = dict(section.architecture)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    elif section.reference.startswith("embedded:"):
        folder = prepare_embedded_model(section.reference, default_cache_dir())
        config = AutoConfig.from_pretrained(folder)
    else:
        config = AutoConfig.from_pretrained(section.reference)
    with torch.device("meta"):
        if not isinstance(config, Florence2Config):
            return AutoModelForCausalLM.from_config(config)
        model = Florence2ForConditionalGeneration(config)
    model.tie_weights()
    return model


def _build_detector(recipe: Recipe) -> EmbeddedDetector:
    section = recipe.detector
    assert section is not None, "the recipe's validator lets no such base without its section"
    _, wordings = read_base_tasks()
    return build_embedded_detector(
        build_processor(wordings).tokenizer,
        width=section.width,
        layers=section.layers,
        heads=section.heads,
        feed_forward=section.feed_forward,
    )


def _count_params(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _generator_macs(generator: ConditionalVAE, layout: AdapterLayout) -> float:
    """Multiply-adds of one pass, run on the meta device and counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    config = generator.config
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        generator(
            torch.empty(1, layout.num_params),
            torch.empty(1, config.condition_dim),
            torch.empty(1, config.latent_dim),
        )
    return float(counter.get_total_flops()) / 2
