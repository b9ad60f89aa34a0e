"""Decode steps: modules with one input compute together what each computes alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from service.synthesis import packed_weight
from service.synthesis.attachment import AdaptedLinear, Attachment
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterLayout
from tests.fixtures.kernel import normal

ROLES = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8}
ROWS = 3


class Attention(nn.Module):
    """The linears of an attention layer; nothing else is needed of it here."""

    def __init__(self) -> None:
        super().__init__()
        for seed, (role, out_features) in enumerate(ROLES.items()):
            linear = nn.Linear(8, out_features, bias=False)
            linear.weight = nn.Parameter(normal(out_features, 8, seed=seed))
            setattr(self, role, linear)


@pytest.fixture
def net() -> Attention:
    return Attention()


def attach(net: Attention) -> Attachment:
    layout = AdapterLayout.from_model(
        net, kind="core", rank=2, alpha=4.0, target_modules=list(ROLES)
    )
    attachment = Attachment(net, AdapterBases.from_model(layout, net))
    attachment.prepare_serving(net)
    return attachment


@pytest.fixture
def attachment(net: Attention) -> Attachment:
    return attach(net)


def draw_vectors(attachment: Attachment, seed: int) -> Tensor:
    return normal(ROWS, attachment.layout.num_params, seed=seed)


@contextmanager
def computing_alone(net: Attention) -> Iterator[None]:
    modules = [module for module in net.modules() if isinstance(module, AdaptedLinear)]
    groups = [module.group for module in modules]
    assert all(group is not None for group in groups)
    for module in modules:
        module.group = None
    yield
    for module, group in zip(modules, groups, strict=True):
        module.group = group


def run(net: Attention, x: Tensor, order: tuple[str, ...] = tuple(ROLES)) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {role: getattr(net, role)(x if role != "o_proj" else x + 1) for role in order}


def check_as_alone(net: Attention, x: Tensor, **options: tuple[str, ...]) -> None:
    together = run(net, x, **options)
    with computing_alone(net):
        torch.testing.assert_close(together, run(net, x, **options), rtol=1e-5, atol=1e-5)


def test_together_is_as_alone(net: Attention, attachment: Attachment) -> None:
    attachment.rows.vectors = draw_vectors(attachment, seed=0)
    for seed in range(3):
        check_as_alone(net, normal(ROWS, 1, 8, seed=seed))


@pytest.mark.parametrize("order", [("k_proj", "q_proj", "v_proj"), ("q_proj", "v_proj", "v_proj")])
def test_modules_may_be_called_in_any_order(
    net: Attention, attachment: Attachment, order: tuple[str, ...]
) -> None:
    attachment.rows.vectors = draw_vectors(attachment, seed=0)
    check_as_alone(net, normal(ROWS, 1, 8), order=order)


def test_a_module_with_another_input_computes_its_own(
    net: Attention, attachment: Attachment
) -> None:
    attachment.rows.vectors = draw_vectors(attachment, seed=0)
    first, second = normal(ROWS, 1, 8, seed=1), normal(ROWS, 1, 8, seed=2)
    run(net, first, order=("q_proj",))
    check_as_alone(net, second, order=("k_proj", "v_proj"))


def test_newly_assigned_vectors_count_at_once(net: Attention, attachment: Attachment) -> None:
    x = normal(ROWS, 1, 8)
    attachment.rows.vectors = draw_vectors(attachment, seed=0)
    run(net, x, order=("q_proj", "k_proj"))
    attachment.rows.vectors = draw_vectors(attachment, seed=1)
    check_as_alone(net, x, order=("v_proj", "q_proj", "k_proj"))


def test_the_same_tensor_assigned_again_counts_with_its_new_values(
    net: Attention, attachment: Attachment
) -> None:
    x = normal(ROWS, 1, 8)
    vectors = draw_vectors(attachment, seed=0)
    attachment.rows.vectors = vectors
    run(net, x)
    vectors.copy_(draw_vectors(attachment, seed=1))
    attachment.rows.vectors = vectors
    check_as_alone(net, x)


def test_training_is_left_to_each_module_and_prompts_are_not(
    net: Attention, attachment: Attachment
) -> None:
    vectors = draw_vectors(attachment, seed=0).requires_grad_()
    attachment.rows.vectors = vectors
    net.q_proj(normal(ROWS, 1, 8)).sum().backward()
    assert vectors.grad is not None
    attachment.rows.vectors = vectors.detach()
    check_as_alone(net, normal(ROWS, 5, 8))


@pytest.mark.parametrize("packs", [True, False])
def test_weights_of_large_models_are_not_packed(
    monkeypatch: pytest.MonkeyPatch, packs: bool
) -> None:
    net = Attention().bfloat16()
    num_bytes = sum(parameter.nbytes for parameter in net.parameters())
    monkeypatch.setattr(packed_weight, "MAX_BYTES", num_bytes if packs else num_bytes - 1)
    attachment = attach(net)
    groups = {each.group for each in net.modules() if isinstance(each, AdaptedLinear)}
    assert [group is not None and group.is_packed for group in groups] == [packs] * 2
    assert isinstance(net.q_proj, AdaptedLinear)
    shares = net.q_proj.weight.untyped_storage().nbytes() > net.q_proj.weight.nbytes
    assert shares is not packs
    attachment.rows.vectors = draw_vectors(attachment, seed=0).bfloat16()
    assert run(net, normal(ROWS, 1, 8).bfloat16())["q_proj"].shape == (ROWS, 1, 8)
