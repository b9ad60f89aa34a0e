"""Frozen bases: against the SVD that defines them, and refused where they do not fit."""

import pytest
import torch
from torch import nn

from service.errors import InvalidAdapterError
from service.synthesis.bases import BASES_DTYPE, AdapterBases
from service.synthesis.layout import AdaptedModule, AdapterKind, AdapterLayout
from tests.fixtures.kernel import adapt_tiny_net, normal

HALF_EPS = torch.finfo(torch.float16).eps


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_core_bases_are_the_best_approximation_of_the_weight(rank: int) -> None:
    net, layout, bases = adapt_tiny_net(AdapterKind.CORE, rank=rank)

    for module in layout.modules:
        weight = net.get_parameter(f"{module.path}.weight").detach()
        left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
        best = left[:, :rank] * sigma[:rank] @ right[:rank]
        down, up = bases.tensors[module.path, "A"].float(), bases.tensors[module.path, "B"].float()
        ours = up @ down * sigma[:rank].mean()
        assert (ours - best).abs().max() <= 4 * HALF_EPS * sigma[0]


def test_core_bases_of_full_rank_give_the_weight_back() -> None:
    net = nn.Sequential(nn.Linear(7, 5))
    layout = AdapterLayout(AdapterKind.CORE, 5, 5.0, (AdaptedModule("0", 7, 5),))
    nn.init.normal_(net[0].weight)

    bases = AdapterBases.from_model(layout, net)

    sigma = torch.linalg.svdvals(net[0].weight.detach())
    product = bases.tensors["0", "B"].float() @ bases.tensors["0", "A"].float() * sigma.mean()
    torch.testing.assert_close(product, net[0].weight.detach(), atol=0.01, rtol=0)


def test_core_rows_are_orthonormal_and_the_gains_average_one() -> None:
    _, layout, bases = adapt_tiny_net(AdapterKind.CORE, rank=3)

    for module in layout.modules:
        down, up = bases.tensors[module.path, "A"].float(), bases.tensors[module.path, "B"].float()
        torch.testing.assert_close(down @ down.T, torch.eye(3), atol=2e-3, rtol=0)
        torch.testing.assert_close(up.norm(dim=0).mean(), torch.tensor(1.0), atol=2e-3, rtol=0)


def test_shared_a_is_gaussian_with_variance_one_over_in() -> None:
    layout = AdapterLayout(AdapterKind.LORA_SHARED_A, 16, 16.0, (AdaptedModule("0", 400, 16),))

    drawn = AdapterBases.from_model(layout, nn.Module(), seed=3).tensors["0", "A"].double()

    assert abs(drawn.mean()) < 4 / drawn.numel() ** 0.5 / 20
    torch.testing.assert_close(drawn.var() * 400, torch.tensor(1.0).double(), atol=0.06, rtol=0)


def test_shared_a_follows_from_the_seed() -> None:
    net, layout, bases = adapt_tiny_net(AdapterKind.LORA_SHARED_A)
    again = AdapterBases.from_model(layout, net, seed=0)
    other = AdapterBases.from_model(layout, net, seed=1)

    for key, tensor in bases.tensors.items():
        assert torch.equal(again.tensors[key], tensor)
        assert not torch.equal(other.tensors[key], tensor)


def test_kind_lora_has_no_bases() -> None:
    _, _, bases = adapt_tiny_net(AdapterKind.LORA)

    assert bases.tensors == {}


@pytest.mark.parametrize("kind", AdapterKind)
def test_state_dict_round_trip(kind: AdapterKind) -> None:
    _, layout, bases = adapt_tiny_net(kind)

    restored = AdapterBases.from_state_dict(layout, bases.state_dict())

    assert restored.tensors.keys() == bases.tensors.keys()
    for key, tensor in bases.tensors.items():
        assert tensor.dtype == BASES_DTYPE
        assert torch.equal(restored.tensors[key], tensor)


@pytest.mark.parametrize("kind", AdapterKind)
def test_expansion_is_the_definition_of_the_kind(kind: AdapterKind) -> None:
    _, layout, bases = adapt_tiny_net(kind)
    vector = normal(layout.num_params)
    trained = layout.unflatten(vector)

    factors = bases.expand(vector)

    assert list(factors) == [module.path for module in layout.modules]
    for path, (down, up) in factors.items():
        match kind:
            case AdapterKind.LORA:
                expected = trained[path, "lora_B"] @ trained[path, "lora_A"]
            case AdapterKind.LORA_SHARED_A:
                expected = trained[path, "lora_B"] @ bases.tensors[path, "A"].float()
            case AdapterKind.CORE:
                core = trained[path, "core"]
                frozen_a, frozen_b = bases.tensors[path, "A"], bases.tensors[path, "B"]
                expected = frozen_b.float() @ core @ frozen_a.float()
        torch.testing.assert_close(up @ down, expected)


@pytest.mark.parametrize("kind", [AdapterKind.CORE, AdapterKind.LORA_SHARED_A])
def test_bases_that_do_not_fit_are_refused(kind: AdapterKind) -> None:
    _, layout, bases = adapt_tiny_net(kind)
    key = ("layers.0.q_proj", "A")
    without = {k: v for k, v in bases.tensors.items() if k != key}

    with pytest.raises(InvalidAdapterError, match="do not match the layout"):
        AdapterBases(layout, without)
    with pytest.raises(InvalidAdapterError, match="do not match the layout"):
        AdapterBases(layout, bases.tensors | {("layers.9.q_proj", "A"): torch.zeros(2, 6)})
    with pytest.raises(InvalidAdapterError, match="has shape"):
        AdapterBases(layout, without | {key: torch.zeros(6, 2)})
    with pytest.raises(InvalidAdapterError, match="not finite"):
        AdapterBases(layout, without | {key: torch.full((2, 6), torch.inf)})
    with pytest.raises(InvalidAdapterError, match="not finite"):  # only once rounded
        AdapterBases(layout, without | {key: torch.full((2, 6), 1e6)})
