"""Errors of the OpenAI routes: the codes of this service in the shape that OpenAI's clients read.

OpenAI answers 400 where our own routes answer 422; all other statuses are the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field

from service.api.schemas import FieldProblem
from service.errors import IcmLoraError

RETRY_STATUSES = frozenset({429, 503})
"""Statuses whose answers say when to try again."""

RETRY_AFTER_HEADER = {
    "description": "Seconds to wait before trying again (RFC 9110).",
    "schema": {"type": "integer"},
}

PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/models",
)
"""Paths whose errors have OpenAI's shape, and all paths below the last."""

_JSON = "application/json"
_BAD_REQUEST = 400
_UNPROCESSABLE = 422
_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_MAX_PROBLEMS = 3


class ParameterError(IcmLoraError):
    """A parameter of an OpenAI request cannot be served; `param` names it."""

    status = _BAD_REQUEST
    code = "invalid_parameter"
    title = "Invalid parameter"

    def __init__(self, detail: str, param: str | None = None) -> None:
        super().__init__(detail)
        self.param = param


class UnknownParameterError(ParameterError):
    """A parameter that neither OpenAI's API nor this service knows."""

    code = "unknown_parameter"
    title = "Unknown parameter"


class UnsupportedParameterError(ParameterError):
    """A parameter of OpenAI's API that this service does not implement."""

    code = "unsupported_parameter"
    title = "Unsupported parameter"


class ModelNotFoundError(IcmLoraError):
    """`model` names no base, alias or adapter; the base never answers in its place."""

    status = 404
    code = "model_not_found"
    title = "Model not found"
    param = "model"


class OpenAIErrorBody(BaseModel):
    """What went wrong."""

    message: Annotated[str, Field(description="What happened and what to change.")]
    type: Annotated[str, Field(examples=["invalid_request_error"])]
    param: Annotated[str | None, Field(description="Parameter that is wrong.")] = None
    code: Annotated[str, Field(description="Stable machine-readable code.")]


class OpenAIError(BaseModel):
    """An error in OpenAI's shape."""

    error: OpenAIErrorBody


def speaks_openai(path: str) -> bool:
    """Whether errors of this path have OpenAI's shape."""
    return path in PATHS or path.startswith(f"{PATHS[-1]}/")


def find_status(error: IcmLoraError | type[IcmLoraError]) -> int:
    """HTTP status of an error on an OpenAI route."""
    return _BAD_REQUEST if error.status == _UNPROCESSABLE else error.status


def render_error(
    error: IcmLoraError, problems: Sequence[FieldProblem] | None = None
) -> OpenAIError:
    """An error of our tree in OpenAI's shape.

    Args:
        error: gives code and message.
        problems: what is wrong where, of requests that fail validation.
    """
    status = find_status(error)
    param = getattr(error, "param", None)
    message = error.detail
    if problems:
        param = _name_parameter(problems[0])
        message = "; ".join(_describe(item) for item in problems[:_MAX_PROBLEMS])
    return OpenAIError(
        error=OpenAIErrorBody(
            message=message, type=_find_type(status), param=param, code=error.code
        )
    )


def document_errors(errors: Iterable[type[IcmLoraError]]) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses=` of an OpenAI route for the errors that it can answer with."""
    responses: dict[int | str, dict[str, Any]] = {}
    schema = {"$ref": f"#/components/schemas/{OpenAIError.__name__}"}
    for error in errors:
        response = responses.setdefault(
            find_status(error),
            {"description": "", "content": {_JSON: {"schema": schema, "examples": {}}}},
        )
        if error.status in RETRY_STATUSES:
            response["headers"] = {"Retry-After": RETRY_AFTER_HEADER}
        separator = "; " if response["description"] else ""
        response["description"] += f"{separator}`{error.code}`: {error.title}"
        example = error((error.__doc__ or error.title).splitlines()[0])
        response["content"][_JSON]["examples"][error.code] = {
            "value": render_error(example).model_dump()
        }
    return responses


def _find_type(status: int) -> str:
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def _describe(problem: FieldProblem) -> str:
    place = problem.location.removeprefix("body").lstrip(".")
    return f"{place}: {problem.message}" if _name_parameter(problem) else problem.message


def _name_parameter(problem: FieldProblem) -> str | None:
    """The parameter at fault; None where it is the body as a whole."""
    name = problem.location.removeprefix("body").lstrip(".").partition(".")[0]
    return None if problem.type == "json_invalid" or not name else name
