"""What an answer's tokens say, and that confidences are the model's own, beams or not."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from service.inference.base_model import BaseModel
from service.inference.box_decoding import (
    NEAR_BINS,
    BoxGrammar,
    BoxTokens,
    LocatedBox,
    decode_boxes,
    read_boxes,
    trace_probabilities,
)
from service.inference.embedded_detector import NUM_BINS
from service.synthesis.attachment import Attachment
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterLayout
from tests.fixtures.kernel import normal
from tests.fixtures.tiny_detector import (
    WORDINGS,
    draw_image,
    list_targets,
    load_tiny_detector,
)

MODELS = pytest.mark.parametrize("name", ["florence2", "embedded"])
BEAMS = pytest.mark.parametrize("num_beams", [1, 3])
ROWS = 6


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    return {
        name: load_tiny_detector(name, tmp_path_factory.mktemp(name))
        for name in ("florence2", "embedded")
    }


def make_inputs(base: BaseModel, rows: int = ROWS) -> dict[str, Tensor]:
    return dict(
        base.processor(
            images=[draw_image(seed) for seed in range(rows)],
            text=[WORDINGS[seed % len(WORDINGS)] for seed in range(rows)],
            return_tensors="pt",
            padding=True,
        )
    )


def generate(base: BaseModel, inputs: dict[str, Tensor], num_beams: int) -> Any:
    """What `decode_boxes` asks for, at most four boxes long."""
    processors = LogitsProcessorList()
    if hasattr(base.model.config, "stop_probability"):
        processors.append(BoxGrammar(BoxTokens.of(base), base.model.config.stop_probability))
    with torch.inference_mode():
        return base.model.generate(
            **inputs,
            num_beams=num_beams,
            do_sample=False,
            max_new_tokens=17,
            logits_processor=processors,
            return_dict_in_generate=True,
            output_logits=True,
        )


def cut_answer(tokens: list[int], vocabulary: BoxTokens) -> list[int]:
    """Tokens up to the end, which belongs to them."""
    if vocabulary.eos_id in tokens:
        return tokens[: tokens.index(vocabulary.eos_id) + 1]
    return tokens


def adapt(base: BaseModel, name: str, rows: int) -> Attachment:
    """Another strong random adapter for every row."""
    layout = AdapterLayout.from_model(
        base.model, kind="lora", rank=2, alpha=2.0, target_modules=list_targets(name)
    )
    attachment = Attachment(base.model, AdapterBases.from_model(layout, base.model))
    attachment.rows.vectors = normal(rows, layout.num_params, seed=7, std=0.5)
    return attachment


# ---------------------------------------------------------------- tracing of probabilities


@MODELS
@BEAMS
@pytest.mark.parametrize("adapted", [False, True])
def test_traced_probabilities_are_those_of_the_winning_answer(
    bases: dict[str, BaseModel], name: str, num_beams: int, adapted: bool
) -> None:
    base = bases[name]
    inputs = make_inputs(base)
    attachment = adapt(base, name, ROWS) if adapted else None
    try:
        chosen, probabilities = trace_probabilities(generate(base, inputs, num_beams), num_beams)
        start = torch.full((ROWS, 1), base.model.config.text_config.decoder_start_token_id)
        with torch.inference_mode():
            logits = base.model(
                **inputs, decoder_input_ids=torch.cat([start, chosen[:, :-1]], dim=1)
            ).logits
    finally:
        if attachment is not None:
            attachment.detach(base.model)
    expected = logits.softmax(-1)

    vocabulary = BoxTokens.of(base)
    lengths = [len(cut_answer(row, vocabulary)) for row in chosen.tolist()]
    for row, length in enumerate(lengths):
        torch.testing.assert_close(
            probabilities[row, :length], expected[row, :length], rtol=0, atol=2e-5
        )
    assert max(lengths) > 4, "no answer holds a box: a void test"


@MODELS
def test_beams_change_answers_and_never_the_batch_s_order(
    bases: dict[str, BaseModel], name: str
) -> None:
    """The winner's history lies in other rows than its own, or the trace is not tested."""
    base = bases[name]
    output = generate(base, make_inputs(base), 3)
    steps = output.beam_indices[output.beam_indices >= 0]
    assert len(set(steps.tolist())) > ROWS
    for row, history in enumerate(output.beam_indices.tolist()):
        assert {beam // 3 for beam in history if beam >= 0} <= {row}


# ---------------------------------------------------------------- answers of whole models


@MODELS
@BEAMS
def test_boxes_lie_in_the_image_with_scores_of_zero_to_one(
    bases: dict[str, BaseModel], name: str, num_beams: int
) -> None:
    base = bases[name]
    found = decode_boxes(base, make_inputs(base), num_beams=num_beams, max_boxes=3)
    assert len(found) == ROWS
    assert all(len(boxes) <= 3 for boxes in found)
    every = [box for boxes in found for box in boxes]
    assert every, "no boxes: a void test"
    for box in every:
        assert all(0 <= side <= 1 for side in (box.x1, box.y1, box.x2, box.y2))
        assert 0 < box.score <= 1


@BEAMS
def test_the_embedded_detector_answers_in_whole_boxes(
    bases: dict[str, BaseModel], num_beams: int
) -> None:
    base = bases["embedded"]
    vocabulary = BoxTokens.of(base)
    chosen, _ = trace_probabilities(generate(base, make_inputs(base), num_beams), num_beams)
    lengths = set()
    for row in chosen.tolist():
        answer = cut_answer(row, vocabulary)
        if answer[-1] == vocabulary.eos_id:
            answer = answer[:-1]
            assert len(answer) % 4 == 0
        assert all(vocabulary.bin_of(token) is not None for token in answer)
        lengths.add(len(answer))
    assert len(lengths) > 1, "every answer is as long as may be: a void test"


@MODELS
@BEAMS
def test_an_adapter_that_breaks_its_row_leaves_the_others_alone(
    bases: dict[str, BaseModel], name: str, num_beams: int
) -> None:
    base = bases[name]
    inputs = make_inputs(base, 3)
    attachment = adapt(base, name, 3)
    try:
        whole = decode_boxes(base, inputs, num_beams=num_beams, max_boxes=3)
        vectors = attachment.rows.vectors
        assert vectors is not None
        broken = vectors.clone()
        broken[1] = 3e38
        attachment.rows.vectors = broken
        first, (nan,), last = decode_boxes(base, inputs, num_beams=num_beams, max_boxes=3)
    finally:
        attachment.detach(base.model)
    assert math.isnan(nan.x1)
    assert math.isnan(nan.score)
    assert (first, last) == (whole[0], whole[2])


@MODELS
def test_the_most_boxes_fit_the_model_s_positions(bases: dict[str, BaseModel], name: str) -> None:
    base = bases[name]
    stop = getattr(base.model.config, "stop_probability", None)
    if stop is not None:
        base.model.config.stop_probability = 1.0  # never
    try:
        (boxes,) = decode_boxes(base, make_inputs(base, 1), max_boxes=64)
    finally:
        if stop is not None:
            base.model.config.stop_probability = stop
    if name == "embedded":
        assert len(boxes) == 64


def test_a_grammar_ends_only_between_boxes_and_where_it_is_likely() -> None:
    tokens = BoxTokens(first_location=4, bos_id=0, pad_id=1, eos_id=2)
    grammar = BoxGrammar(tokens, stop_probability=0.5)
    scores = torch.zeros(2, 4 + NUM_BINS + 3)
    scores[0, 2] = 20.0  # the end is all but certain
    scores[1, 2] = 5.0  # the likeliest single token, and still unlikely
    for length, may_end in ((1, True), (2, False), (4, False), (5, True), (9, True)):
        allowed = grammar(torch.zeros(2, length, dtype=torch.long), scores.clone())
        finite = allowed.isfinite()
        assert finite[0].sum() == (1 if may_end else NUM_BINS)
        assert bool(finite[0, 2]) is may_end
        assert finite[1].nonzero().flatten().tolist() == list(range(4, 4 + NUM_BINS))


# ---------------------------------------------------------------- parsing


def write_tokens(base: BaseModel, text: str) -> list[int]:
    ids: list[int] = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def read(base: BaseModel, tokens: list[int], certainty: float = 1.0) -> list[LocatedBox]:
    """Boxes of an answer whose every token has this probability; the rest is the end's."""
    vocabulary = BoxTokens.of(base)
    table = torch.zeros(len(tokens), len(base.tokenizer))
    table[:, vocabulary.eos_id] = 1.0 - certainty
    table[torch.arange(len(tokens)), tokens] = certainty
    return list(read_boxes(tokens, table, vocabulary, base.tokenizer))


def locate(box: LocatedBox) -> tuple[float, ...]:
    return tuple(round(side * NUM_BINS - 0.5) for side in (box.x1, box.y1, box.x2, box.y2))


def test_labels_and_several_boxes_after_one(bases: dict[str, BaseModel]) -> None:
    base = bases["florence2"]
    text = (
        "<s>red car<loc_1><loc_2><loc_300><loc_400><loc_5><loc_6><loc_700><loc_999>"
        "bird<loc_10><loc_20><loc_30><loc_40></s><loc_0><loc_0><loc_9><loc_9>"
    )
    boxes = read(base, write_tokens(base, text))
    assert [box.label for box in boxes] == ["red car", "red car", "bird"]
    assert [locate(box) for box in boxes] == [
        (1, 2, 300, 400),
        (5, 6, 700, 999),
        (10, 20, 30, 40),
    ]
    assert all(box.score == pytest.approx(1.0) for box in boxes)


def test_boxes_without_a_label_have_none(bases: dict[str, BaseModel]) -> None:
    base = bases["embedded"]
    (box,) = read(base, write_tokens(base, "<loc_1><loc_2><loc_3><loc_4></s>"))
    assert (box.label, locate(box)) == ("", (1, 2, 3, 4))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "</s>",
        "<pad><loc_1><loc_2><loc_3><loc_4>",
        "a sofa",
        "sofa<loc_1><loc_2><loc_3>",
        "sofa<loc_1><loc_2>and<loc_3><loc_4></s>",
        "<loc_1><loc_2><loc_3></s><loc_4>",
        "<s><s><s>",
        "<image><image>",
    ],
)
def test_broken_answers_have_no_boxes(bases: dict[str, BaseModel], text: str) -> None:
    base = bases["florence2"]
    assert read(base, write_tokens(base, text)) == []


