"""Detection bases against PEFT: language part, image tower, mixed batches, and whole answers."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from service.adapters.peft_format import write_peft_directory
from service.inference.base_model import BaseModel
from service.inference.box_decoding import decode_boxes
from service.synthesis.attachment import Attachment
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterKind, AdapterLayout
from tests.fixtures.kernel import normal
from tests.fixtures.tiny_detector import (
    LANGUAGE_TARGETS,
    TOWER_TARGETS,
    WORDINGS,
    draw_image,
    load_tiny_detector,
)

ROWS = 8
BASE_ROWS = (0, 5)
"""Rows of the mixed batch that use the base: adapter vectors of zeros."""

CASES = pytest.mark.parametrize(
    ("name", "targets"),
    [
        pytest.param("florence2", LANGUAGE_TARGETS, id="language"),
        pytest.param("florence2", TOWER_TARGETS, id="tower"),
        pytest.param("florence2", (*LANGUAGE_TARGETS, *TOWER_TARGETS), id="both"),
        pytest.param("embedded", LANGUAGE_TARGETS, id="embedded"),
    ],
)
# PEFT only warns where a checkpoint lacks a tensor, and calls a name that transformers renamed.
pytestmark = pytest.mark.filterwarnings(
    "error", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    """Bases whose logits are below 1, so that 1e-5 is well above the rounding of float32."""
    loaded = {
        name: load_tiny_detector(name, tmp_path_factory.mktemp(name), biased=False)
        for name in ("florence2", "embedded")
    }
    for base in loaded.values():
        head = base.model.lm_head
        head.weight = nn.Parameter(head.weight.detach() / 8, requires_grad=False)
    return loaded


@pytest.fixture(scope="module")
def box_writers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    """Bases whose answers hold boxes."""
    return {
        name: load_tiny_detector(name, tmp_path_factory.mktemp(name))
        for name in ("florence2", "embedded")
    }


def make_layout(
    base: BaseModel, targets: tuple[str, ...], kind: AdapterKind | str = AdapterKind.LORA
) -> AdapterLayout:
    return AdapterLayout.from_model(
        base.model, kind=kind, rank=2, alpha=3.0, target_modules=targets
    )


def make_inputs(base: BaseModel) -> dict[str, Tensor]:
    """Eight pictures with prompts of different lengths."""
    return dict(
        base.processor(
            images=[draw_image(row) for row in range(ROWS)],
            text=[WORDINGS[row % len(WORDINGS)] for row in range(ROWS)],
            return_tensors="pt",
            padding=True,
        )
    )


def compute_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits `[rows, tokens, vocabulary]` along an answer of two boxes."""
    rows = len(inputs["input_ids"])
    answer = torch.arange(300, 309).expand(rows, -1)  # location tokens
    with torch.no_grad():
        logits: Tensor = model(**inputs, decoder_input_ids=answer).logits
    return logits


def take_row(inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: values[row : row + 1] for name, values in inputs.items()}


def draw_vectors(layout: AdapterLayout) -> Float[Tensor, "rows num_params"]:
    vectors = normal(ROWS, layout.num_params, seed=3, std=0.2)
    vectors[list(BASE_ROWS)] = 0.0
    return vectors


@CASES
def test_one_adapter_equals_peft_s_own_configuration(
    bases: dict[str, BaseModel], name: str, targets: tuple[str, ...]
) -> None:
    base = bases[name]
    layout = make_layout(base, targets)
    factors = AdapterBases.from_model(layout, base.model)
    vector = draw_vectors(layout)[1]
    inputs = make_inputs(base)
    plain = compute_logits(base.model, inputs)

    config = LoraConfig(r=2, lora_alpha=3, target_modules=list(targets))
    model = get_peft_model(base.model, config, autocast_adapter_dtype=False)
    state = {
        f"base_model.model.{path}.{tensor}.weight": factor
        for path, pair in factors.expand(vector).items()
        for tensor, factor in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    loaded = set_peft_model_state_dict(model, state)
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora_" in key]
    reference = compute_logits(model.eval(), inputs)
    model.unload()

    attachment = Attachment(base.model, factors)
    attachment.rows.vectors = vector[None]
    ours = compute_logits(base.model, inputs)
    attachment.detach(base.model)

    assert (reference - plain).abs().max() > 0.01, "the adapter changes nothing: a void test"
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


@CASES
@pytest.mark.parametrize("kind", list(AdapterKind))
def test_a_mixed_batch_equals_peft_one_by_one(
    bases: dict[str, BaseModel],
    name: str,
    targets: tuple[str, ...],
    kind: AdapterKind,
    tmp_path: Path,
) -> None:
    """Six adapters and two base rows: in the tower each row serves four windows and one map."""
    base = bases[name]
    layout = make_layout(base, targets, kind)
    factors = AdapterBases.from_model(layout, base.model)
    vectors = draw_vectors(layout)
    inputs = make_inputs(base)
    plain = compute_logits(base.model, inputs)

    reference = plain.clone()
    for row in set(range(ROWS)) - set(BASE_ROWS):
        write_peft_directory(tmp_path / str(row), layout, factors, vectors[row], "base")
        model = PeftModel.from_pretrained(
            base.model, tmp_path / str(row), autocast_adapter_dtype=False
        )
        reference[row] = compute_logits(model, take_row(inputs, row))[0]
        model.unload()
        assert (reference[row] - plain[row]).abs().max() > 0.01, f"adapter {row} changes nothing"
    attachment = Attachment(base.model, factors)
    attachment.rows.vectors = vectors
    ours = compute_logits(base.model, inputs)
    attachment.detach(base.model)

    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


@CASES
@pytest.mark.parametrize("num_beams", [1, 3])
def test_boxes_of_a_mixed_batch_are_those_that_peft_finds_one_by_one(
    box_writers: dict[str, BaseModel],
    name: str,
    targets: tuple[str, ...],
    num_beams: int,
    tmp_path: Path,
) -> None:
    base = box_writers[name]
    layout = make_layout(base, targets)
    factors = AdapterBases.from_model(layout, base.model)
    vectors = draw_vectors(layout)
    inputs = make_inputs(base)

    reference = []
    for row in range(ROWS):
        write_peft_directory(tmp_path / str(row), layout, factors, vectors[row], "base")
        model = PeftModel.from_pretrained(  # puts its layers into the base itself
            base.model, tmp_path / str(row), autocast_adapter_dtype=False
        )
        reference += decode_boxes(base, take_row(inputs, row), num_beams=num_beams, max_boxes=3)
        model.unload()
    attachment = Attachment(base.model, factors)
    attachment.rows.vectors = vectors
    ours = decode_boxes(base, inputs, num_beams=num_beams, max_boxes=3)
    attachment.detach(base.model)

    assert sum(map(len, ours)) >= 4, "hardly any box: a void test"
    for found, expected in zip(ours, reference, strict=True):
        assert [box.label for box in found] == [box.label for box in expected]
        for one, other in zip(found, expected, strict=True):
            for side in ("x1", "y1", "x2", "y2", "score"):
                assert getattr(one, side) == pytest.approx(getattr(other, side), abs=1e-5)
