"""The shipped detection bundle: eight pictures, eight adapters, one batch."""

import pytest

from service.inference.detection import Detections
from tests.bench.detection import build_batch


@pytest.mark.slow
def test_a_mixed_batch_gives_the_boxes_of_the_images_one_by_one() -> None:
    engine, requests = build_batch()
    together = engine.complete(requests)
    alone = [engine.complete([request])[0] for request in requests]

    assert len({request.adapter_id for request in requests}) == len(requests) == 8
    found = 0
    for batched, single in zip(together, alone, strict=True):
        assert isinstance(batched, Detections)
        assert isinstance(single, Detections)
        assert batched.boxes == single.boxes
        found += len(single.boxes)
    assert found > 0
