"""Mixed batches of images against single ones and the processor; errors and receipts."""

import asyncio
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.adapters.slot_bank import SlotLease
from service.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    IcmLoraError,
    InvalidAdapterError,
    InvalidInputError,
    NoFreeSlotError,
)
from service.inference.base_model import BUNDLED_BASE, EMBEDDED_TINY, BaseModel, load_base_model
from service.inference.box_decoding import LocatedBox
from service.inference.detection import (
    DetectedBox,
    DetectionRequest,
    Detections,
    PreparedPicture,
    Result,
    label_of,
)
from service.inference.detections import select_boxes
from service.inference.scheduler import Scheduler
from tests.fixtures.tiny_detector import (
    WORDINGS,
    DetectorKit,
    build_detection_engine,
    draw_image,
    list_targets,
    load_tiny_detector,
    write_tiny_florence2,
)

ADAPTERS = (1, None, 2, 3, None, 4, 1, 5)
"""Of a mixed batch: five adapters, one of them twice, and the base twice."""


@pytest.fixture(scope="module", params=["florence2", "embedded"])
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DetectorKit:
    """Both kinds of base; Florence-2 is adapted in its image tower, too."""
    base = load_tiny_detector(request.param, tmp_path_factory.mktemp(request.param))
    return build_detection_engine(base, list_targets(request.param))


@pytest.fixture(scope="module")
def florence2(tmp_path_factory: pytest.TempPathFactory) -> DetectorKit:
    base = load_tiny_detector("florence2", tmp_path_factory.mktemp("florence2"))
    return build_detection_engine(base, list_targets("florence2"))


def get_detections(results: list[Result]) -> list[Detections]:
    found = [result for result in results if isinstance(result, Detections)]
    assert len(found) == len(results), results
    return found


