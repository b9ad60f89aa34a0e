"""Packed weights multiply as torch does, and only where that pays."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from service.synthesis.packed_weight import (
    PackedLinear,
    PackedWeight,
    can_pack,
    has_bfloat16_products,
    pack_linears,
    widen_activations,
)
from tests.fixtures.kernel import normal


@pytest.mark.parametrize("shape", [(1, 1, 64), (16, 1, 64), (2, 40, 64), (300, 64)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_those_of_torch(shape: tuple[int, ...], has_bias: bool) -> None:
    weight, x = normal(96, 64).bfloat16(), normal(*shape, seed=1).bfloat16()
    bias = normal(96, seed=2).bfloat16() if has_bias else None
    with torch.inference_mode():
        packed = PackedWeight(weight).multiply(x, bias)
        torch.testing.assert_close(packed, functional.linear(x, weight, bias), atol=0.05, rtol=0.02)
        if bias is None and has_bfloat16_products():
            assert torch.equal(packed, functional.linear(x, weight))
        if bias is None:  # rounded once, whatever the CPU multiplies
            exact = functional.linear(x.double(), weight.double())
            torch.testing.assert_close(packed.double(), exact, atol=1e-5, rtol=2**-8)


def test_a_cpu_without_bfloat16_products_multiplies_a_float16_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.synthesis.packed_weight.has_bfloat16_products", lambda: False)
    weight = PackedWeight(normal(96, 64).bfloat16())
    assert weight.is_packed
    for rows in (1, 4, 40):
        x = normal(rows, 64, seed=rows).bfloat16()
        with torch.inference_mode():
            y = weight.multiply(x, normal(96, seed=2).bfloat16())
        exact = functional.linear(x.double(), normal(96, 64).bfloat16().double())
        exact += normal(96, seed=2).bfloat16().double()
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), exact, atol=0.02, rtol=2**-6)


def test_gradients_flow_past_the_packed_weight() -> None:
    x = normal(3, 64).bfloat16().requires_grad_()
    PackedWeight(normal(96, 64).bfloat16()).multiply(x).sum().backward()
    assert x.grad is not None


def test_linears_of_another_dtype_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16())
    pack_linears(model)
    assert [type(layer) for layer in model] == [nn.Linear, PackedLinear]
    assert model[1].weight.dtype == torch.bfloat16
    assert not can_pack(normal(4, 4).half())


def test_float32_is_multiplied_as_it_is() -> None:
    linear = nn.Linear(64, 96)
    model = nn.Sequential(linear)
    pack_linears(model, torch.float32)
    assert type(model[0]) is PackedLinear
    for rows in (1, 4, 40):
        x = normal(rows, 64, seed=rows)
        with torch.inference_mode():
            torch.testing.assert_close(model(x), linear(x), atol=1e-6, rtol=1e-6)


def test_between_float16_copies_a_language_model_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.synthesis.packed_weight.has_bfloat16_products", lambda: False)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16().eval()
    exact = copy.deepcopy(model).float()
    pack_linears(model)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        widen_activations(model)
        logits = model(ids).logits
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, exact(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_model_with_other_linears_keeps_its_dtype() -> None:
    model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4).bfloat16())
    widen_activations(model)
    assert model[1].weight.dtype == torch.bfloat16
