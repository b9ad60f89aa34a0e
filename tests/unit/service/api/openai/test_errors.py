"""Our errors in OpenAI's shape."""

import pytest

from service.api.error_handlers import InvalidRequestError
from service.api.openai.errors import (
    ModelNotFoundError,
    UnknownParameterError,
    document_errors,
    render_error,
    speaks_openai,
)
from service.api.schemas import FieldProblem
from service.errors import IcmLoraError, InvalidInputError, QueueFullError


@pytest.mark.parametrize(
    ("path", "speaks"),
    [
        ("/v1/completions", True),
        ("/v1/chat/completions", True),
        ("/v1/models", True),
        ("/v1/models/a/b", True),
        ("/v1/adapters", False),
        ("/v1/completions/x", False),
        ("/infer", False),
    ],
)
def test_only_openais_paths_speak_so(path: str, speaks: bool) -> None:
    assert speaks_openai(path) is speaks


@pytest.mark.parametrize(
    ("error", "kind", "param"),
    [
        (InvalidInputError("x"), "invalid_request_error", None),
        (UnknownParameterError("x", "foo"), "invalid_request_error", "foo"),
        (ModelNotFoundError("x"), "invalid_request_error", "model"),
        (QueueFullError("x"), "rate_limit_error", None),
        (IcmLoraError("x"), "server_error", None),
    ],
)
def test_errors_keep_their_code_and_say_what_is_at_fault(
    error: IcmLoraError, kind: str, param: str | None
) -> None:
    body = render_error(error).error
    assert (body.message, body.type, body.param, body.code) == ("x", kind, param, error.code)


def test_validation_errors_name_the_first_parameter_and_describe_several() -> None:
    problems = [
        FieldProblem(location="body.messages.0.role", message="is wrong", type="x"),
        FieldProblem(location="body.n", message="is too large", type="x"),
    ]
    body = render_error(InvalidRequestError("2 fields"), problems).error
    assert body.param == "messages"
    assert body.message == "messages.0.role: is wrong; n: is too large"


@pytest.mark.parametrize("location", ["body", "body.17"])
def test_a_body_that_is_not_json_blames_no_parameter(location: str) -> None:
    problem = FieldProblem(location=location, message="JSON decode error", type="json_invalid")
    body = render_error(InvalidRequestError("1 field"), [problem]).error
    assert (body.param, body.message) == (None, "JSON decode error")


def test_documents_say_400_where_our_own_routes_say_422() -> None:
    responses = document_errors((InvalidInputError, QueueFullError))
    assert set(responses) == {400, 429}
    assert "Retry-After" in responses[429]["headers"]
    assert "`invalid_input`" in responses[400]["description"]
