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
    files = render_peft_files(layout, bases, vector, base_reference)
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
        for name, content in render_peft_files(layout, bases, vector, base_reference).items():
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
    config = parse_peft_config(_read_file(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    for key, expected in (("r", layout.rank), ("lora_alpha", layout.alpha)):
        if config[key] != expected:
            raise InvalidAdapterError(
                f"{folder / CONFIG_FILE}: {key} is {config[key]!r}, expected {expected}"
            )
    vector = layout.flatten(
        parse_peft_weights(_read_file(folder / WEIGHTS_FILE), str(folder / WEIGHTS_FILE))
    )
    if not torch.isfinite(vector).all():
        raise InvalidAdapterError(f"{folder / WEIGHTS_FILE} holds values that are not finite")
    return vector


def render_peft_files(
    layout: AdapterLayout, bases: AdapterBases, vector: Tensor, base_reference: str
) -> dict[str, bytes]:
    """The files of a PEFT directory by their names; arguments and errors as its writer's."""
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


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidAdapterError(f"cannot read {path}: {error}") from error


def parse_peft_config(content: bytes, name: str = CONFIG_FILE) -> dict[str, Any]:
    """The settings of a plain LoRA, `r` and `lora_alpha` among them.

    Raises:
        InvalidAdapterError: malformed, or more than a plain LoRA; the message begins with `name`.
    """
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapterError(f"cannot read {name}: {error}") from error
    if not isinstance(config, dict):
        raise InvalidAdapterError(f"{name} is not a JSON object")
    expected: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",),
        "bias": ("none",),
        # Other initialisations (PiSSA, OLoRA, ...) replace the weights of the base model.
        "init_lora_weights": (True, False, "gaussian"),
    }
    for key, allowed in expected.items():
        if key not in config or config[key] not in allowed:
            wanted = " or ".join(json.dumps(value) for value in allowed)
            raise InvalidAdapterError(f"{name}: {key} is {config.get(key)!r}, expected {wanted}")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise InvalidAdapterError(f"{name}: {key} is {value!r}, expected a positive number")
    for key in config.keys() - expected.keys() - _INERT_KEYS - {"r", "lora_alpha"}:
        if config[key]:
            raise InvalidAdapterError(
                f"{name}: {key} = {config[key]!r} is more than a plain LoRA; only adapters "
                "without it can be read"
            )
    return config


def parse_peft_weights(content: bytes, name: str = WEIGHTS_FILE) -> dict[tuple[str, str], Tensor]:
    """The factors in float32, by module path and `lora_A` or `lora_B`.

    Raises:
        InvalidAdapterError: no safetensors, or a tensor that PEFT does not name so; the message
            begins with `name`.
    """
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InvalidAdapterError(
            f"cannot read {name}: {error} (weights must be safetensors; pickles are not loaded)"
        ) from error
    factors: dict[tuple[str, str], Tensor] = {}
    for key, tensor in tensors.items():
        path_and_name = key.removeprefix(_KEY_PREFIX).removesuffix(_KEY_SUFFIX)
        module, _, factor = path_and_name.rpartition(".")
        if key != f"{_KEY_PREFIX}{module}.{factor}{_KEY_SUFFIX}":
            raise InvalidAdapterError(f"{name}: tensor {key!r} is not named as PEFT names LoRA")
        if not tensor.is_floating_point():
            raise InvalidAdapterError(f"{name}: tensor {key!r} is of {tensor.dtype}, not floats")
        factors[module, factor] = tensor.float()
    return factors
