"""Answers about images: adapter and picture are made ready at the same time."""

import asyncio
import base64
import time

from service.adapters.record import AdapterRecord
from service.api.answers import build_alias_use, build_receipt, to_milliseconds
from service.api.auth import Principal
from service.api.requests import InferRequest
from service.api.resources import Resources
from service.api.schemas import Detection, DetectionResponse
from service.api.sources import Selector, resolve_adapter
from service.errors import InvalidInputError
from service.inference.detection import DetectionRequest, label_of
from service.inference.rendering import render_boxes


async def detect_objects(
    body: InferRequest, resources: Resources, principal: Principal
) -> DetectionResponse:
    """Finds what the adapter is for in the image of a request.

    Raises:
        IcmLoraError: as `POST /infer` documents.
    """
    started = time.perf_counter()
    service = resources.need_detection()
    assert body.image is not None, "a request without an image is no detection"
    source, picture = await asyncio.gather(
        resolve_adapter(Selector.from_request(body), resources, service, principal),
        resources.pictures.prepare(body.image, service.engine, keep_canvas=body.render),
    )
    record = source.record
    prompt = choose_prompt(body, record)
    detections = await service.answer(
        DetectionRequest(
            picture.prepared,
            prompt,
            label_of(prompt if record is None else record.task or prompt),
            adapter_id=None if record is None else record.adapter_id,
            vector=None if record is None else record.vector,
            vector_sha256=None if record is None else record.vector_sha256,
            tenant=principal.tenant,
            num_beams=body.num_beams,
            max_boxes=body.max_boxes,
            score_threshold=body.score_threshold,
        )
    )
    resources.metrics.count_boxes(len(detections.boxes))
    seconds = {**source.seconds, "image": picture.seconds, **detections.seconds}
    rendered: str | None = None
    if picture.canvas is not None:
        canvas, drawing = picture.canvas, time.perf_counter()
        png = await resources.pictures.run(
            lambda: render_boxes(canvas, detections.boxes, width=picture.width)
        )
        rendered = base64.b64encode(png).decode()
        seconds["render"] = time.perf_counter() - drawing
    return DetectionResponse(
        boxes=[
            Detection(box=found.box, label=found.label, score=found.score)
            for found in detections.boxes
        ],
        width=picture.width,
        height=picture.height,
        rendered_png=rendered,
        receipt=build_receipt(
            record, service.bundle, detections.slot, detections.generation, source.decision
        ),
        alias=build_alias_use(source.alias),
        cache=source.cache,
        degraded=resources.list_degraded(source.provided),
        milliseconds=to_milliseconds(seconds, time.perf_counter() - started),
    )


def choose_prompt(body: InferRequest, record: AdapterRecord | None) -> str:
    """The request's prompt, else the words that its adapter was generated from.

    Raises:
        InvalidInputError: there are no words: the base, or an adapter made from example images.
    """
    prompt = body.prompt or body.task or (record.task if record is not None else "")
    if not prompt:
        raise InvalidInputError(
            "nothing says what to detect: give a `prompt`, such as 'Detect the sofa in the image.'"
        )
    return prompt
