"""Task vectors of the training wordings."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from service.errors import InvalidRecipeError
from service.inference.base_model import BaseModel
from service.synthesis.task_encoder import (
    HiddenStateEncoder,
    TaskEncoder,
    build_task_encoder,
)
from training.checkpoint import read_tensors, write_tensors
from training.recipe import BaseSection, EncoderSection
from training.tasks.detection_task import DetectionTask
from training.tasks.text import TextTask

AnyTask = TextTask | DetectionTask


@dataclass(frozen=True)
class TaskVectors:
    """One unit row per training wording, tasks in order.

    Attributes:
        encoder_id: encoder that made them.
        rows: `[wordings, dim]`.
        owner: index of the task of each row.
    """

    encoder_id: str
    rows: Float[Tensor, "wordings dim"]
    owner: Int[Tensor, " wordings"]

    @property
    def dim(self) -> int:
        """Length of a task vector."""
        return self.rows.shape[1]

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return int(self.owner.max()) + 1

    def of_task(self, index: int) -> Float[Tensor, "wordings dim"]:
        """Rows of one task."""
        return self.rows[self.owner == index]

    def leave_one_out_similarities(self) -> Float[Tensor, " wordings"]:
        """Sorted: each wording's best cosine similarity to its own task's other wordings."""
        similarity = self.rows @ self.rows.T
        same = self.owner[:, None] == self.owner[None, :]
        same.fill_diagonal_(False)
        best = similarity.masked_fill(~same, -1.0).amax(1)
        return best.sort().values

    def write(self, path: Path, spec: Mapping[str, Any], tasks: Sequence[AnyTask]) -> None:
        """Writes the rows with what made them."""
        metadata = {"encoder_id": self.encoder_id, "made_from": _digest_inputs(spec, tasks)}
        write_tensors(path, {"rows": self.rows, "owner": self.owner}, metadata)

    @classmethod
    def read(cls, path: Path, spec: Mapping[str, Any], tasks: Sequence[AnyTask]) -> "TaskVectors":
        """Reads the rows.

        Raises:
            InvalidRecipeError: another encoder or other wordings made them.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("made_from") != _digest_inputs(spec, tasks):
            raise InvalidRecipeError(
                f"{path} was made with another encoder or other wordings: delete it to redo it"
            )
        return cls(metadata["encoder_id"], tensors["rows"], tensors["owner"])


def _digest_inputs(spec: Mapping[str, Any], tasks: Sequence[AnyTask]) -> str:
    """sha256 over what determines the rows: the encoder, and the tasks' wordings in order."""
    body = [dict(spec), [[task.name, list(task.descriptions)] for task in tasks]]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def encoder_spec(section: EncoderSection, base: BaseSection) -> dict[str, Any]:
    """What a bundle records, to build the same encoder in serving."""
    if section.kind == "hidden_states":
        return {"kind": section.kind, "base": base.reference, "num_samples": section.num_samples}
    return {"kind": section.kind, "model": section.model, "pretrained": section.pretrained}


def encode_tasks(
    section: EncoderSection,
    tasks: Sequence[AnyTask],
    load_base: Callable[[], BaseModel],
) -> TaskVectors:
    """Encodes wordings, or for `hidden_states` groups of N training documents (paper Eq. 1).

    Raises:
        InvalidRecipeError: an image encoder, which text tasks have no images for.
    """
    if section.kind == "open_clip_image":
        raise InvalidRecipeError("encoder.kind open_clip_image needs tasks with images")
    rows: list[Tensor] = []
    owner: list[int] = []
    encoder: TaskEncoder
    if section.kind == "hidden_states":
        base = load_base()
        encoder = hidden = HiddenStateEncoder(base.model, base.tokenizer, base.digest)
        for index, task in enumerate(tasks):
            if not isinstance(task, TextTask):
                raise InvalidRecipeError("encoder.kind hidden_states needs tasks with texts")
            groups = len(task.descriptions)
            for group in range(groups):
                samples = task.train[group::groups][: section.num_samples]
                rows.append(hidden.encode_examples(samples))
                owner.append(index)
    else:
        encoder = build_task_encoder(encoder_spec(section, BaseSection(reference="")))
        for index, task in enumerate(tasks):
            rows.extend(encoder.encode(task.descriptions))
            owner.extend([index] * len(task.descriptions))
    return TaskVectors(encoder.encoder_id, torch.stack(rows), torch.tensor(owner))
