"""Checkpoints of training state, as safetensors written atomically."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

_METADATA_KEY = "metadata"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file that is there whole or not at all, whenever we are killed.

    The metadata is one JSON entry of the header: safetensors writes several in random order, and
    equal content must give equal bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {_METADATA_KEY: json.dumps(dict(metadata or {}), sort_keys=True)}
    save_file(contiguous, scratch, metadata=header)
    scratch.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    return load_file(path), read_metadata(path)


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file, without its tensors."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    metadata: dict[str, str] = json.loads(header.get(_METADATA_KEY, "{}"))
    return metadata


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """State of an optimiser as named tensors (`optimizer.<parameter index>.<name>`)."""
    return {
        f"optimizer.{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def write_training_state(path: Path, model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Keeps a model and its optimiser after so many steps."""
    tensors = {**model.state_dict(), **optimizer_tensors(optimizer)}
    write_tensors(path, tensors, {"step": str(step)})


def restore_training_state(path: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Loads `write_training_state` back, where there is one; returns the steps done."""
    if not path.exists():
        return 0
    tensors, metadata = read_tensors(path)
    model.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("optimizer.")})
    restore_optimizer(optimizer, tensors)
    return int(metadata["step"])


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Loads `optimizer_tensors` back into an optimiser of the same parameters."""
    body = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": body["param_groups"]})
