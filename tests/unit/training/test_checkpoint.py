"""Checkpoints: whole or absent, and an optimiser goes on as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import training.checkpoint
from tests.fixtures.kernel import normal
from training.checkpoint import (
    optimizer_tensors,
    read_tensors,
    restore_optimizer,
    write_tensors,
    write_text,
)


def test_tensors_and_metadata_round_trip(tmp_path: Path) -> None:
    tensors = {
        "float": normal(2, 3),
        "bfloat16": normal(3).bfloat16(),
        "integers": torch.arange(4),
        "scalar": torch.tensor(2.0),
        "view": normal(4, 4).T[1:, ::2],
        "trained": nn.Parameter(normal(2)),
    }

    write_tensors(tmp_path / "new" / "folder" / "x.safetensors", tensors, {"step": "7"})
    restored, metadata = read_tensors(tmp_path / "new" / "folder" / "x.safetensors")

    assert metadata == {"step": "7"}
    assert restored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert restored[name].dtype == tensor.dtype
        assert torch.equal(restored[name], tensor)


def test_tensors_without_metadata(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})

    assert read_tensors(tmp_path / "x.safetensors")[1] == {}


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_tensors(tmp_path / name, {"a": normal(3), "b": normal(2)}, {"x": "1", "y": "2"})

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("existing", [True, False])
def test_a_write_that_dies_half_way_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    path = tmp_path / "x.safetensors"
    if existing:
        write_tensors(path, {"a": torch.ones(2)})

    def write_half(tensors: dict[str, Tensor], target: Path, metadata: Any) -> None:
        body = safetensors.torch.save(tensors, metadata)
        Path(target).write_bytes(body[: len(body) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.checkpoint, "save_file", write_half)
        with pytest.raises(KeyboardInterrupt):
            write_tensors(path, {"a": torch.zeros(2)})

    assert path.exists() == existing
    if existing:
        assert torch.equal(read_tensors(path)[0]["a"], torch.ones(2))
    write_tensors(path, {"a": torch.full((2,), 3.0)})  # the next attempt is not in the way
    assert torch.equal(read_tensors(path)[0]["a"], torch.full((2,), 3.0))
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_text_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "notes.json"

    write_text(path, "first\n")
    write_text(path, "zweite Fassung: größer\n")

    assert path.read_text(encoding="utf-8") == "zweite Fassung: größer\n"
    assert [file.name for file in path.parent.iterdir()] == ["notes.json"]


def make_training(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.98))


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        model(normal(8, 4, seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_restored_optimiser_continues_bit_for_bit(tmp_path: Path, stop: int) -> None:
    model, optimizer = make_training()
    take_steps(model, optimizer, range(10))

    first, first_optimizer = make_training()
    take_steps(first, first_optimizer, range(stop))
    write_tensors(tmp_path / "x", first.state_dict() | optimizer_tensors(first_optimizer))
    second, second_optimizer = make_training(seed=1)
    tensors, _ = read_tensors(tmp_path / "x")
    second.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("optimizer.")})
    restore_optimizer(second_optimizer, tensors)
    take_steps(second, second_optimizer, range(stop, 10))

    for ours, uninterrupted in zip(second.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, uninterrupted)
    ours, uninterrupted = optimizer_tensors(second_optimizer), optimizer_tensors(optimizer)
    assert ours.keys() == uninterrupted.keys()
    assert all(torch.equal(ours[name], uninterrupted[name]) for name in ours)


def test_optimiser_tensors_are_named_by_parameter(tmp_path: Path) -> None:
    model, optimizer = make_training()
    assert optimizer_tensors(optimizer) == {}
    take_steps(model, optimizer, range(1))

    names = {
        f"optimizer.{index}.{name}"
        for index in range(4)
        for name in ("step", "exp_avg", "exp_avg_sq")
    }
    assert optimizer_tensors(optimizer).keys() == names


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam])
def test_restoring_keeps_the_settings_of_the_new_optimiser(
    make: Callable[..., torch.optim.Optimizer],
) -> None:
    old = make([nn.Parameter(torch.ones(2))], lr=0.5)
    old.param_groups[0]["params"][0].sum().backward()
    old.step()
    new = make([nn.Parameter(torch.ones(2))], lr=0.1)

    restore_optimizer(new, optimizer_tensors(old))

    assert new.param_groups[0]["lr"] == 0.1
