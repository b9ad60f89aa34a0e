"""Adapters as PEFT LoRA directories: the exchange format that other tools read.

Every adapter kind expands to plain LoRA factors, so what is written here loads with
`peft.PeftModel.from_pretrained(base, folder)` and gives the logits of our own forward.
Modules are named by their exact paths and weights are safetensors, never pickle.
"""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from service.errors import InvalidAdapterError
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterKind, AdapterLayout

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"

_KEY_PREFIX = "base_model.model."
_KEY_SUFFIX = ".weight"
_ZIP_TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # the earliest that the zip format can hold

_INERT_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
        "task_type",
    }
)
"""PEFT settings that do not change what the stored tensors mean."""


def write_peft_directory(
    folder: Path,
    layout: AdapterLayout,
    bases: AdapterBases,
    vector: Float[Tensor, " num_params"],
    base_reference: str,
) -> None:
    """Writes an adapter vector as a PEFT LoRA directory (config, float32 weights, card).

    Args:
        folder: created with its parents where missing; files of the same names are replaced.
        layout: meaning of `vector`.
        bases: frozen factors of the layout.
        vector: adapter vector of any floating dtype.
        base_reference: recorded as `base_model_name_or_path`.

    Raises:
        InvalidAdapterError: the vector has another length or is not finite, or the bases
            belong to another layout.
    """
    files = _render_files(layout, bases, vector, base_reference)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def zip_peft_adapter(
    layout: AdapterLayout,
    bases: AdapterBases,
    vector: Float[Tensor, " num_params"],
    base_reference: str,
) -> bytes:
    """The directory of `write_peft_directory` as zip bytes; equal input gives equal bytes.

    Members are stored, not deflated: float weights hardly shrink, and the output of deflate
    depends on the zlib version.

    Raises:
        InvalidAdapterError: as `write_peft_directory`.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in _render_files(layout, bases, vector, base_reference).items():
            member = zipfile.ZipInfo(name, _ZIP_TIMESTAMP)
            member.create_system = 3  # Unix, wherever this runs
            member.external_attr = 0o100644 << 16
            archive.writestr(member, content)
    return buffer.getvalue()


def read_peft_directory(folder: Path, layout: AdapterLayout) -> Float[Tensor, " num_params"]:
    """Reads a PEFT LoRA directory back into a float32 adapter vector of kind `lora`.

    The other kinds cannot be inverted: their trained numbers are mixed into the factors.

    Raises:
        InvalidAdapterError: the layout is of another kind, a file is missing or malformed,
            the config asks for something that a plain LoRA is not (DoRA, rsLoRA, rank
            patterns, ...), or the tensors are not exactly those of the layout and finite.
    """
    if layout.kind is not AdapterKind.LORA:
        raise InvalidAdapterError(
            f"a PEFT directory cannot be read as kind {layout.kind.value!r}: only 'lora' inverts"
        )
    _check_config(folder / CONFIG_FILE, layout)
    vector = layout.flatten(_read_factors(folder / WEIGHTS_FILE))
    if not torch.isfinite(vector).all():
        raise InvalidAdapterError(f"{folder / WEIGHTS_FILE} holds values that are not finite")
    return vector


def _render_files(
    layout: AdapterLayout, bases: AdapterBases, vector: Tensor, base_reference: str
) -> dict[str, bytes]:
    if bases.layout != layout:
        raise InvalidAdapterError("the bases belong to another adapter layout")
    factors = bases.expand(vector.detach().cpu())
    if not torch.isfinite(vector).all():
        raise InvalidAdapterError("the adapter vector holds values that are not finite")
    tensors = {
        f"{_KEY_PREFIX}{path}.{name}{_KEY_SUFFIX}": factor.contiguous()
        for path, pair in factors.items()
        for name, factor in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    config = {
        "base_model_name_or_path": base_reference,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": layout.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": layout.rank,
        "target_modules": [module.path for module in layout.modules],
        "task_type": None,
    }
    card = (
        "---\nlibrary_name: peft\n---\n\n"
        f"LoRA adapter of rank {layout.rank} (alpha {layout.alpha:g}) for the base model "
        f"`{base_reference}`, generated by ICM-LoRA and expanded from kind "
        f"`{layout.kind.value}`. Load it with `peft.PeftModel.from_pretrained(base, folder)`; "
        "it fits exactly this base model and no other.\n"
    )
    return {
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
        WEIGHTS_FILE: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        CARD_FILE: card.encode(),
    }


def _check_config(path: Path, layout: AdapterLayout) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidAdapterError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise InvalidAdapterError(f"{path} is not a JSON object")
    expected: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",),
        "r": (layout.rank,),
        "lora_alpha": (layout.alpha,),
        "bias": ("none",),
        # Other initialisations (PiSSA, OLoRA, ...) replace the weights of the base model.
        "init_lora_weights": (True, False, "gaussian"),
    }
    for key, allowed in expected.items():
        if key not in config or config[key] not in allowed:
            wanted = " or ".join(json.dumps(value) for value in allowed)
            raise InvalidAdapterError(f"{path}: {key} is {config.get(key)!r}, expected {wanted}")
    for key in config.keys() - expected.keys() - _INERT_KEYS:
        if config[key]:
            raise InvalidAdapterError(
                f"{path}: {key} = {config[key]!r} is more than a plain LoRA; only adapters "
                "without it can be read"
            )


def _read_factors(path: Path) -> dict[tuple[str, str], Tensor]:
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidAdapterError(
            f"cannot read {path}: {error} (weights must be safetensors; pickles are not loaded)"
        ) from error
    factors: dict[tuple[str, str], Tensor] = {}
    for key, tensor in tensors.items():
        path_and_name = key.removeprefix(_KEY_PREFIX).removesuffix(_KEY_SUFFIX)
        module, _, name = path_and_name.rpartition(".")
        if key != f"{_KEY_PREFIX}{module}.{name}{_KEY_SUFFIX}":
            raise InvalidAdapterError(f"{path}: tensor {key!r} is not named as PEFT names LoRA")
        factors[module, name] = tensor.float()
    return factors
