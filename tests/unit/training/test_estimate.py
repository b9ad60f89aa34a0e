import pytest

from service.inference.embedded_detector import GRID, EmbeddedDetector
from service.synthesis.cvae import ConditionalVAE
from service.synthesis.layout import AdapterLayout
from tests.fixtures.tiny_training import make_recipe
from training.estimate import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    build_meta_model,
    count_image_tokens,
    count_tasks,
    estimate_recipe,
    measure_example,
)
from training.generator import configure_generator
from training.recipe import Recipe, read_recipe


def test_counts_are_those_of_the_real_networks() -> None:
    recipe = read_recipe("smoke")
    estimate = estimate_recipe(recipe, num_tasks=4)
    layout = AdapterLayout.from_model(build_meta_model(recipe), **recipe.adapter.model_dump())
    real = ConditionalVAE(layout, configure_generator(recipe, 384, 4))

    assert estimate.adapter_params == layout.num_params
    assert estimate.generator_params == sum(p.numel() for p in real.parameters())
    assert estimate.decoder_params == sum(p.numel() for p in real.decoder.parameters())
    assert "training of the base" not in estimate.render(1e12, num_tasks=4)


def test_the_papers_scale_is_counted_without_weights_or_hub() -> None:
    estimate = estimate_recipe(read_recipe("llama3-8b-pile"), num_tasks=6)
    # r (in + out) per module: q is 4096 x 4096, v is 1024 x 4096, 32 layers, r = 2
    assert estimate.adapter_params == 32 * 2 * ((4096 + 4096) + (4096 + 1024))
    assert estimate.base_params == pytest.approx(8.03e9, rel=0.01)
    assert "adapter parameters" in estimate.render(1e12, num_tasks=6)


def test_the_papers_detector_is_counted_without_weights_or_hub() -> None:
    recipe = read_recipe("florence2-coco")
    estimate = estimate_recipe(recipe, num_tasks=80)
    # q and v of 12 encoder layers and, twice each, of 12 decoder layers: 1024 x 1024, r = 2
    assert estimate.adapter_modules == 2 * 36
    assert estimate.adapter_params == 72 * 2 * (1024 + 1024)
    assert estimate.base_params == pytest.approx(0.77e9, rel=0.02)
    assert estimate.checkpoints_bytes_per_task == 50 * 4 * estimate.adapter_params
    assert estimate.base_training_flops == 0

    model = build_meta_model(recipe)
    assert count_image_tokens(model) == 577
    cost = measure_example(model, recipe)
    assert cost.hidden_rows == 12 * (577 + PROMPT_TOKENS) + 12 * ANSWER_TOKENS
    # 12 layers of 12.6 M numbers read 593 tokens, 12 of 16.8 M and the head write 16
    assert cost.forward_flops == pytest.approx(2 * (151e6 * 593 + (202e6 + 53e6) * 16), rel=0.02)
    examples = recipe.finetune.num_windows * 150
    assert estimate.finetune_flops_per_task == 2 * cost.forward_flops * examples


def test_the_embedded_detector_is_trained_first() -> None:
    recipe = read_recipe("detection-embedded")
    estimate = estimate_recipe(recipe, num_tasks=24)
    model = build_meta_model(recipe)
    assert recipe.detector is not None

    assert isinstance(model, EmbeddedDetector)
    assert count_image_tokens(model) == GRID * GRID
    assert len(model.model.language_model.encoder.layers) == recipe.detector.layers
    layers = 3 * recipe.detector.layers  # encoder, decoder, and decoder to encoder
    sides = 2 * recipe.detector.width
    assert estimate.adapter_modules == 2 * layers
    assert estimate.adapter_params == 2 * layers * recipe.adapter.rank * sides
    rows = recipe.detector.num_steps * recipe.detector.batch_size
    assert estimate.base_training_flops == 3 * measure_example(model, recipe).forward_flops * rows
    assert "training of the base" in estimate.render(1e12, num_tasks=24)


def test_every_fine_tuning_seed_is_counted() -> None:
    recipe = make_recipe()
    finetune = recipe.finetune.model_copy(update={"seeds": (0, 1, 2)})
    thrice = recipe.model_copy(update={"finetune": finetune})
    once = estimate_recipe(recipe, num_tasks=2).finetune_flops_per_task
    assert len(recipe.finetune.seeds) == 1
    assert estimate_recipe(thrice, num_tasks=2).finetune_flops_per_task == 3 * once


def with_source(source: str, names: tuple[str, ...] | None = None) -> Recipe:
    detection = read_recipe("florence2-coco")
    tasks = detection.tasks.model_copy(update={"source": source, "names": names})
    return detection.model_copy(update={"tasks": tasks})


@pytest.mark.parametrize(
    ("recipe", "count"),
    [
        (with_source("composites"), 24),
        (with_source("composites:wide"), 42),
        (with_source("coco:/data/coco"), 80),
        (with_source("voc:/data/voc"), 20),
        (with_source("coco:/data/coco", ("sofa", "cat", "car")), 3),
        (make_recipe(), 2),
        (read_recipe("text-embedded"), 12),
        (read_recipe("text-families"), 56),
    ],
)
def test_tasks_are_counted_by_their_source(recipe: Recipe, count: int) -> None:
    assert count_tasks(recipe) == count
