"""PEFT directories: deterministic, invertible for kind `lora`, strict about what they hold."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from service.adapters.peft_format import (
    read_peft_directory,
    write_peft_directory,
    zip_peft_adapter,
)
from service.errors import InvalidAdapterError
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdaptedModule, AdapterKind, AdapterLayout

LAYOUT = AdapterLayout(
    AdapterKind.LORA,
    rank=2,
    alpha=3.0,
    modules=(AdaptedModule("layers.0.q_proj", 8, 6), AdaptedModule("layers.1.q_proj", 8, 4)),
)
BASES = AdapterBases(LAYOUT, {})
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def draw_vector() -> torch.Tensor:
    return torch.randn(LAYOUT.num_params, generator=torch.Generator().manual_seed(0))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors; `__` in a name stands for a dot."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_peft_directory(tmp_path / "new" / "adapter", LAYOUT, BASES, draw_vector(), "some/base")
    return tmp_path / "new" / "adapter"


def test_kind_lora_reads_back_exactly(folder: Path) -> None:
    assert torch.equal(read_peft_directory(folder, LAYOUT), draw_vector())


def test_config_names_exact_modules_and_the_base(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())

    assert config["target_modules"] == ["layers.0.q_proj", "layers.1.q_proj"]
    assert config["base_model_name_or_path"] == "some/base"
    assert (config["r"], config["lora_alpha"]) == (2, 3.0)
    assert "some/base" in (folder / "README.md").read_text()


def test_zip_holds_the_directory_and_is_deterministic(folder: Path) -> None:
    content = zip_peft_adapter(LAYOUT, BASES, draw_vector(), "some/base")

    assert content == zip_peft_adapter(LAYOUT, BASES, draw_vector(), "some/base")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == {
            path.name: path.read_bytes() for path in folder.iterdir()
        }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_written(bad: float, tmp_path: Path) -> None:
    vector = draw_vector()
    vector[-1] = bad
    with pytest.raises(InvalidAdapterError, match="not finite"):
        write_peft_directory(tmp_path, LAYOUT, BASES, vector, "base")
    assert not list(tmp_path.iterdir())


def test_bases_of_another_layout_are_refused(tmp_path: Path) -> None:
    other = AdapterLayout(LAYOUT.kind, LAYOUT.rank, 4.0, LAYOUT.modules)
    with pytest.raises(InvalidAdapterError, match="another adapter layout"):
        write_peft_directory(tmp_path, other, BASES, draw_vector(), "base")


def test_other_kinds_do_not_invert(folder: Path) -> None:
    core = AdapterLayout(AdapterKind.CORE, LAYOUT.rank, LAYOUT.alpha, LAYOUT.modules)
    with pytest.raises(InvalidAdapterError, match="only 'lora' inverts"):
        read_peft_directory(folder, core)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, "r is 4, expected 2"),
        ({"lora_alpha": 16}, "lora_alpha is 16, expected 3.0"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"a_setting_of_tomorrow": 1}, "a_setting_of_tomorrow"),
    ],
)
def test_config_of_more_than_a_plain_lora_is_refused(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(InvalidAdapterError, match=message):
        read_peft_directory(folder, LAYOUT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model__model__layers__0__q_proj__lora_A__weight": None}, "is missing"),
        (
            {"base_model__model__layers__0__q_proj__lora_A__weight": torch.zeros(2, 7)},
            "has shape",
        ),
        (
            {"base_model__model__layers__0__q_proj__lora_A__weight": torch.full((2, 8), torch.nan)},
            "not finite",
        ),
        ({"base_model__model__lm_head__lora_A__weight": torch.zeros(2, 8)}, "does not know"),
        ({"layers__0__q_proj__lora_A__weight": torch.zeros(2, 8)}, "not named as PEFT"),
    ],
)
def test_tensors_that_are_not_the_layouts_are_refused(
    changes: dict[str, torch.Tensor | None], message: str, folder: Path
) -> None:
    edit_weights(folder, **changes)
    with pytest.raises(InvalidAdapterError, match=message):
        read_peft_directory(folder, LAYOUT)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_and_damaged_files_are_refused(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"[")
    with pytest.raises(InvalidAdapterError, match="cannot read"):
        read_peft_directory(folder, LAYOUT)
    (folder / name).unlink()
    with pytest.raises(InvalidAdapterError, match="cannot read"):
        read_peft_directory(folder, LAYOUT)


def test_config_that_is_no_object_is_refused(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")
    with pytest.raises(InvalidAdapterError, match="not a JSON object"):
        read_peft_directory(folder, LAYOUT)
