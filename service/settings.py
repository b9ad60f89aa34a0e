"""Settings of the service: the only reader of the environment in `service`."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import InvalidInputError

ENV_PREFIX = "ICM_LORA_"

_NOTHING = "none"
_BUNDLES = Path(__file__).parent / "bundles"
_EMBEDDED_BUNDLE = _BUNDLES / "text-smollm2"
_EMBEDDED_DETECTION_BUNDLE = _BUNDLES / "detection-embedded"


def _unit(name: str) -> dict[str, str]:
    return {"unit": name}


class Settings(BaseSettings):
    """Everything that an operator may change, each as `ICM_LORA_<NAME>`.

    The defaults serve the embedded bundle on the embedded base model, without Redis.
    Limits on a request's fields are constants of `service.api.requests`, because they are
    part of the published API.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    host: Annotated[
        str, Field(description="Address to listen on.", json_schema_extra=_unit("address"))
    ] = "127.0.0.1"
    port: Annotated[
        int,
        Field(
            ge=0,
            le=65_535,
            description="TCP port to listen on; 0 takes a free one.",
            json_schema_extra=_unit("port"),
        ),
    ] = 8000
    metrics_port: Annotated[
        int | None,
        Field(
            ge=1,
            le=65_535,
            description="TCP port of `/metrics` alone, without a key; unset: `/metrics` is on "
            "the main port, and needs the scope `admin` where there are API keys.",
            json_schema_extra=_unit("port"),
        ),
    ] = None
    metrics_host: Annotated[
        str,
        Field(
            description="Address that the metrics port listens on.",
            json_schema_extra=_unit("address"),
        ),
    ] = "127.0.0.1"
    api_keys_file: Annotated[
        Path | None,
        Field(
            description="JSON list of API keys (`icm-lora keys new` makes one); unset: everybody "
            "may do everything.",
            json_schema_extra=_unit("path"),
        ),
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(description="Least severe log line written.", json_schema_extra=_unit("level")),
    ] = "info"
    otlp_endpoint: Annotated[
        str,
        Field(
            pattern="^(https?://.+)?$",
            description="OpenTelemetry collector that traces are sent to by OTLP over HTTP "
            "(`http://127.0.0.1:4318`); needs the extra `otel`. Empty: no traces.",
            json_schema_extra=_unit("URL"),
        ),
    ] = ""
    bundle: Annotated[
        Path | None,
        Field(
            description="Folder of the generator bundle for text; the default ships with the "
            "code. `none`: no text.",
            json_schema_extra=_unit("path"),
        ),
    ] = _EMBEDDED_BUNDLE
    base: Annotated[
        str | None,
        Field(
            description="Base model (`embedded:...`, folder or hub id); unset: the one that the "
            "bundle names. Its digest must match the bundle's.",
            json_schema_extra=_unit("reference"),
        ),
    ] = None
    detection_bundle: Annotated[
        Path | None,
        Field(
            description="Folder of the generator bundle for detection in images; the default "
            "is served where it is there. `none` or empty: no detection.",
            json_schema_extra=_unit("path"),
        ),
    ] = _EMBEDDED_DETECTION_BUNDLE
    detection_base: Annotated[
        str | None,
        Field(
            description="Base model of the detection bundle, as `ICM_LORA_BASE`.",
            json_schema_extra=_unit("reference"),
        ),
    ] = None
    cache_dir: Annotated[
        Path | None,
        Field(
            description="Folder for weights derived from embedded models; unset: "
            "`~/.cache/icm-lora`.",
            json_schema_extra=_unit("path"),
        ),
    ] = None
    device: Annotated[
        str,
        Field(
            description="Device of the base model: `auto` (GPU where there is one), `cpu`, "
            "`cuda`, ... Adapters are generated on the CPU, so that all replicas make the same.",
            json_schema_extra=_unit("device"),
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Field(
            description="Dtype of base models; `auto` is bfloat16. A base that a bundle ships "
            "has its own.",
            json_schema_extra=_unit("dtype"),
        ),
    ] = "auto"
    torch_threads: Annotated[
        int,
        Field(
            ge=0,
            description="CPU threads of one torch operation; 0 leaves torch's own choice, and "
            "binds each to a core.",
            json_schema_extra=_unit("threads"),
        ),
    ] = 0
    redis_url: Annotated[
        SecretStr,
        Field(
            description="Redis shared by replicas (`redis://host:6379/0`); empty: no Redis.",
            json_schema_extra=_unit("URL"),
        ),
    ] = SecretStr("")
    redis_timeout_seconds: Annotated[
        float,
        Field(
            gt=0,
            le=10,
            description="Longest wait for Redis, to connect and to answer.",
            json_schema_extra=_unit("seconds"),
        ),
    ] = 0.25
    redis_retry_seconds: Annotated[
        float,
        Field(
            gt=0,
            description="Pause after a Redis error before Redis is asked again.",
            json_schema_extra=_unit("seconds"),
        ),
    ] = 2.0
    redis_secret: Annotated[
        SecretStr,
        Field(
            description="Signs what is written to Redis (HMAC-SHA256), the same for all replicas; "
            "a value without a right signature is deleted and generated again. Empty: values "
            "carry a checksum only, so whoever can write to Redis decides what is served.",
            json_schema_extra=_unit("secret"),
        ),
    ] = SecretStr("")
    redis_lock_seconds: Annotated[
        float,
        Field(
            gt=0,
            le=60,
            description="Longest wait for another replica that generates the same adapter.",
            json_schema_extra=_unit("seconds"),
        ),
    ] = 2.0
    adapter_ttl_seconds: Annotated[
        int,
        Field(
            ge=1,
            le=31_536_000,
            description="Time that a generated adapter stays cached where the request names none.",
            json_schema_extra=_unit("seconds"),
        ),
    ] = 86_400
    process_cache_bytes: Annotated[
        int,
        Field(
            ge=0,
            description="Size of the in-process adapter cache (least recently used leave).",
            json_schema_extra=_unit("bytes"),
        ),
    ] = 268_435_456
    pinned_bytes: Annotated[
        int,
        Field(
            ge=0,
            description="Memory for the adapters of pinned aliases, beside the cache.",
            json_schema_extra=_unit("bytes"),
        ),
    ] = 67_108_864
    runtime_lora_updating: Annotated[
        bool,
        Field(
            description="Serve vLLM's `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, which "
            "make and delete aliases.",
            json_schema_extra=_unit("flag"),
        ),
    ] = False
    out_of_distribution: Annotated[
        Literal["reject", "nearest", "base", "generate"],
        Field(
            description="What to do with a task unlike all training tasks where the request does "
            "not say: 422, the nearest task's adapter, the base model, or its adapter anyway.",
            json_schema_extra=_unit("policy"),
        ),
    ] = "reject"
    num_slots: Annotated[
        int,
        Field(
            ge=1,
            description="Adapters resident beside each base model, ready to answer.",
            json_schema_extra=_unit("slots"),
        ),
    ] = 256
    max_batch_rows: Annotated[
        int,
        Field(
            ge=1,
            description="Requests decoded together in one batch.",
            json_schema_extra=_unit("rows"),
        ),
    ] = 16
    batch_window_seconds: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Time that a batch waits for more requests; 0 never waits.",
            json_schema_extra=_unit("seconds"),
        ),
    ] = 0.0
    max_queue: Annotated[
        int,
        Field(
            ge=1,
            description="Requests waiting for a batch; further ones get 429, but for tenants that "
            "have less than their equal share: twice as many at most.",
            json_schema_extra=_unit("requests"),
        ),
    ] = 256
    max_queue_tokens: Annotated[
        int,
        Field(
            ge=1,
            description="Tokens that the waiting requests may ask for together; further ones get "
            "429, with the same exception. So does what would miss its deadline in its tenant's "
            "turn.",
            json_schema_extra=_unit("tokens"),
        ),
    ] = 65_536
    max_prompt_tokens: Annotated[
        int,
        Field(
            ge=1,
            description="Longest prompt after tokenisation.",
            json_schema_extra=_unit("tokens"),
        ),
    ] = 2048
    request_deadline_seconds: Annotated[
        float,
        Field(
            gt=0,
            description="Time within which a completion, or a refinement, must be done, else 504.",
            json_schema_extra=_unit("seconds"),
        ),
    ] = 60.0
    max_body_bytes: Annotated[
        int,
        Field(
            ge=1024,
            description="Largest request body; larger ones get 413.",
            json_schema_extra=_unit("bytes"),
        ),
    ] = 262_144
    max_image_bytes: Annotated[
        int,
        Field(
            ge=1024,
            description="Largest request body of the routes that take images, `/infer` and "
            "`/generate-lora`; base64 makes a file a third larger.",
            json_schema_extra=_unit("bytes"),
        ),
    ] = 12_582_912
    max_adapter_bytes: Annotated[
        int,
        Field(
            ge=1024,
            description="Largest request body of the routes that take adapters, `/v1/adapters` "
            "and `/v1/load_lora_adapter`; base64 makes a file a third larger.",
            json_schema_extra=_unit("bytes"),
        ),
    ] = 33_554_432
    max_image_pixels: Annotated[
        int,
        Field(
            ge=1,
            description="Most pixels of an image, and of all images of one request.",
            json_schema_extra=_unit("pixels"),
        ),
    ] = 25_000_000
    header_timeout_seconds: Annotated[
        float,
        Field(
            gt=0,
            description="Time within which a request's head must arrive.",
            json_schema_extra=_unit("seconds"),
        ),
    ] = 10.0
    body_timeout_seconds: Annotated[
        float,
        Field(
            gt=0,
            description="Time within which a request's body must arrive, else 408.",
            json_schema_extra=_unit("seconds"),
        ),
    ] = 30.0
    tenant_requests_per_second: Annotated[
        float,
        Field(
            ge=0,
            description="Requests of one tenant, on average; further ones get 429. 0: no limit. "
            "This and the following limits can be set for one tenant in the keys file.",
            json_schema_extra=_unit("requests/s"),
        ),
    ] = 0.0
    tenant_request_burst: Annotated[
        int,
        Field(
            ge=1,
            description="Requests of one tenant at once, after a pause.",
            json_schema_extra=_unit("requests"),
        ),
    ] = 20
    tenant_concurrent_requests: Annotated[
        int,
        Field(
            ge=0,
            description="Requests of one tenant that may be in progress; 0: no limit.",
            json_schema_extra=_unit("requests"),
        ),
    ] = 0
    tenant_tokens_per_minute: Annotated[
        int,
        Field(
            ge=0,
            description="Tokens generated for one tenant; a request counts with what it may "
            "generate until it is done. 0: no limit.",
            json_schema_extra=_unit("tokens/min"),
        ),
    ] = 0
    tenant_adapter_bytes: Annotated[
        int,
        Field(
            ge=0,
            description="Adapters of one tenant in this process; further ones get 429. "
            "0: no limit.",
            json_schema_extra=_unit("bytes"),
        ),
    ] = 0
    tenant_pinned_bytes: Annotated[
        int,
        Field(
            ge=0,
            description="Adapters of one tenant's pinned aliases, of `ICM_LORA_PINNED_BYTES` for "
            "all; further ones get 429. 0: no limit.",
            json_schema_extra=_unit("bytes"),
        ),
    ] = 0
    shutdown_delay_seconds: Annotated[
        float,
        Field(
            ge=0,
            description="Time between SIGTERM (readiness turns 503) and the first request that is "
            "refused with 503, so that a load balancer notices; 5 suits Kubernetes.",
            json_schema_extra=_unit("seconds"),
        ),
    ] = 0.0
    drain_grace_seconds: Annotated[
        float,
        Field(
            gt=0,
            description="Time that running requests get to finish at shutdown, else they get 503.",
            json_schema_extra=_unit("seconds"),
        ),
    ] = 20.0

    @field_validator("bundle", "detection_bundle", mode="before")
    @classmethod
    def _read_nothing(cls, value: object) -> object:
        return None if isinstance(value, str) and value.lower() in ("", _NOTHING) else value

    @field_validator("detection_bundle")
    @classmethod
    def _find_shipped(cls, value: Path | None) -> Path | None:
        return None if value == _EMBEDDED_DETECTION_BUNDLE and not value.is_dir() else value

    @model_validator(mode="after")
    def _check_something_to_serve(self) -> "Settings":
        if self.bundle is None and self.detection_bundle is None:
            raise ValueError(
                f"nothing to serve: name a bundle in {ENV_PREFIX}BUNDLE or "
                f"{ENV_PREFIX}DETECTION_BUNDLE"
            )
        return self