def make_mixed_requests(kit: DetectorKit, **options: Any) -> list[DetectionRequest]:
    """Eight images of different widths, with prompts of different lengths."""
    return [kit.request(number, adapter, **options) for number, adapter in enumerate(ADAPTERS)]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_mixed_batch_answers_each_image_as_if_it_were_alone(
    kit: DetectorKit, num_beams: int
) -> None:
    requests = make_mixed_requests(kit, num_beams=num_beams, max_boxes=4)
    together = get_detections(kit.complete(*requests))
    alone = [get_detections(kit.complete(request))[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert [found.box for found in one.boxes] == [found.box for found in other.boxes]
        assert [found.score for found in one.boxes] == pytest.approx(
            [found.score for found in other.boxes], abs=1e-4
        )
    assert sum(len(each.boxes) for each in together) >= 4


def test_adapters_move_the_boxes_and_leave_the_base_as_it_is(kit: DetectorKit) -> None:
    adapters = (None, 1, 2, 3, 4)
    answers = get_detections(kit.complete(*(kit.request(0, each) for each in adapters)))
    assert len({each.boxes for each in answers}) >= 3
    (alone,) = get_detections(kit.complete(kit.request(0)))
    assert alone.boxes == answers[0].boxes


def test_requests_that_are_decoded_differently_run_in_turn(kit: DetectorKit) -> None:
    requests = [
        kit.request(number, number % 3 or None, num_beams=1 + number % 2, max_boxes=1 + number % 4)
        for number in range(8)
    ]
    together = get_detections(kit.complete(*requests))
    for request, answer in zip(requests, together, strict=True):
        (alone,) = get_detections(kit.complete(request))
        assert [found.box for found in answer.boxes] == [found.box for found in alone.boxes]
        assert len(answer.boxes) <= request.max_boxes


def test_prompts_and_images_reach_the_model_as_the_processor_makes_them(kit: DetectorKit) -> None:
    image, prompts = draw_image(3), list(WORDINGS)
    expected = kit.base.processor(
        images=[image] * 3, text=prompts, return_tensors="pt", padding=True
    )
    rows = [kit.request(0, prompt=prompt) for prompt in prompts]
    rows = [replace(row, picture=kit.engine.prepare(image)) for row in rows]
    inputs = kit.engine._build_inputs(rows, [kit.engine._tokenize(prompt) for prompt in prompts])
    for name, values in inputs.items():
        torch.testing.assert_close(values, expected[name], rtol=0, atol=0)


def test_receipts_name_slot_and_load(kit: DetectorKit) -> None:
    first, second, base, again = get_detections(
        kit.complete(*(kit.request(0, adapter) for adapter in (1, 2, None, 1)))
    )
    assert 0 < first.slot != second.slot > 0
    assert (again.slot, again.generation) == (first.slot, first.generation)
    assert (base.slot, base.generation) == (0, 0)
    assert set(first.seconds) == {"detect"}
    assert first.completion_tokens == 4 * len(first.boxes)


def test_a_bad_request_fails_alone(kit: DetectorKit) -> None:
    good = kit.request(0, 1)
    bad = [
        replace(good, adapter_id="never-loaded", vector=None),
        replace(good, prompt="Detect the <image> in the image."),
        replace(good, prompt="<OD> and something else"),
        replace(good, prompt="detect " * 500),
        replace(good, adapter_id="wrong", vector=torch.zeros(3)),
    ]
    first, *failed, last = kit.complete(good, *bad, good)
    kinds = [type(each) for each in failed]
    assert kinds == [AdapterNotFoundError, *[InvalidInputError] * 3, InvalidAdapterError]
    assert isinstance(first, Detections)
    assert isinstance(last, Detections)
    assert first.boxes == last.boxes


def test_an_error_of_our_own_about_one_image_is_that_one_s_alone(
    kit: DetectorKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize, gather = kit.engine._tokenize, kit.engine.slots.gather
    good, unread, unleased = kit.request(0, 1), kit.request(0, 2), kit.request(0, 3)

    def fail_tokenize(prompt: str) -> list[int]:
        return tokenize(prompt) if prompt != "broken" else [1 // 0]

    def fail_gather(leases: list[SlotLease]) -> torch.Tensor:
        return gather(leases) if leases[0].adapter_id != "adapter-3" else torch.ones(1 // 0)

    monkeypatch.setattr(kit.engine, "_tokenize", fail_tokenize)
    monkeypatch.setattr(kit.engine.slots, "gather", fail_gather)
    results = kit.complete(good, replace(unread, prompt="broken"), unleased)
    assert isinstance(results[0], Detections)
    for failed in results[1:]:
        assert isinstance(failed, IcmLoraError)
        assert isinstance(failed.__cause__, ZeroDivisionError)
    assert kit.engine.slots.stats().leased == 0


def test_more_adapters_than_slots_run_one_after_the_other(tmp_path: Path) -> None:
    base = load_tiny_detector("embedded", tmp_path)
    small = build_detection_engine(base, list_targets("embedded"), num_slots=2)
    requests = make_mixed_requests(small)
    together = get_detections(small.complete(*requests))
    for request, answer in zip(requests, together, strict=True):
        (alone,) = get_detections(small.complete(request))
        assert [found.box for found in answer.boxes] == [found.box for found in alone.boxes]
    assert small.engine.slots.stats().leased == 0


def test_an_image_that_finds_no_slot_fails_and_the_others_do_not(tmp_path: Path) -> None:
    base = load_tiny_detector("embedded", tmp_path)
    small = build_detection_engine(base, list_targets("embedded"), num_slots=1)
    first, second = small.request(0, 1), small.request(1, 2)
    assert first.vector is not None
    with small.engine.load("adapter-1", first.vector):
        one, two, other = small.complete(first, second, small.request(2))
    assert isinstance(two, NoFreeSlotError)
    assert len(get_detections([one, other])) == 2


@pytest.mark.parametrize("broken", ["decode_boxes", "select_boxes"])
def test_leases_are_given_back_whatever_fails(
    kit: DetectorKit, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(f"service.inference.detection.{broken}", lambda *_, **__: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            kit.complete(*make_mixed_requests(kit))
    assert kit.engine.slots.stats().leased == 0
    get_detections(kit.complete(*make_mixed_requests(kit)))


def test_nobody_computes_what_nobody_waits_for(kit: DetectorKit) -> None:
    requests = make_mixed_requests(kit)
    results = kit.engine.complete(requests, is_abandoned=lambda index: index % 2 == 0)
    assert all(isinstance(result, DeadlineExceededError) for result in results[::2])
    assert all(isinstance(result, Detections) for result in results[1::2])
    everybody = kit.engine.complete(requests, is_abandoned=lambda _: True)
    assert all(isinstance(result, DeadlineExceededError) for result in everybody)


def test_more_boxes_than_the_context_holds_are_no_error(kit: DetectorKit) -> None:
    (answer,) = kit.complete(kit.request(0, max_boxes=64))
    assert isinstance(answer, Detections)


def test_the_scheduler_runs_this_engine_as_it_runs_text(kit: DetectorKit) -> None:
    requests = make_mixed_requests(kit)
    alone = [get_detections(kit.complete(request))[0].boxes for request in requests]
    scheduler: Scheduler[DetectionRequest, Detections] = Scheduler(kit.engine, max_batch_rows=5)

    async def scenario() -> list[Detections]:
        scheduler.start()
        try:
            return await asyncio.gather(*(scheduler.submit(each, 60.0) for each in requests))
        finally:
            await scheduler.drain(10.0)

    answers = asyncio.run(scenario())
    for answer, boxes in zip(answers, alone, strict=True):  # sides are rounded to 0.01 pixels
        places = torch.tensor([[found.box for found in each] for each in (answer.boxes, boxes)])
        torch.testing.assert_close(places[0], places[1], atol=0.011, rtol=0)
    assert all(set(answer.seconds) == {"queue", "detect"} for answer in answers)


def locate(*sides: float, score: float = 0.5, label: str = "") -> LocatedBox:
    return LocatedBox(*sides, score=score, label=label)  # type: ignore[misc, arg-type]


def make_request(**options: Any) -> DetectionRequest:
    picture = PreparedPicture(torch.zeros(3, 4, 4), width=200, height=100)
    return DetectionRequest(picture, "Detect the sofa.", "sofa", **options)


def test_boxes_are_pixels_within_the_image_by_falling_score() -> None:
    located = [
        locate(0.1, 0.2, 0.5, 0.6, score=0.4),
        locate(-0.1, 0.5, 1.2, 1.0, score=0.9, label="chair"),
        locate(0.5, 0.5, 0.5, 0.9),  # no width
        locate(0.5, 0.9, 0.9, 0.5),  # upside down
        locate(0.1, 0.2, 0.3, 0.4, score=0.4, label="bed"),
        locate(0.1, 0.2, 0.3, 0.4, score=0.1),
    ]
    boxes = list(select_boxes(located, make_request(score_threshold=0.2)))
    assert boxes == [
        DetectedBox((0.0, 50.0, 200.0, 100.0), "chair", 0.9),
        DetectedBox((20.0, 20.0, 60.0, 40.0), "bed", 0.4),
        DetectedBox((20.0, 20.0, 100.0, 60.0), "sofa", 0.4),
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_that_breaks_the_model_is_an_error(value: float) -> None:
    with pytest.raises(InvalidAdapterError):
        list(select_boxes([locate(0.1, 0.1, value, 0.2)], make_request()))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 0},
        {"num_beams": 6},
        {"max_boxes": 0},
        {"max_boxes": 65},
        {"score_threshold": 1.5},
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        make_request(**options)


@pytest.mark.parametrize(
    ("description", "target"),
    [
        ("Detect the sofa in the image.", "sofa"),
        ("detect a red car", "red car"),
        ("Find every bird in this picture", "bird"),
        ("Locate all of the chairs.", "chairs"),
        ("Please mark the cup on the table in the photo!", "cup on the table"),
        ("Detect images.", "images"),
        ("Where is the apple?", "Where is the apple?"),
        ("sofa", "sofa"),
        ("Detect", "Detect"),
    ],
)
def test_what_a_description_asks_for(description: str, target: str) -> None:
    assert label_of(description) == target


def test_labels_of_hostile_descriptions_take_no_time() -> None:
    started = time.perf_counter()
    assert label_of("detect " + "." * 60_000 + "a") == ("detect " + "." * 80)[:80]
    assert time.perf_counter() - started < 1.0


def test_bases_are_told_apart_by_their_config(florence2: DetectorKit, tmp_path: Path) -> None:
    text = load_base_model(EMBEDDED_TINY, cache_dir=tmp_path)
    assert (text.modality, text.processor, text.dtype) == ("text", None, torch.bfloat16)
    base = florence2.base
    assert base.modality == "detection"
    assert base.tokenizer is base.processor.tokenizer


def test_automatic_dtype(tmp_path: Path) -> None:
    assert load_tiny_detector("florence2", tmp_path / "a", "auto").dtype == torch.bfloat16
    assert load_tiny_detector("embedded", tmp_path / "b", "auto").dtype == torch.float32
    with pytest.raises(InvalidInputError, match="float32"):
        load_tiny_detector("embedded", tmp_path / "c", "bfloat16")


def test_a_bundle_s_own_base(tmp_path: Path) -> None:
    write_tiny_florence2(tmp_path / "base")
    base = load_base_model(BUNDLED_BASE, bundle_folder=tmp_path, dtype="float32")
    assert isinstance(base, BaseModel)
    assert base.reference == BUNDLED_BASE
    with pytest.raises(InvalidInputError, match="beside a bundle"):
        load_base_model(BUNDLED_BASE)
    with pytest.raises(InvalidInputError, match="safetensors"):
        load_base_model(BUNDLED_BASE, bundle_folder=tmp_path / "nothing")


def test_code_of_a_model_s_own_is_not_run(tmp_path: Path) -> None:
    config = write_tiny_florence2(tmp_path) / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "auto_map": {"AutoModel": "modeling.Florence2"}}))
    with pytest.raises(InvalidInputError, match="florence-community"):
        load_base_model(str(tmp_path))
    config.write_text("{")
    with pytest.raises(InvalidInputError, match=r"config\.json"):
        load_base_model(str(tmp_path))
