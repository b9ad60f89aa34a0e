"""The published OpenAPI document: error answers as problem details, for every route."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.api.error_handlers import PROBLEM_MEDIA_TYPE, RETRY_STATUSES
from service.api.openai.errors import OpenAIError
from service.api.requests import InferRequest, UploadRequest
from service.api.schemas import Problem
from service.errors import IcmLoraError

_SCHEMA_REFERENCE = "#/components/schemas/{model}"
_RETRY_AFTER = {
    "description": "Seconds to wait before trying again (RFC 9110).",
    "schema": {"type": "integer"},
}


def document_problems(*errors: type[IcmLoraError]) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses=` of a route for the errors that it can answer with, and for a bug."""
    responses: dict[int | str, dict[str, Any]] = {}
    answered: tuple[type[IcmLoraError], ...] = (*errors, IcmLoraError)
    for error in answered:
        schema = {"$ref": _SCHEMA_REFERENCE.format(model=Problem.__name__)}
        response = responses.setdefault(
            error.status,
            {
                "description": "",
                "content": {PROBLEM_MEDIA_TYPE: {"schema": schema, "examples": {}}},
            },
        )
        if error.status in RETRY_STATUSES:
            response["headers"] = {"Retry-After": _RETRY_AFTER}
        separator = "; " if response["description"] else ""
        response["description"] += f"{separator}`{error.code}`: {error.title}"
        response["content"][PROBLEM_MEDIA_TYPE]["examples"][error.code] = {
            "value": {
                "type": f"urn:icm-lora:problem:{error.code}",
                "title": error.title,
                "status": error.status,
                "detail": (error.__doc__ or error.title).splitlines()[0],
                "instance": "/path/of/the/request",
                "code": error.code,
            }
        }
    return responses


def merge_responses(
    documented: dict[str, dict[str, Any]], further: dict[int | str, dict[str, Any]]
) -> None:
    """Adds what is new of further error responses to an operation of an OpenAPI document."""
    for status, response in further.items():
        present = documented.setdefault(str(status), response)
        for media_type, content in response["content"].items():
            examples = present["content"][media_type]["examples"]
            if not content["examples"].keys() <= examples.keys():
                examples |= content["examples"]
                present["description"] += f"; {response['description']}"
        if "headers" in response:
            present["headers"] = present.get("headers", {}) | response["headers"]


def build_openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with `Problem` in place of its own validation error model.

    FastAPI announces a 422 of its own shape wherever a route has parameters; our routes
    declare their 422 themselves, so what is left of it is dropped.
    """
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=app.description,
        license_info=app.license_info,
        routes=app.routes,
    )
    for operations in document["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    # Referred to by documents of ours, so FastAPI does not know that they are used.
    for model in (Problem, OpenAIError, InferRequest, UploadRequest):
        schema = model.model_json_schema(ref_template=_SCHEMA_REFERENCE)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    return document
