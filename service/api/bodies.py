"""Bodies that are JSON, or a form with files: `/infer` and uploads; one schema checks both."""

from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from service.api.error_handlers import MalformedRequestError
from service.api.requests import MAX_PROMPT_CHARACTERS, MAX_STOPS, InferRequest, UploadRequest

_JSON = "application/json"
_FORM = "multipart/form-data"
_LISTS = frozenset({"stop"})
_MAX_FIELDS = len(InferRequest.model_fields) + MAX_STOPS
_MAX_FIELD_BYTES = 4 * MAX_PROMPT_CHARACTERS  # UTF-8

ModelT = TypeVar("ModelT", bound=BaseModel)


async def read_infer_request(request: Request) -> InferRequest:
    """The request of `/infer`, whichever way it was sent; errors as `_read_body`."""
    return await _read_body(request, InferRequest, max_files=1)


async def read_upload_request(request: Request) -> UploadRequest:
    """An adapter that is uploaded, whichever way it was sent; errors as `_read_body`."""
    return await _read_body(request, UploadRequest, max_files=2)


InferBody = Annotated[InferRequest, Depends(read_infer_request)]
UploadBody = Annotated[UploadRequest, Depends(read_upload_request)]


async def _read_body(request: Request, model: type[ModelT], max_files: int) -> ModelT:
    """A body in JSON or as a form.

    Raises:
        RequestValidationError: it is not what the schema asks for, or of another media type.
        MalformedRequestError: the form cannot be read.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if media_type == _JSON:
            return model.model_validate_json(await request.body())
        if media_type == _FORM:
            return model.model_validate(await _read_form(request, max_files))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError(
            [{**item, "loc": ("body", *item["loc"])} for item in found]
        ) from None
    message = f"send {_JSON} or {_FORM}"
    raise RequestValidationError([{"loc": ("body",), "msg": message, "type": "media_type"}])


async def _read_form(request: Request, max_files: int) -> dict[str, Any]:
    limits: dict[str, int] = {
        "max_files": max_files,
        "max_fields": _MAX_FIELDS,
        "max_part_size": _MAX_FIELD_BYTES,
    }
    fields: dict[str, Any] = {}
    try:
        async with request.form(**limits) as form:
            for name in form:
                values = [
                    await value.read() if isinstance(value, UploadFile) else value
                    for value in form.getlist(name)
                ]
                # A field that came twice stays a list, which the schema then refuses by name.
                fields[name] = values if name in _LISTS or len(values) > 1 else values[0]
    except ValueError:  # a charset that cannot decode what was sent
        raise MalformedRequestError("the form cannot be read: send it in UTF-8") from None
    return fields


def document_infer_body() -> dict[str, Any]:
    """OpenAPI's request body (FastAPI's `openapi_extra`): both media types."""
    return _document_body(InferRequest, "InferForm", ("image",))


def document_upload_body() -> dict[str, Any]:
    """The same of uploads."""
    return _document_body(UploadRequest, "UploadForm", ("config", "weights"))


def _document_body(model: type[BaseModel], title: str, files: tuple[str, ...]) -> dict[str, Any]:
    form = model.model_json_schema()
    form.pop("examples", None)
    form["title"] = title
    for name in files:
        form["properties"][name] = {
            "type": "string",
            "format": "binary",
            "description": form["properties"][name]["description"],
        }
    return {
        "requestBody": {
            "required": True,
            "content": {
                _JSON: {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}},
                _FORM: {"schema": form},
            },
        }
    }
