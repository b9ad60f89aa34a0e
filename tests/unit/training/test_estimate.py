import pytest

from service.synthesis.cvae import ConditionalVAE
from service.synthesis.layout import AdapterLayout
from training.estimate import build_meta_model, estimate_recipe
from training.generator import configure_generator
from training.recipe import read_recipe


def test_counts_are_those_of_the_real_networks() -> None:
    recipe = read_recipe("smoke")
    estimate = estimate_recipe(recipe, num_tasks=4)
    layout = AdapterLayout.from_model(build_meta_model(recipe.base), **recipe.adapter.model_dump())
    real = ConditionalVAE(layout, configure_generator(recipe, 384, 4))

    assert estimate.adapter_params == layout.num_params
    assert estimate.generator_params == sum(p.numel() for p in real.parameters())
    assert estimate.decoder_params == sum(p.numel() for p in real.decoder.parameters())


def test_the_papers_scale_is_counted_without_weights_or_hub() -> None:
    estimate = estimate_recipe(read_recipe("llama3-8b-pile"), num_tasks=6)
    # r (in + out) per module: q is 4096 x 4096, v is 1024 x 4096, 32 layers, r = 2
    assert estimate.adapter_params == 32 * 2 * ((4096 + 4096) + (4096 + 1024))
    assert estimate.base_params == pytest.approx(8.03e9, rel=0.01)
    assert "adapter parameters" in estimate.render(1e12, num_tasks=6)
