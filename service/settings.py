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
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(description="Least severe log line written.", json_schema_extra=_unit("level")),
    ] = "info"
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
            description="CPU threads of one torch operation; 0 leaves torch's own choice.",
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
            description="Requests waiting for a batch; further ones get 429.",
            json_schema_extra=_unit("requests"),
        ),
    ] = 256
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
            description="Time within which a completion must be done, else 504.",
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
    max_image_pixels: Annotated[
        int,
        Field(
            ge=1,
            description="Most pixels of an image, and of all images of one request.",
            json_schema_extra=_unit("pixels"),
        ),
    ] = 25_000_000
    shutdown_delay_seconds: Annotated[
        float,
        Field(
            ge=0,
            description="Time between SIGTERM (readiness turns 503) and the closing of the port, "
            "so that a load balancer notices; 5 suits Kubernetes.",
            json_schema_extra=_unit("seconds"),
        ),
    ] = 0.0
    drain_grace_seconds: Annotated[
        float,
        Field(
            gt=0,
            description="Time that running requests get to finish at shutdown.",
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
