"""Dry runs: what a recipe would build and cost, without weights, data or training."""

from dataclasses import dataclass
from typing import Any

import torch

from service.inference.base_model import prepare_embedded_model
from service.synthesis.cvae import ConditionalVAE
from service.synthesis.layout import AdapterKind, AdapterLayout
from training.generator import configure_generator
from training.recipe import BaseSection, Recipe
from training.tasks.cache import default_cache_dir

CONDITION_DIMS = {"embedded:minilm-l6-v2": 384, "ViT-B-32": 512, "ViT-L-14": 768}
"""Text embedding sizes of encoders that a dry run should not have to load."""

OPTIMIZER_BYTES = 16
"""float32 weight, gradient and two Adam moments."""


@dataclass(frozen=True)
class Estimate:
    """Sizes in numbers or bytes, work in floating-point operations.

    Work counts multiply-adds as two operations: a forward is `2 * parameters` per token; the
    backward through a frozen base, which has no weight gradients, about as much again.
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
        return "\n".join(f"{name:<30} {value:>18}" for name, value in rows)


def estimate_recipe(recipe: Recipe, num_tasks: int) -> Estimate:
    """Builds base, layout and networks on the meta device and counts.

    Raises:
        InvalidInputError: a target module that the base does not have, or a rank too large.
        OSError: the base is a hub id that cannot be reached and has no `base.architecture`.
    """
    model = build_meta_model(recipe.base)
    adapter = recipe.adapter
    layout = AdapterLayout.from_model(model, **adapter.model_dump())
    base_params = sum(p.numel() for p in model.parameters())
    dim = CONDITION_DIMS.get(recipe.encoder.model, int(model.config.hidden_size))
    with torch.device("meta"):
        generator = ConditionalVAE(layout, configure_generator(recipe, dim, num_tasks))
    generator_params = sum(p.numel() for p in generator.parameters())
    decoder_params = sum(p.numel() for p in generator.decoder.parameters())
    section = recipe.finetune
    tokens = section.num_windows * section.window_tokens * section.epochs
    batch_tokens = section.batch_size * section.window_tokens
    weight_bytes = 2 if recipe.base.dtype == "bfloat16" else 4
    layers = int(model.config.num_hidden_layers)
    # Saved activations: about 16 hidden-size rows a layer, plus float32 logits and gradient.
    hidden = batch_tokens * int(model.config.hidden_size) * layers * 16 * weight_bytes
    logits = batch_tokens * int(model.config.vocab_size) * (2 * 4 + weight_bytes)
    vectors = len(section.seeds) * section.keep_last
    generator_flops = 6.0 * _generator_macs(generator, layout)  # forward, and twice backward
    bases = layout.num_params * 2 if adapter.kind is not AdapterKind.LORA else 0
    return Estimate(
        base_params=base_params,
        adapter_params=layout.num_params,
        adapter_modules=len(layout.modules),
        adapter_bytes=layout.num_params * 2,
        generator_params=generator_params,
        decoder_params=decoder_params,
        finetune_flops_per_task=4.0 * base_params * tokens,
        generator_flops_per_task=generator_flops * recipe.generator.epochs * vectors,
        finetune_peak_bytes=base_params * weight_bytes
        + layout.num_params * OPTIMIZER_BYTES
        + bases
        + hidden
        + logits,
        generator_peak_bytes=generator_params * OPTIMIZER_BYTES
        + layout.num_params * 4 * recipe.generator.batch_size * 2 * recipe.generator.depth,
        checkpoints_bytes_per_task=layout.num_params * 4 * vectors,
    )


def build_meta_model(section: BaseSection) -> Any:
    """The base's architecture without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if section.architecture is not None:
        fields = dict(section.architecture)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    elif section.reference.startswith("embedded:"):
        folder = prepare_embedded_model(section.reference, default_cache_dir())
        config = AutoConfig.from_pretrained(folder)
    else:
        config = AutoConfig.from_pretrained(section.reference)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


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
