"""Detection on a frozen Florence-2, every image of a batch with its own adapter."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from service.adapters.slot_bank import SlotLease
from service.errors import (
    DeadlineExceededError,
    IcmLoraError,
    InvalidAdapterError,
    InvalidInputError,
)
from service.inference.base_model import BaseModel
from service.inference.box_decoding import decode_boxes
from service.inference.detections import (
    DetectedBox,
    DetectionRequest,
    Detections,
    PreparedPicture,
    label_of,
    select_boxes,
)
from service.inference.engine import AdapterHost
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterLayout

__all__ = [
    "DetectedBox",
    "DetectionEngine",
    "DetectionRequest",
    "Detections",
    "PreparedPicture",
    "Result",
    "label_of",
]

MAX_DECODED_ROWS = 32
"""Images times beams that are decoded together; more run one after the other."""

Result = Detections | IcmLoraError
"""What becomes of a request."""


class DetectionEngine(AdapterHost):
    """A Florence-2 that finds what prompts and adapters ask for.

    `complete` is for one thread at a time; `prepare`, `load` and `slots` may be used beside it.

    Args:
        base: frozen detection base; its linears are replaced by adapted ones.
        layout: of the adapters.
        bases: of the adapters.
        num_slots: adapters resident at once.
        max_prompt_tokens: longest prompt, tokens of the image not counted.
    """

    def __init__(
        self,
        base: BaseModel,
        layout: AdapterLayout,
        bases: AdapterBases,
        *,
        num_slots: int,
        max_prompt_tokens: int = 2_048,
    ) -> None:
        assert base.modality == "detection", f"{base.reference} is no detection base"
        super().__init__(base, layout, bases, num_slots=num_slots)
        self.base = base
        self._max_prompt_tokens = max_prompt_tokens
        self._context_tokens: int = base.model.config.text_config.max_position_embeddings
        self._blank = Image.new("RGB", (8, 8))

    def prepare(self, image: Image.Image) -> PreparedPicture:
        """Resizes and normalises an RGB image; may run in any thread, before its batch."""
        pixels: Tensor = self.base.processor.image_processor(image, return_tensors="pt")[
            "pixel_values"
        ]
        return PreparedPicture(pixels[0], image.width, image.height)

    def complete(
        self,
        requests: Sequence[DetectionRequest],
        on_done: Callable[[int, Result], None] | None = None,
        is_abandoned: Callable[[int], bool] | None = None,
    ) -> list[Result]:
        """Finds the objects of all images, whatever their adapters.

        What a request gets does not depend on the others, up to rounding. A request that fails
        fails alone.

        Args:
            requests: any number; those with different `num_beams` or `max_boxes` run one batch
                after another, as these say how a batch is decoded.
            on_done: told an index and its result as soon as it is known.
            is_abandoned: asked before each batch whether nobody waits for an index any more.

        Returns:
            One result per request: its detections or its error.
        """
        results: dict[int, Result] = {}

        def settle(index: int, result: Result) -> None:
            results[index] = result
            if on_done is not None:
                on_done(index, result)

        prompts: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            try:
                prompts[index] = self._tokenize(request.prompt)
            except InvalidInputError as error:
                settle(index, error)
        try:
            for group in _group_alike(requests, prompts):
                for index in group:
                    if is_abandoned is not None and is_abandoned(index):
                        settle(index, DeadlineExceededError("nobody waits for these boxes"))
                waiting = [index for index in group if index not in results]
                self._run_group(requests, {index: prompts[index] for index in waiting}, settle)
        finally:
            self._attachment.rows.vectors = None
        return [results[index] for index in range(len(requests))]

    def _run_group(
        self,
        requests: Sequence[DetectionRequest],
        prompts: Mapping[int, list[int]],
        settle: Callable[[int, Result], None],
    ) -> None:
        started = time.perf_counter()
        leases: dict[int, SlotLease] = {}
        vectors: list[Tensor] = []
        for index in prompts:
            try:
                request = requests[index]
                leases[index], vector = self._copy_adapter(request.adapter_id, request.vector)
            except IcmLoraError as error:
                settle(index, error)
            else:
                vectors.append(vector)
        if not leases:
            return
        rows = [requests[index] for index in leases]
        self._attachment.rows.vectors = self._stack_rows(list(leases.values()), vectors)
        found = decode_boxes(
            self.base,
            self._build_inputs(rows, [prompts[index] for index in leases]),
            num_beams=rows[0].num_beams,
            max_boxes=rows[0].max_boxes,
        )
        seconds = {"detect": time.perf_counter() - started}
        for (index, lease), request, boxes in zip(leases.items(), rows, found, strict=True):
            try:
                kept = tuple(select_boxes(boxes, request))
            except InvalidAdapterError as error:
                settle(index, error)
                continue
            answer = Detections(
                boxes=kept, slot=lease.slot, generation=lease.generation, seconds=seconds
            )
            settle(index, answer)

    def _build_inputs(
        self, rows: Sequence[DetectionRequest], prompts: Sequence[list[int]]
    ) -> dict[str, Tensor]:
        """Prompts padded on the right, where Florence-2's positions expect it, and images."""
        device, width = self.base.device, max(map(len, prompts))
        pad_id = self.base.tokenizer.pad_token_id
        ids = [prompt + [pad_id] * (width - len(prompt)) for prompt in prompts]
        mask = [[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts]
        pixels = torch.stack([row.picture.pixel_values for row in rows])
        return {
            "input_ids": torch.tensor(ids, device=device),  # [rows, tokens]
            "attention_mask": torch.tensor(mask, device=device),
            "pixel_values": pixels.to(device, self.base.dtype),  # [rows, 3, height, width]
        }

    def _tokenize(self, prompt: str) -> list[int]:
        """Tokens of image and prompt as the processor lays them out, without their image."""
        processor = self.base.processor
        try:
            _, [text], *_ = processor.prepare_inputs_layout(images=[self._blank], text=[prompt])
        except ValueError as error:  # a task token of Florence-2 among other words
            raise InvalidInputError(f"the prompt cannot be used: {error}") from error
        if text.count(processor.image_token) != 1:
            raise InvalidInputError(f"the prompt holds {processor.image_token}: remove it")
        text = text.replace(processor.image_token, processor.replace_image_token({}, 0))
        ids: list[int] = self.base.tokenizer(text, add_special_tokens=False)["input_ids"]
        limit = min(self._max_prompt_tokens, self._context_tokens - int(processor.num_image_tokens))
        num_tokens = len(ids) - int(processor.num_image_tokens)
        if num_tokens > limit:
            raise InvalidInputError(
                f"the prompt has {num_tokens} tokens, the limit is {limit}: shorten it"
            )
        return ids


def _group_alike(
    requests: Sequence[DetectionRequest], indices: Mapping[int, Any]
) -> Iterator[list[int]]:
    """Indices of requests that are decoded alike, not too many at a time."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index in indices:
        request = requests[index]
        groups.setdefault((request.num_beams, request.max_boxes), []).append(index)
    for (num_beams, _), group in groups.items():
        size = max(1, MAX_DECODED_ROWS // num_beams)
        for start in range(0, len(group), size):
            yield group[start : start + size]
