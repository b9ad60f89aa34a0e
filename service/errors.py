"""One exception tree for the whole project.

    IcmLoraError (500 internal_error)
    ├── InvalidInputError (422 invalid_input)            a value the caller sent or wrote in a file
    │   ├── InvalidRecipeError (422 invalid_recipe)      a training recipe: unknown key, wrong type
    │   ├── InvalidTaskDataError (422 invalid_task_data) a task's documents or wordings
    │   ├── InvalidImageError (422 invalid_image)        an image that cannot or may not be read
    │   └── WrongModalityError (422 wrong_modality)      an image for a text adapter, or the reverse
    ├── InvalidBundleError (500 invalid_bundle)          a bundle on disk cannot be trusted
    │   ├── BaseModelMismatchError (500 base_model_mismatch)
    │   └── TaskEncoderMismatchError (500 task_encoder_mismatch)
    ├── UnauthenticatedError (401 unauthenticated)       no valid API key
    ├── ForbiddenError (403 forbidden)                   the key lacks a scope
    ├── InvalidAdapterError (422 invalid_adapter)        an adapter does not fit or is not finite
    ├── AdapterMismatchError (500 adapter_mismatch)      a slot held another adapter
    ├── OutOfDistributionError (422 out_of_distribution)  a task unlike all training tasks
    ├── AdapterNotFoundError (404 adapter_not_found)     never answered with the base model
    │   └── AliasNotFoundError (404 alias_not_found)     the tenant has no such alias
    ├── GenerationConflictError (409 generation_conflict)  an alias is not what was expected
    ├── NotCachedError (404 not_cached)                  `cache: only` and nothing cached
    ├── QueueFullError (429 queue_full)                  overload, with `retry_after_seconds`
    ├── RateLimitedError (429 rate_limited)              a tenant asks too often or for too much
    ├── QuotaExceededError (429 quota_exceeded)          a tenant holds too many adapters' bytes
    ├── NoFreeSlotError (503 no_free_slot)               every slot is leased by a running request
    ├── NotReadyError (503 not_ready)                    starting or shutting down
    ├── RegistryUnavailableError (503 registry_unavailable)  aliases cannot be changed now
    ├── DeadlineExceededError (504 deadline_exceeded)
    └── MissingDependencyError (500 missing_dependency)  an optional package or embedded weights

Each class carries the HTTP status and a stable code, so the API maps the tree once
(RFC 9457 problem details) and the CLI prints the same message and exits non-zero.
"""

from typing import ClassVar


class IcmLoraError(Exception):
    """Base of every error that this project raises on purpose.

    Attributes:
        status: HTTP status that the API answers with.
        code: stable machine-readable code; clients may rely on it across versions.
        title: short human summary of the class of problem (RFC 9457 `title`).
        detail: what happened here and what to change.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class InvalidInputError(IcmLoraError):
    """A value that the caller sent cannot be used; the message says what to change."""

    status = 422
    code = "invalid_input"
    title = "Invalid input"


class InvalidRecipeError(InvalidInputError):
    """A training recipe has an unknown key, a wrong type or an impossible combination."""

    code = "invalid_recipe"
    title = "Invalid recipe"


class InvalidTaskDataError(InvalidInputError):
    """A task's documents or wordings are missing, empty or too small to split."""

    code = "invalid_task_data"
    title = "Invalid task data"


class InvalidImageError(InvalidInputError):
    """An image is of another format, broken, animated or too large.

    Attributes:
        reason: one of a few words, for metrics.
    """

    code = "invalid_image"
    title = "Invalid image"

    def __init__(self, detail: str, reason: str = "broken") -> None:
        super().__init__(detail)
        self.reason = reason


class WrongModalityError(InvalidInputError):
    """The adapter, or the service, answers another kind of request: text, or images."""

    code = "wrong_modality"
    title = "Wrong modality"


class InvalidBundleError(IcmLoraError):
    """A bundle on disk is incomplete, altered, non-finite or of an unknown version."""

    code = "invalid_bundle"
    title = "Invalid bundle"