def read_settings() -> Settings:
    """Reads the environment.

    Raises:
        InvalidInputError: a value is wrong, or an `ICM_LORA_*` variable is unknown, so that a
            typing error never silently leaves a default in place. No value is repeated in the
            message, because a URL may hold a password.
    """
    _refuse_unknown(os.environ)
    try:
        # An empty value means the default, but here there is something to turn off.
        turned_off = os.environ.get(f"{ENV_PREFIX}DETECTION_BUNDLE") == ""
        return Settings(detection_bundle=None) if turned_off else Settings()
    except ValidationError as error:
        problems = [
            f"{ENV_PREFIX}{'.'.join(map(str, item['loc'])).upper()}: {item['msg']}"
            if item["loc"]
            else item["msg"]
            for item in error.errors(include_url=False, include_input=False)
        ]
        raise InvalidInputError("; ".join(problems)) from None


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    known = [f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields]
    for name in sorted(environment):
        if not name.upper().startswith(ENV_PREFIX) or name.upper() in known:
            continue
        near = difflib.get_close_matches(name.upper(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else "remove it"
        if environment[name].startswith("tcp://") or name.endswith(("_HOST", "_PORT")):
            hint += " (Kubernetes injects such names: set enableServiceLinks: false)"
        raise InvalidInputError(f"unknown setting {name}: {hint}")


def render_settings_table() -> str:
    """Markdown table of every setting; README.md holds it between its `settings` markers."""
    lines = ["| Variable | Default | Unit | Meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict), f"setting {name} has no unit"
        assert field.description, f"setting {name} has no description"
        variable = f"`{ENV_PREFIX}{name.upper()}`"
        lines.append(
            f"| {variable} | {_render_default(field.default)} | {extra['unit']} "
            f"| {field.description} |"
        )
    return "\n".join(lines)


def _render_default(value: object) -> str:
    if isinstance(value, Path):
        value = value.relative_to(Path(__file__).parent.parent).as_posix()
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    return "(unset)" if value is None else "(empty)" if value == "" else f"`{value}`"
