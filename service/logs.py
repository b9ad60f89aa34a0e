"""JSON logs: one object a line on standard error, each with the request's id.

No log line holds a task description, a prompt or a completion: requests are logged by route
template, and an unexpected exception by its type and its stack, never by its message.
"""

import json
import logging
import logging.config
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

request_id_context: ContextVar[str | None] = ContextVar("icm_lora_request_id", default=None)
"""Id of the request that the current task serves; None outside requests."""


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object.

    Keys: `time` (UTC, RFC 3339), `level`, `logger`, `message`, `request_id` within a request,
    whatever the caller passes as `extra={"fields": {...}}`, and for exceptions `exception`
    (type) and `stack` (frames, innermost last).
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line without a line feed."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := request_id_context.get()) is not None:
            line["request_id"] = request_id
        line.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            line.update(describe_exception(record.exc_info[1]))
        return json.dumps(line, ensure_ascii=False, default=str)


def describe_exception(error: BaseException) -> dict[str, Any]:
    """Type and stack of an exception, without its message (it may quote a prompt)."""
    frames = traceback.extract_tb(error.__traceback__)
    described: dict[str, Any] = {
        "exception": f"{type(error).__module__}.{type(error).__qualname__}",
        "stack": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
    if error.__cause__ is not None:
        described["cause"] = describe_exception(error.__cause__)
    return described


def configure_logs(level: str) -> None:
    """Sends every logger, uvicorn's and the libraries' too, through the JSON formatter.

    uvicorn's access log is off: it holds raw paths and no request id; ours replaces it.
    """
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": JsonFormatter}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
            "root": {"level": "WARNING", "handlers": ["stderr"]},
            "loggers": {
                "service": {"level": level.upper()},
                "uvicorn": {"level": level.upper(), "handlers": [], "propagate": True},
                "uvicorn.access": {"level": "CRITICAL", "handlers": [], "propagate": False},
            },
        }
    )
    logging.captureWarnings(True)


def quiet_transformers() -> None:
    """Makes transformers log through the root logger, without progress bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