class BaseModelMismatchError(InvalidBundleError):
    """The bundle was trained for another base model than the one loaded."""

    code = "base_model_mismatch"
    title = "Base model mismatch"


class TaskEncoderMismatchError(InvalidBundleError):
    """The bundle's task vectors were made by another encoder than the one loaded."""

    code = "task_encoder_mismatch"
    title = "Task encoder mismatch"


class UnauthenticatedError(IcmLoraError):
    """The request carries no API key, or an unknown one."""

    status = 401
    code = "unauthenticated"
    title = "Unauthenticated"


class ForbiddenError(IcmLoraError):
    """The API key is valid but lacks a scope that the request needs."""

    status = 403
    code = "forbidden"
    title = "Forbidden"


class InvalidAdapterError(IcmLoraError):
    """An adapter has the wrong layout, values that are not finite, or an update out of range.

    Attributes:
        reason: the check that it failed, one of a few words, for metrics.
    """

    status = 422
    code = "invalid_adapter"
    title = "Invalid adapter"

    def __init__(self, detail: str, reason: str = "malformed") -> None:
        super().__init__(detail)
        self.reason = reason


class OutOfDistributionError(IcmLoraError):
    """A task is unlike everything that the generator was trained on; names the nearest tasks."""

    status = 422
    code = "out_of_distribution"
    title = "Task out of distribution"


class AdapterMismatchError(IcmLoraError):
    """A slot held other values than those of the request's adapter; nothing was answered."""

    code = "adapter_mismatch"
    title = "Adapter mismatch"


class AdapterNotFoundError(IcmLoraError):
    """No adapter has this id; the base model never answers in its place."""

    status = 404
    code = "adapter_not_found"
    title = "Adapter not found"


class AliasNotFoundError(AdapterNotFoundError):
    """The tenant has no alias of this name."""

    code = "alias_not_found"
    title = "Alias not found"


class GenerationConflictError(IcmLoraError):
    """The alias has another generation than the request expects; read it again."""

    status = 409
    code = "generation_conflict"
    title = "Generation conflict"


class NotCachedError(IcmLoraError):
    """The request allowed cached adapters only, and this one is not cached."""

    status = 404
    code = "not_cached"
    title = "Adapter not cached"


class QueueFullError(IcmLoraError):
    """The bounded queue is full; try again after `retry_after_seconds`."""

    status = 429
    code = "queue_full"
    title = "Too many requests"

    def __init__(self, detail: str, retry_after_seconds: int = 1) -> None:
        super().__init__(detail)
        self.retry_after_seconds = retry_after_seconds


class RateLimitedError(IcmLoraError):
    """The tenant's requests, running requests or tokens are over its limits for now."""

    status = 429
    code = "rate_limited"
    title = "Rate limit reached"

    def __init__(self, detail: str, retry_after_seconds: int = 1) -> None:
        super().__init__(detail)
        self.retry_after_seconds = retry_after_seconds


class QuotaExceededError(IcmLoraError):
    """The tenant's resident adapters fill its quota of bytes."""

    status = 429
    code = "quota_exceeded"
    title = "Quota exceeded"

    def __init__(self, detail: str, retry_after_seconds: int = 60) -> None:
        super().__init__(detail)
        self.retry_after_seconds = retry_after_seconds


class NoFreeSlotError(IcmLoraError):
    """Every slot of the bank is leased by a running request."""

    status = 503
    code = "no_free_slot"
    title = "No free adapter slot"


class NotReadyError(IcmLoraError):
    """The service is still loading its models or is shutting down."""

    status = 503
    code = "not_ready"
    title = "Service not ready"


class RegistryUnavailableError(IcmLoraError):
    """Aliases cannot be changed while the Redis that all replicas share cannot be asked."""

    status = 503
    code = "registry_unavailable"
    title = "Registry unavailable"


class DeadlineExceededError(IcmLoraError):
    """The request was not answered within its deadline."""

    status = 504
    code = "deadline_exceeded"
    title = "Deadline exceeded"


class MissingDependencyError(IcmLoraError):
    """An optional package, a system tool or the embedded weights are not installed."""

    code = "missing_dependency"
    title = "Missing dependency"
