"""The table of all error codes, rendered from the exceptions themselves; README.md holds it."""

from service.api.error_handlers import RETRY_STATUSES
from service.api.openai.errors import find_status
from service.errors import IcmLoraError

_OF_BUGS = "An error of the service itself; its log tells more under the request id."


def list_errors(root: type[IcmLoraError] = IcmLoraError) -> list[type[IcmLoraError]]:
    """Every class of the tree that has a code of its own, base first."""
    own = [root] if "code" in vars(root) else []
    return [*own, *(found for child in root.__subclasses__() for found in list_errors(child))]


def render_errors_table() -> str:
    """Markdown table of every code by status; the caller has imported all of the service."""
    lines = [
        "| Code | Status | On OpenAI's routes | Retry-After | Meaning |",
        "|---|--:|--:|---|---|",
    ]
    for error in sorted(list_errors(), key=lambda each: (each.status, each.code)):
        retry = "yes" if error.status in RETRY_STATUSES else ""
        meaning = _OF_BUGS if error is IcmLoraError else (error.__doc__ or "").splitlines()[0]
        lines.append(
            f"| `{error.code}` | {error.status} | {find_status(error)} | {retry} | {meaning} |"
        )
    return "\n".join(lines)
