"""JSON logs: one object a line, request id in it, messages of exceptions not in it."""

import json
import logging

import pytest

from service.logs import JsonFormatter, configure_logs, request_id_context


def format_record(**overrides: object) -> dict[str, object]:
    fields: dict[str, object] = {"name": "service", "levelname": "INFO", "levelno": logging.INFO}
    record = logging.makeLogRecord({**fields, "msg": "two\nlines", **overrides})
    line = JsonFormatter().format(record)
    assert "\n" not in line
    parsed: dict[str, object] = json.loads(line)
    return parsed


def test_line_carries_fields_and_the_request_id() -> None:
    token = request_id_context.set("abc")
    try:
        line = format_record(fields={"route": "/infer", "status": 200})
    finally:
        request_id_context.reset(token)
    assert line["message"] == "two\nlines"
    assert (line["request_id"], line["route"], line["status"]) == ("abc", "/infer", 200)
    assert str(line["time"]).endswith("+00:00")
    assert "request_id" not in format_record()


def test_exception_is_named_and_located_but_not_quoted() -> None:
    try:
        try:
            raise KeyError("the secret prompt")
        except KeyError as cause:
            raise ValueError("the secret prompt") from cause
    except ValueError as error:
        line = format_record(exc_info=(type(error), error, error.__traceback__))
    assert "secret prompt" not in json.dumps(line)
    assert line["exception"] == "builtins.ValueError"
    assert line["cause"]["exception"] == "builtins.KeyError"  # type: ignore[index]
    assert "test_exception_is_named" in line["stack"][0]  # type: ignore[index]


def test_configured_loggers_write_json(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure_logs("info")
        logging.getLogger("service.x").info("mine")
        logging.getLogger("service.x").debug("too quiet")
        logging.getLogger("uvicorn.error").info("uvicorn's")
        logging.getLogger("uvicorn.access").info("raw path")
        logging.getLogger("transformers").info("library chatter")
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == ["mine", "uvicorn's"]
