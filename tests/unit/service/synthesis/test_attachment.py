"""The adapted forward: its update is the expanded delta W, row by row, and nothing else."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from service.synthesis.attachment import (
    FEW_TOKENS,
    AdaptedLinear,
    AdapterRows,
    Attachment,
    initial_vector,
)
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdaptedModule, AdapterKind, AdapterLayout
from tests.fixtures.kernel import PROPERTY, adapt_tiny_net, normal

KINDS = pytest.mark.parametrize("kind", AdapterKind)


def make_adapted_linear(
    kind: AdapterKind,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[AdaptedLinear, AdapterBases]:
    """One linear with random weights, wrapped."""
    linear = nn.Linear(in_features, out_features, dtype=dtype)
    nn.init.normal_(linear.weight)
    module = AdaptedModule("only", in_features, out_features)
    layout = AdapterLayout(kind, rank, 3.0, (module,))
    bases = AdapterBases.from_model(layout, nn.ModuleDict({"only": linear}))
    return AdaptedLinear(linear, module, bases, AdapterRows(layout)), bases


@PROPERTY
@given(st.sampled_from(AdapterKind), st.integers(3, 9), st.integers(3, 9), st.integers(1, 3))
def test_the_update_is_the_expanded_delta_w(
    kind: AdapterKind, in_features: int, out_features: int, rank: int
) -> None:
    adapted, bases = make_adapted_linear(kind, in_features, out_features, rank)
    vector = normal(bases.layout.num_params)
    down, up = bases.expand(vector)["only"]
    delta = bases.layout.scaling * up @ down

    adapted.rows.vectors = vector[None]
    identity = torch.eye(in_features)[None]  # [1, in, in]
    with torch.no_grad():
        update = adapted(identity) - adapted.base(identity)

    torch.testing.assert_close(update[0].T, delta, atol=1e-5, rtol=1e-5)


@KINDS
def test_the_initial_vector_changes_nothing(kind: AdapterKind) -> None:
    net, layout, bases = adapt_tiny_net(kind)
    x = normal(2, 5, 6)
    before = net(x)

    attachment = Attachment(net, bases)
    attachment.rows.vectors = initial_vector(layout, seed=0)[None]

    assert torch.equal(net(x), before)


@KINDS
def test_without_rows_the_base_answers(kind: AdapterKind) -> None:
    net, layout, bases = adapt_tiny_net(kind)
    x = normal(2, 5, 6)
    before = net(x)

    attachment = Attachment(net, bases)
    assert torch.equal(net(x), before)
    attachment.rows.vectors = normal(1, layout.num_params)
    assert not torch.allclose(net(x), before)
    attachment.rows.vectors = None
    assert torch.equal(net(x), before)


@KINDS
def test_a_zero_row_is_the_base_beside_other_adapters(kind: AdapterKind) -> None:
    net, layout, bases = adapt_tiny_net(kind)
    x = normal(3, 5, 6)
    before = net(x)

    attachment = Attachment(net, bases)
    vectors = normal(3, layout.num_params)
    vectors[1] = 0
    attachment.rows.vectors = vectors

    torch.testing.assert_close(net(x)[1], before[1], atol=1e-6, rtol=0)


@KINDS
def test_mixed_rows_equal_single_rows(kind: AdapterKind) -> None:
    net, layout, bases = adapt_tiny_net(kind)
    attachment = Attachment(net, bases)
    vectors, x = normal(4, layout.num_params), normal(4, 5, 6, seed=1)

    attachment.rows.vectors = vectors
    mixed = net(x)

    for row in range(4):
        attachment.rows.vectors = vectors[row : row + 1]
        torch.testing.assert_close(mixed[row : row + 1], net(x[row : row + 1]))


@KINDS
@pytest.mark.parametrize(("rows", "repeat"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_rows_serve_consecutive_inputs(kind: AdapterKind, rows: int, repeat: int) -> None:
    net, layout, bases = adapt_tiny_net(kind)
    attachment = Attachment(net, bases)
    vectors, x = normal(rows, layout.num_params), normal(6, 5, 6, seed=1)

    attachment.rows.vectors = vectors
    shared = net(x)
    attachment.rows.vectors = vectors.repeat_interleave(repeat, dim=0)

    torch.testing.assert_close(shared, net(x))


def test_inputs_that_are_no_multiple_of_the_rows_are_our_bug() -> None:
    net, layout, bases = adapt_tiny_net(AdapterKind.CORE)
    Attachment(net, bases).rows.vectors = normal(2, layout.num_params)

    with pytest.raises(AssertionError, match="3 inputs for 2 adapter rows"):
        net(normal(3, 5, 6))


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6), (4, 2, 5, 6)])
def test_any_number_of_token_dimensions(shape: tuple[int, ...]) -> None:
    net, layout, bases = adapt_tiny_net(AdapterKind.LORA)
    Attachment(net, bases).rows.vectors = normal(4, layout.num_params)
    x = normal(*shape)

    out = net(x)

    assert out.shape == shape
    flat = net(x.reshape(4, -1, 6)).reshape(shape)
    torch.testing.assert_close(out, flat)


@KINDS
def test_gradients_reach_the_vector_and_not_the_base(kind: AdapterKind) -> None:
    net, layout, bases = adapt_tiny_net(kind)
    attachment = Attachment(net, bases)
    vector = nn.Parameter(normal(layout.num_params))

    attachment.rows.vectors = vector[None]
    net(normal(2, 5, 6)).square().sum().backward()

    assert vector.grad is not None
    assert (vector.grad != 0).all()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(parameter.requires_grad for parameter in net.parameters())


@KINDS
def test_detach_puts_the_same_linears_back(kind: AdapterKind) -> None:
    net, layout, bases = adapt_tiny_net(kind)
    before = dict(net.named_modules())
    attachment = Attachment(net, bases)
    attachment.rows.vectors = normal(1, layout.num_params)
    wrapped = net.get_submodule("layers.0.q_proj")

    attachment.detach(net)

    assert isinstance(wrapped, AdaptedLinear)
    assert wrapped.weight is before["layers.0.q_proj"].weight
    assert dict(net.named_modules()) == before


@KINDS
@pytest.mark.parametrize("tokens", [FEW_TOKENS // 2, FEW_TOKENS])  # computed in either dtype
def test_a_bfloat16_base_gets_the_float32_update_rounded(kind: AdapterKind, tokens: int) -> None:
    half, bases = make_adapted_linear(kind, 8, 6, rank=2, dtype=torch.bfloat16)
    vectors, x = normal(2, bases.layout.num_params).bfloat16(), normal(2, tokens, 8).bfloat16()
    half.rows.vectors = vectors
    expected = half.base(x).float()
    for row, vector in enumerate(vectors):
        down, up = bases.expand(vector)["only"]
        expected[row] += x[row].float() @ down.T @ up.T * bases.layout.scaling

    out = half(x)

    assert out.dtype == torch.bfloat16
    error = (out.float() - expected).abs().max() / expected.abs().max()
    assert error < 2 * torch.finfo(torch.bfloat16).eps


@KINDS
def test_wrapping_adds_nothing_to_the_state_dict(kind: AdapterKind) -> None:
    net, _, bases = adapt_tiny_net(kind)
    sizes = sorted(tensor.numel() for tensor in net.state_dict().values())

    Attachment(net, bases)

    assert sorted(tensor.numel() for tensor in net.state_dict().values()) == sizes


def test_initial_vector_is_distributed_as_pefts() -> None:
    size, rank = 400, 16
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=True)
    torch.manual_seed(0)
    theirs = PeftLinear(nn.Linear(size, size), "default", config, r=rank, lora_alpha=rank)
    layout = AdapterLayout(AdapterKind.LORA, rank, rank, (AdaptedModule("m", size, size),))

    ours = layout.unflatten(initial_vector(layout, seed=0))

    lora_a = theirs.lora_A["default"].weight.detach()
    assert ours["m", "lora_A"].shape == lora_a.shape
    for drawn in (ours["m", "lora_A"], lora_a):  # uniform on +-1/sqrt(in): 6,400 values
        bound = 1 / math.sqrt(size)
        assert 0.99 * bound < drawn.abs().max() <= bound
        assert drawn.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert abs(drawn.mean()) < 0.03 * bound
    assert not ours["m", "lora_B"].any()
    assert not theirs.lora_B["default"].weight.any()


def test_initial_vector_follows_from_the_seed() -> None:
    _, layout, _ = adapt_tiny_net(AdapterKind.LORA)

    assert torch.equal(initial_vector(layout, 1), initial_vector(layout, 1))
    assert not torch.equal(initial_vector(layout, 1), initial_vector(layout, 2))


@pytest.mark.parametrize("kind", [AdapterKind.CORE, AdapterKind.LORA_SHARED_A])
def test_initial_vector_of_kinds_without_their_own_a_is_zero(kind: AdapterKind) -> None:
    _, layout, _ = adapt_tiny_net(kind)

    assert not initial_vector(layout, seed=5).any()
