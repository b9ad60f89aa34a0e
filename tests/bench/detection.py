"""Detection of 8 images with 8 adapters in one batch, against 8 images of the base alone."""

from dataclasses import dataclass
from statistics import median

from PIL import Image, ImageEnhance

from service.demo import DETECTION_IMAGE
from service.inference.base_model import load_base_model
from service.inference.detection import DetectionEngine, DetectionRequest, Detections
from service.synthesis.adapter_recipe import AdapterRecipe
from service.synthesis.synthesizer import Synthesizer, load_synthesizer

ROWS = 8
BOXES = 4
REPEATS = 21


@dataclass(frozen=True)
class DetectionMeasurement:
    """Medians over interleaved repeats.

    Attributes:
        adapted_images_per_second: 8 images, 8 different adapters.
        base_images_per_second: 8 images of the base, no adapter code active.
        ratio: median of the repeats' ratios, adapted over base.
        identical: whether the batch's boxes are those of the images one by one.
    """

    adapted_images_per_second: float
    base_images_per_second: float
    ratio: float
    identical: bool


def measure_detection() -> DetectionMeasurement:
    """Alternates base and adapted batches of the shipped bundle, image tower included."""
    engine, adapted = build_batch()
    together = engine.complete(adapted)
    alone = [engine.complete([request])[0] for request in adapted]
    identical = all(
        isinstance(a, Detections) and isinstance(b, Detections) and a.boxes == b.boxes
        for a, b in zip(together, alone, strict=True)
    )
    # Rows of equal length: an answer that ends early would make its batch the faster one.
    engine.base.model.config.stop_probability = 1.0
    plain = [
        DetectionRequest(each.picture, each.prompt, max_boxes=BOXES, label="object")
        for each in adapted
    ]
    full = [
        DetectionRequest(
            each.picture, each.prompt, each.label, each.adapter_id, each.vector, max_boxes=BOXES
        )
        for each in adapted
    ]
    for batch in (plain, full):
        _measure_rate(engine, batch)
    pairs = [(_measure_rate(engine, plain), _measure_rate(engine, full)) for _ in range(REPEATS)]
    return DetectionMeasurement(
        adapted_images_per_second=median(with_adapters for _, with_adapters in pairs),
        base_images_per_second=median(without for without, _ in pairs),
        ratio=median(with_adapters / without for without, with_adapters in pairs),
        identical=identical,
    )


def build_batch() -> tuple[DetectionEngine, list[DetectionRequest]]:
    """The shipped bundle's engine, and a request for each of its first tasks."""
    synthesizer = load_synthesizer(DETECTION_IMAGE.parent)
    bundle = synthesizer.bundle
    base = load_base_model(bundle.base_reference, bundle_folder=bundle.folder)
    engine = DetectionEngine(base, bundle.layout, bundle.bases, num_slots=64)
    return engine, [_build_request(engine, synthesizer, i) for i in range(ROWS)]


def _build_request(
    engine: DetectionEngine, synthesizer: Synthesizer, number: int
) -> DetectionRequest:
    """The example image, darker or brighter by number, with the adapter of a task."""
    task = synthesizer.bundle.tasks[number].descriptions[0]
    recipe = AdapterRecipe.build(task=task, bundle_digest=synthesizer.bundle.digest)
    adapter = synthesizer.synthesize(recipe)
    image = Image.open(DETECTION_IMAGE).convert("RGB")
    image = ImageEnhance.Brightness(image).enhance(0.86 + 0.04 * number)
    return DetectionRequest(
        engine.prepare(image), task, f"object {number}", adapter.adapter_id, adapter.vector
    )


def _measure_rate(engine: DetectionEngine, batch: list[DetectionRequest]) -> float:
    """Images per second of one batch."""
    outcomes = engine.complete(batch)
    found = [each for each in outcomes if isinstance(each, Detections)]
    assert len(found) == len(batch)
    return len(batch) / found[0].seconds["detect"]
