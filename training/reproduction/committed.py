"""Committed evaluations of the shipped bundles: what tables 1 and 2 are rendered from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from service.errors import InvalidInputError
from training.evaluation.detection import DetectionResult
from training.evaluation.text import TaskResult
from training.shipped import RESULTS_DIR, SUITES

PAPER_DIR = RESULTS_DIR / "paper"
"""Committed JSON and figures of what is reproduced."""


@dataclass(frozen=True)
class Evaluation:
    """A committed evaluation.

    Attributes:
        document: as it lies there: bundle, provenance, hardware, settings.
        detection: results by category; empty for text.
        text: results by domain; empty for detection.
    """

    document: Mapping[str, Any]
    detection: tuple[DetectionResult, ...] = ()
    text: tuple[TaskResult, ...] = ()


def read_evaluation(suite: str, results: Path = RESULTS_DIR) -> Evaluation:
    """Reads a suite's evaluation.

    Raises:
        InvalidInputError: none is committed.
    """
    path = results / SUITES[suite] / "evaluation.json"
    if not path.exists():
        raise InvalidInputError(f"no {path}: icm-lora evaluate --suite {suite} --out writes it")
    document = json.loads(path.read_text(encoding="utf-8"))
    if suite == "text":
        read = TypeAdapter(tuple[TaskResult, ...]).validate_python
        return Evaluation(document, text=read(document["tasks"]))
    found = TypeAdapter(tuple[DetectionResult, ...]).validate_python(document["tasks"])
    return Evaluation(document, detection=found)