def test_what_follows_a_broken_box_is_read(bases: dict[str, BaseModel]) -> None:
    base = bases["florence2"]
    text = "sofa<loc_1><loc_2>car<loc_3><loc_4><loc_5><loc_6>"
    (box,) = read(base, write_tokens(base, text))
    assert (box.label, locate(box)) == ("car", (3, 4, 5, 6))


def test_the_score_is_presence_times_the_mass_near_the_sides(
    bases: dict[str, BaseModel],
) -> None:
    base = bases["florence2"]
    (bare,) = read(base, write_tokens(base, "<loc_1><loc_2><loc_3><loc_4>"), certainty=0.8)
    assert bare.score == pytest.approx(0.8 * 0.8)  # one minus the end, times the mass
    tokens = write_tokens(base, "car<loc_1><loc_2><loc_3><loc_4>")
    (named,) = read(base, tokens, certainty=0.8)
    assert named.score == pytest.approx(0.8 ** (len(tokens) - 4) * 0.8)


def test_a_side_is_the_mean_of_the_bins_near_its_token(bases: dict[str, BaseModel]) -> None:
    base = bases["embedded"]
    vocabulary = BoxTokens.of(base)
    tokens = write_tokens(base, "<loc_100><loc_0><loc_999><loc_500>")
    table = torch.zeros(4, len(base.tokenizer))
    first = vocabulary.first_location
    table[0, first + 100], table[0, first + 110] = 0.6, 0.2
    table[0, first + 101 + NEAR_BINS] = 0.2  # too far to count
    table[1, first], table[2, first + 999], table[3, first + 500] = 1.0, 1.0, 1.0
    (box,) = read_boxes(tokens, table, vocabulary, base.tokenizer)
    assert box.x1 == pytest.approx((100.5 * 0.6 + 110.5 * 0.2) / 0.8 / NUM_BINS)
    assert box.score == pytest.approx((0.8 + 3.0) / 4)
    assert (box.y1, box.x2) == (pytest.approx(0.0005), pytest.approx(0.9995))
