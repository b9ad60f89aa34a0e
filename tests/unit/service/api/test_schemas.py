"""Request models: limits, unknown keys, and examples that hold."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import ValidationError

from service.api.requests import (
    MAX_BEAMS,
    MAX_EXAMPLE_IMAGES,
    MAX_NEW_TOKENS,
    MAX_STOPS,
    GenerateRequest,
    InferRequest,
    RequestModel,
)
from service.synthesis.adapter_recipe import MAX_TASK_CHARACTERS
from service.synthesis.example_tasks import MAX_EXAMPLE_CHARACTERS, MAX_EXAMPLE_TEXTS


@pytest.mark.parametrize(
    ("model", "body", "location"),
    [
        (GenerateRequest, {}, ""),
        (GenerateRequest, {"task": "x", "images": ["x"]}, ""),
        (GenerateRequest, {"images": []}, "images"),
        (GenerateRequest, {"images": ["x"] * (MAX_EXAMPLE_IMAGES + 1)}, "images"),
        (GenerateRequest, {"examples": ["x"], "images": ["x"]}, ""),
        (GenerateRequest, {"examples": []}, "examples"),
        (GenerateRequest, {"examples": [""]}, "examples.0"),
        (GenerateRequest, {"examples": ["x"] * (MAX_EXAMPLE_TEXTS + 1)}, "examples"),
        (GenerateRequest, {"examples": ["x" * (MAX_EXAMPLE_CHARACTERS + 1)]}, "examples.0"),
        (GenerateRequest, {"task": "x", "modality": "sound"}, "modality"),
        (GenerateRequest, {"task": ""}, "task"),
        (GenerateRequest, {"task": "x" * (MAX_TASK_CHARACTERS + 1)}, "task"),
        (GenerateRequest, {"task": "x", "mode": "mean"}, "mode"),
        (GenerateRequest, {"task": "x", "seed": -1}, "seed"),
        (GenerateRequest, {"task": "x", "seed": 2**63}, "seed"),
        (GenerateRequest, {"task": "x", "temperature": 0}, "temperature"),
        (GenerateRequest, {"task": "x", "strength": 4.1}, "strength"),
        (GenerateRequest, {"task": "x", "ttl_seconds": 0}, "ttl_seconds"),
        (GenerateRequest, {"task": "x", "cache": "maybe"}, "cache"),
        (GenerateRequest, {"task": "x", "tenant": "other"}, "tenant"),
        (InferRequest, {"prompt": "x"}, ""),
        (InferRequest, {"prompt": "x", "task": "x", "adapter_id": "base"}, ""),
        (InferRequest, {"adapter_id": "base"}, ""),
        (InferRequest, {"adapter_id": "base", "image": "x", "max_tokens": 3}, ""),
        (InferRequest, {"adapter_id": "base", "image": "x", "stop": []}, ""),
        (InferRequest, {"adapter_id": "base", "prompt": "x", "render": False}, ""),
        (
            InferRequest,
            {"adapter_id": "base", "image": "x", "num_beams": MAX_BEAMS + 1},
            "num_beams",
        ),
        (InferRequest, {"adapter_id": "base", "image": "x", "max_boxes": 0}, "max_boxes"),
        (
            InferRequest,
            {"adapter_id": "base", "image": "x", "score_threshold": 1.1},
            "score_threshold",
        ),
        (InferRequest, {"adapter_id": "base", "prompt": ""}, "prompt"),
        (
            InferRequest,
            {"adapter_id": "base", "prompt": "x", "max_tokens": MAX_NEW_TOKENS + 1},
            "max_tokens",
        ),
        (InferRequest, {"adapter_id": "base", "prompt": "x", "top_p": 0}, "top_p"),
        (InferRequest, {"adapter_id": "base", "prompt": "x", "temperature": 3}, "temperature"),
        (InferRequest, {"adapter_id": "base", "prompt": "x", "stop": [""]}, "stop.0"),
        (
            InferRequest,
            {"adapter_id": "base", "prompt": "x", "stop": ["x"] * (MAX_STOPS + 1)},
            "stop",
        ),
    ],
)
def test_wrong_fields_are_refused_by_name(
    model: type[RequestModel], body: Mapping[str, Any], location: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(json.dumps(body))
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [location]


@pytest.mark.parametrize("model", [GenerateRequest, InferRequest])
def test_published_examples_are_valid(model: type[RequestModel]) -> None:
    for example in model.model_json_schema()["examples"]:
        model.model_validate(example)


def test_fields_of_the_other_modality_are_named() -> None:
    with pytest.raises(ValidationError, match="leave out `top_p`, `seed`: without meaning with an"):
        InferRequest(adapter_id="base", image=b"x", seed=1, top_p=0.5)
    with pytest.raises(ValidationError, match="leave out `render`: without meaning without an"):
        InferRequest(adapter_id="base", prompt="x", render=True)


def test_image_is_text_or_bytes_as_it_was_sent() -> None:
    assert InferRequest(adapter_id="base", image=b"\xff").image == b"\xff"
    assert InferRequest.model_validate_json('{"adapter_id": "base", "image": "x"}').image == "x"
