"""Refinement moves a decoder's code towards less loss; its weights stay as they are."""

import pytest
import torch
from torch import Tensor, nn

from service.synthesis.layout import AdapterKind, AdapterLayout
from service.synthesis.normalizer import AdapterNormalizer
from service.synthesis.refinement import Refinement
from tests.fixtures.kernel import adapt_tiny_net, normal, random_decoder

PRESETS = ("paper", "token", "in_context")


def make_decoder(preset: str) -> tuple[nn.Module, AdapterLayout, AdapterNormalizer]:
    _, layout, _ = adapt_tiny_net(AdapterKind.LORA)
    decoder = random_decoder(preset, layout, num_prototypes=4, std=0.3)
    normalizer = AdapterNormalizer(
        normal(layout.num_params, seed=1), torch.full((layout.num_params,), 0.5)
    )
    return decoder, layout, normalizer


def measure(vector: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """A loss that stands in for the base's, and its gradient."""
    return float((vector - target).square().mean()), 2 * (vector - target) / len(vector)


@pytest.mark.parametrize("preset", PRESETS)
def test_steps_lower_the_loss_and_change_no_weight(preset: str) -> None:
    decoder, _, normalizer = make_decoder(preset)
    weights = {name: value.clone() for name, value in decoder.state_dict().items()}
    z, task_vector = torch.zeros(3), normal(16, seed=2)
    with torch.no_grad():
        start = normalizer.denormalize(decoder(z[None], task_vector[None])[0])
        other = normalizer.denormalize(decoder(z[None] + 0.5, normal(1, 16, seed=3))[0])
    first = None
    for _ in range(2):
        refinement = Refinement(decoder, normalizer, z, task_vector)
        torch.testing.assert_close(refinement.vector, start)
        for _ in range(8):
            refinement.step(*measure(refinement.vector, other))
        refined = refinement.finish(measure(refinement.vector, other)[0])
        assert first is None or torch.equal(refined.vector, first)
        first = refined.vector
    assert refined.steps == 8
    assert refined.loss_before == measure(start, other)[0]
    assert refined.loss_after < 0.9 * refined.loss_before
    assert refined.loss_after == measure(refined.vector, other)[0]
    assert all(parameter.grad is None for parameter in decoder.parameters())
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, weights[name])


def test_steps_that_help_nothing_leave_the_adapter_as_generated() -> None:
    decoder, _, normalizer = make_decoder("token")
    refinement = Refinement(decoder, normalizer, torch.zeros(3), normal(16, seed=2))
    generated = refinement.vector
    for loss in (1.0, 1.5, 1.2):
        refinement.step(loss, normal(len(generated), seed=4))
    refined = refinement.finish(2.0)
    assert (refined.steps, refined.loss_before, refined.loss_after) == (3, 1.0, 1.0)
    assert torch.equal(refined.vector, generated)
