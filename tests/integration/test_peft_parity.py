"""Our forward against PEFT, the reference implementation, on the directories we write."""

from pathlib import Path

import pytest
import torch
from jaxtyping import Float, Int
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from service.adapters.peft_format import read_peft_directory, write_peft_directory
from service.inference.base_model import EMBEDDED_SMOLLM2, load_base_model
from service.synthesis.attachment import Attachment
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterKind, AdapterLayout

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
# PEFT only warns where a checkpoint lacks a tensor, and calls a name that transformers renamed.
pytestmark = pytest.mark.filterwarnings(
    "error", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
BATCH_ROWS = 8
BASE_ROWS = (0, 5)
"""Rows of the mixed batch that use the base: adapter vectors of zeros."""


def make_tiny_llama() -> LlamaForCausalLM:
    """Random Llama with grouped-query attention, so that k and v are narrower than q and o."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)  # has no dropout: training mode changes nothing


def draw_vectors(layout: AdapterLayout, rows: int, std: float) -> Float[Tensor, "rows num_params"]:
    """Random adapter vectors: every trained tensor, `lora_B` included, is far from zero."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, layout.num_params, generator=generator) * std


def draw_tokens(rows: int, vocab_size: int) -> Int[Tensor, "rows tokens"]:
    """Random token ids, another prompt in every row."""
    return torch.randint(0, vocab_size, (rows, 12), generator=torch.Generator().manual_seed(2))


def compute_peft_logits(
    base: nn.Module, folder: Path, tokens: Int[Tensor, "rows tokens"]
) -> Float[Tensor, "rows tokens vocab"]:
    """Logits of `PeftModel.from_pretrained`; the base is left as it was found."""
    with torch.no_grad():
        model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
        logits: Tensor = model(input_ids=tokens).logits
        model.unload()
    return logits


def compute_logits(
    model: nn.Module,
    attachment: Attachment,
    vectors: Float[Tensor, "adapters num_params"],
    tokens: Int[Tensor, "rows tokens"],
) -> Float[Tensor, "rows tokens vocab"]:
    """Logits of our forward, one adapter vector per row or one for all rows."""
    attachment.rows.vectors = vectors
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens).logits
    attachment.rows.vectors = None
    return logits


@pytest.mark.parametrize("kind", list(AdapterKind))
def test_forward_equals_peft(kind: AdapterKind, tmp_path: Path) -> None:
    model = make_tiny_llama()
    layout = AdapterLayout.from_model(model, kind=kind, rank=4, alpha=6.0, target_modules=TARGETS)
    bases = AdapterBases.from_model(layout, model)
    vector = draw_vectors(layout, 1, 0.3)
    tokens = draw_tokens(3, model.config.vocab_size)
    write_peft_directory(tmp_path, layout, bases, vector[0], "tiny")

    with torch.no_grad():
        base = model(input_ids=tokens).logits
    reference = compute_peft_logits(model, tmp_path, tokens)
    ours = compute_logits(model, Attachment(model, bases), vector, tokens)

    assert (reference - base).abs().max() > 0.01, "the adapter changes nothing: a void test"
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", list(AdapterKind))
def test_peft_loads_exactly_the_written_tensors(kind: AdapterKind, tmp_path: Path) -> None:
    """No key is missing, unexpected (PEFT drops those silently) or matched by suffix."""
    model = make_tiny_llama()
    layout = AdapterLayout.from_model(
        model, kind=kind, rank=2, alpha=2.0, target_modules=("k_proj", "up_proj")
    )
    bases = AdapterBases.from_model(layout, model)
    write_peft_directory(tmp_path, layout, bases, draw_vectors(layout, 1, 0.3)[0], "tiny")

    loaded = PeftModel.from_pretrained(model, tmp_path)

    written = load_file(tmp_path / "adapter_model.safetensors")
    assert len(written) == 2 * len(layout.modules)
    held = get_peft_model_state_dict(loaded, save_embedding_layers=False)  # else asks a hub
    torch.testing.assert_close(held, written, rtol=0, atol=0)
    adapted = {path for path, module in loaded.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == {f"base_model.model.{module.path}" for module in layout.modules}


def test_directory_made_by_peft_reads_back_to_the_same_forward(tmp_path: Path) -> None:
    model = make_tiny_llama()
    layout = AdapterLayout.from_model(model, kind="lora", rank=4, alpha=8.0, target_modules=TARGETS)
    tokens = draw_tokens(2, model.config.vocab_size)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), init_lora_weights=False)
    trained = get_peft_model(model, config)
    trained.save_pretrained(str(tmp_path))
    with torch.no_grad():
        reference = trained(input_ids=tokens).logits
    trained.unload()

    vector = read_peft_directory(tmp_path, layout)
    bases = AdapterBases.from_model(layout, model)
    ours = compute_logits(model, Attachment(model, bases), vector[None], tokens)

    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", list(AdapterKind))
def test_mixed_batch_equals_peft_one_by_one(kind: AdapterKind, tmp_path: Path) -> None:
    check_mixed_batch(make_tiny_llama(), kind, rank=4, std=0.3, folder=tmp_path)


@pytest.mark.slow
def test_mixed_batch_equals_peft_on_smollm2(tmp_path: Path) -> None:
    model = load_base_model(EMBEDDED_SMOLLM2, device="cpu", dtype="float32").model
    check_mixed_batch(model, AdapterKind.CORE, rank=16, std=0.05, folder=tmp_path)


def check_mixed_batch(
    model: PreTrainedModel, kind: AdapterKind, *, rank: int, std: float, folder: Path
) -> None:
    """Eight rows, six adapters and two base rows in one forward, against PEFT row by row."""
    layout = AdapterLayout.from_model(
        model, kind=kind, rank=rank, alpha=float(rank), target_modules=TARGETS
    )
    bases = AdapterBases.from_model(layout, model)
    vectors = draw_vectors(layout, BATCH_ROWS, std)
    vectors[list(BASE_ROWS)] = 0.0
    tokens = draw_tokens(BATCH_ROWS, model.config.vocab_size)

    with torch.no_grad():
        base = model(input_ids=tokens).logits
    reference = base.clone()
    for row in set(range(BATCH_ROWS)) - set(BASE_ROWS):
        write_peft_directory(folder / str(row), layout, bases, vectors[row], "base")
        reference[row] = compute_peft_logits(model, folder / str(row), tokens[row : row + 1])[0]
        assert (reference[row] - base[row]).abs().max() > 0.01, f"adapter {row} changes nothing"
    ours = compute_logits(model, Attachment(model, bases), vectors, tokens)

    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-4)
