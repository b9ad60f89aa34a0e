"""The application: `create_app(settings)` wires routes, middleware, errors and the lifespan."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig

from service.api.auth import Authentication, check_routes, describe_security
from service.api.dependencies import Phase, ServiceState
from service.api.drain_gate import DrainGate
from service.api.error_handlers import add_error_handlers
from service.api.keys import read_keys
from service.api.loading import open_resources
from service.api.metrics_server import serve_metrics
from service.api.middleware import BodyLimit, HeadLimit, RequestScope
from service.api.openai import routes as openai_routes
from service.api.openapi import build_openapi
from service.api.quotas import Quotas, RequestLimit
from service.api.routes import adapters, aliases, generate, health, infer, lora_updating, metrics
from service.api.traced_requests import TracedRequests
from service.errors import IcmLoraError
from service.logs import describe_exception
from service.metrics import ServiceMetrics
from service.settings import Settings
from service.tracing import open_tracing

_IMAGE_PATHS = ("/infer", "/generate-lora")
_UPLOAD_PATHS = ("/v1/adapters", "/v1/load_lora_adapter")
_NO_TELEMETRY: TelemetryConfig = {
    "auto_configure": False,
    "tracing": False,
    "metrics": False,
    "logs": False,
}
"""FastAPI's own, which `OTEL_*` variables turn on, may quote what requests hold; ours does not."""

_logger = logging.getLogger("service")

_DESCRIPTION = """\
A task in words becomes a LoRA adapter, and the adapter answers at once: with text, or with the
boxes of what it finds in an image.

Errors are problem details (RFC 9457), on OpenAI's routes of OpenAI's shape; their `code` is
stable. Send `X-Request-ID`
(`[A-Za-z0-9._-]`, at most 64 characters) to find a request in the service's log.
"""


def create_app(settings: Settings) -> FastAPI:
    """Builds the application; models load in its lifespan, in the background.

    Until they are loaded `/health/ready` and all that needs them answer 503.

    Raises:
        InvalidInputError: the file of API keys is missing or wrong.
        MissingDependencyError: traces are wanted, but their packages are not installed.
    """
    keys = None if settings.api_keys_file is None else read_keys(settings.api_keys_file)
    service_metrics = ServiceMetrics(bool(settings.redis_url.get_secret_value()))
    quotas = Quotas(settings, keys.limits if keys else {}, service_metrics.on_rejection)
    state = ServiceState(settings, service_metrics, quotas)
    state.metrics.watch_phase(tuple(Phase), lambda: state.phase)
    app = FastAPI(
        title="ICM-LoRA",
        version=version("icm-lora"),
        summary="A task in words becomes a LoRA adapter.",
        description=_DESCRIPTION,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=_live,
        redirect_slashes=False,
        telemetry=_NO_TELEMETRY,
    )
    app.state.service = state
    for module in (generate, infer, adapters, aliases, openai_routes, health):
        app.include_router(module.router)
    if settings.metrics_port is None:
        app.include_router(metrics.router)
    if settings.runtime_lora_updating:
        app.include_router(lora_updating.router)
    check_routes(app.routes)
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        larger={
            **dict.fromkeys(_IMAGE_PATHS, settings.max_image_bytes),
            **dict.fromkeys(_UPLOAD_PATHS, settings.max_adapter_bytes),
        },
        timeout_seconds=settings.body_timeout_seconds,
    )
    app.add_middleware(RequestLimit, quotas=quotas)
    app.add_middleware(DrainGate, state=state, on_rejection=service_metrics.on_rejection)
    app.add_middleware(Authentication, keys=keys)
    app.add_middleware(HeadLimit)
    app.add_middleware(RequestScope, metrics=state.metrics)
    if settings.otlp_endpoint:
        state.tracing = open_tracing(settings.otlp_endpoint, version("icm-lora"))
        app.add_middleware(TracedRequests, tracing=state.tracing)
    add_error_handlers(app)
    _use_openapi(app, keys is not None)
    return app


@asynccontextmanager
async def _live(app: FastAPI) -> AsyncIterator[None]:
    """Loads in the background, so that probes get answers; closes what was opened."""
    state: ServiceState = app.state.service
    async with serve_metrics(state.settings, state.metrics):
        loading = asyncio.create_task(_load(state))
        try:
            yield
        finally:
            state.begin_drain()
            restoring = await loading
            if restoring is not None:
                restoring.cancel()
                await asyncio.wait({restoring})
            if state.resources is not None:
                await state.resources.close()
            if state.tracing is not None:
                await asyncio.to_thread(state.tracing.close)


async def _load(state: ServiceState) -> asyncio.Task[None] | None:
    """Opens the resources; what goes on afterwards, where it went well."""
    try:
        state.resources = await open_resources(state.settings, state.metrics, state.quotas)
    except Exception as error:
        detail = error.detail if isinstance(error, IcmLoraError) else str(error)
        fields = {"detail": detail, **describe_exception(error)}
        _logger.critical("the models could not be loaded", extra={"fields": fields})
        state.phase = Phase.FAILED
        state.on_load_failure()
        return None
    if state.phase is not Phase.LOADING:
        return None
    state.on_loaded()
    state.phase = Phase.READY
    resources, fields = state.resources, {}
    for service in resources.services:
        bundle = service.bundle
        state.metrics.set_build(
            service.modality,
            version=version("icm-lora"),
            bundle=bundle.name,
            bundle_version=bundle.version,
        )
        fields[f"{service.modality}_bundle"] = f"{bundle.name} {bundle.version}"
    _logger.info("ready", extra={"fields": fields})
    return asyncio.create_task(resources.restore_aliases(lambda: state.phase is Phase.READY))


def _use_openapi(app: FastAPI, keys_needed: bool) -> None:
    """Replaces FastAPI's document by ours, built once when first asked for."""

    def read_openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            app.openapi_schema = build_openapi(app)
            describe_security(app.routes, app.openapi_schema, keys_needed)
        return app.openapi_schema

    app.openapi = read_openapi  # type: ignore[method-assign]
