"""Detection on a frozen Florence-2, every image of a batch with its own adapter."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from service.adapters.slot_bank import SlotLease
from service.errors import (
    DeadlineExceededError,
    IcmLoraError,
    InvalidAdapterError,
    InvalidInputError,
    NoFreeSlotError,
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
from service.inference.engine import AdapterHost, Ticket, build_failure
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

DetectionTicket = Ticket[DetectionRequest, Detections]


@dataclass(frozen=True)
class _Row:
    """An image of the batch that runs; `vector` is None for the base."""

    ticket: DetectionTicket
    prompt: list[int]
    lease: SlotLease
    vector: Tensor | None


class DetectionEngine(AdapterHost[DetectionRequest, Detections]):
    """A Florence-2 that finds what prompts and adapters ask for.

    For one thread at a time; `prepare`, `load` and `slots` may be used beside it.

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
        self._waiting: dict[DetectionTicket, list[int]] = {}  # oldest first, with its prompt

    def prepare(self, image: Image.Image) -> PreparedPicture:
        """Resizes and normalises an RGB image; may run in any thread, before its batch."""
        pixels: Tensor = self.base.processor.image_processor(image, return_tensors="pt")[
            "pixel_values"
        ]
        return PreparedPicture(pixels[0], image.width, image.height)

    @property
    def num_running(self) -> int:
        """Images that wait for their batch."""
        return len(self._waiting)

    def admit(self, tickets: Sequence[DetectionTicket]) -> list[DetectionTicket]:
        """Takes requests in for the next batches; those that cannot be answered are resolved.

        Returns:
            None of them: slots are leased while a batch runs only.
        """
        for ticket in tickets:
            try:
                self._waiting[ticket] = self._tokenize(ticket.request.prompt)
            except Exception as error:  # whatever it is: nothing that waits was touched
                ticket.resolve(build_failure(error))
        return []

    def step(self) -> None:
        """Finds the objects of the oldest image, and of those that are decoded alike.

        Requests with other `num_beams` or `max_boxes`, which say how a batch is decoded, wait
        for a step of their own, and so do those that find no slot while others of the batch
        hold one.
        """
        for ticket in [each for each in self._waiting if each.is_abandoned()]:
            del self._waiting[ticket]
            ticket.resolve(DeadlineExceededError("nobody waits for these boxes"))
        waiting = list(self._waiting.items())
        rows: list[_Row] = []
        try:
            for index in _choose_group([ticket.request for ticket in self._waiting]):
                self._open_row(*waiting[index], rows)
            if rows:
                self._run_rows(rows)
        finally:
            self._attachment.rows.vectors = None
            for row in rows:
                row.lease.release()
                self._waiting.pop(row.ticket, None)

    def abort(self) -> None:
        """Lets go of all images; their tickets are not resolved."""
        self._waiting = {}
        self._attachment.rows.vectors = None

    def _open_row(self, ticket: DetectionTicket, prompt: list[int], rows: list[_Row]) -> None:
        """Leases a slot for an image and adds it to the batch; one that cannot be is resolved."""
        try:
            rows.append(_Row(ticket, prompt, *self._lease(ticket.request)))
        except Exception as error:  # whatever it is: the others may go on
            if isinstance(error, NoFreeSlotError) and rows:
                return  # it waits for the slots of these
            self._waiting.pop(ticket, None)
            ticket.resolve(build_failure(error))

    def _run_rows(self, rows: Sequence[_Row]) -> None:
        started = time.perf_counter()
        requests = [row.ticket.request for row in rows]
        self._attachment.rows.vectors = self._stack_rows([row.vector for row in rows])
        found = decode_boxes(
            self.base,
            self._build_inputs(requests, [row.prompt for row in rows]),
            num_beams=requests[0].num_beams,
            max_boxes=requests[0].max_boxes,
        )
        seconds = {"detect": time.perf_counter() - started}
        for row, boxes in zip(rows, found, strict=True):
            result: Result
            try:
                kept = tuple(select_boxes(boxes, row.ticket.request))
            except InvalidAdapterError as error:
                result = error
            else:
                slot, generation = row.lease.slot, row.lease.generation
                result = Detections(kept, slot, generation, seconds)
            row.ticket.on_first_token()
            self._resolve(row.ticket, row.lease, result)

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


def _choose_group(requests: Sequence[DetectionRequest]) -> list[int]:
    """Indices of the first request and of those decoded alike, not too many at a time."""
    alike = [
        index
        for index, request in enumerate(requests)
        if (request.num_beams, request.max_boxes) == (requests[0].num_beams, requests[0].max_boxes)
    ]
    return alike[: max(1, MAX_DECODED_ROWS // requests[0].num_beams)] if alike else []
