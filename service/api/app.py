"""The application: `create_app(settings)` wires routes, middleware, errors and the lifespan."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from service.api.dependencies import Phase, ServiceState
from service.api.error_handlers import add_error_handlers
from service.api.loading import open_resources
from service.api.middleware import BodyLimit, RequestScope
from service.api.openapi import build_openapi
from service.api.routes import adapters, generate, health, infer, metrics
from service.errors import IcmLoraError
from service.logs import describe_exception
from service.metrics import ServiceMetrics
from service.settings import Settings

_IMAGE_PATHS = ("/infer", "/generate-lora")
_logger = logging.getLogger("service")

_DESCRIPTION = """\
A task in words becomes a LoRA adapter, and the adapter answers at once: with text, or with the
boxes of what it finds in an image.

Errors are problem details (RFC 9457); their `code` is stable. Send `X-Request-ID`
(`[A-Za-z0-9._-]`, at most 64 characters) to find a request in the service's log.
"""


def create_app(settings: Settings) -> FastAPI:
    """Builds the application; models load in its lifespan, in the background.

    Until they are loaded `/health/ready` and all that needs them answer 503.
    """
    state = ServiceState(settings, ServiceMetrics(bool(settings.redis_url.get_secret_value())))
    app = FastAPI(
        title="ICM-LoRA",
        version=version("icm-lora"),
        summary="A task in words becomes a LoRA adapter.",
        description=_DESCRIPTION,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=_live,
        redirect_slashes=False,
    )
    app.state.service = state
    for module in (generate, infer, adapters, health, metrics):
        app.include_router(module.router)
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        larger=dict.fromkeys(_IMAGE_PATHS, settings.max_image_bytes),
    )
    app.add_middleware(RequestScope, metrics=state.metrics)
    add_error_handlers(app)
    _use_openapi(app)
    return app


@asynccontextmanager
async def _live(app: FastAPI) -> AsyncIterator[None]:
    """Loads in the background, so that probes get answers; closes what was opened."""
    state: ServiceState = app.state.service
    loading = asyncio.create_task(_load(state))
    try:
        yield
    finally:
        state.begin_drain()
        await loading
        if state.resources is not None:
            await state.resources.close()


async def _load(state: ServiceState) -> None:
    try:
        state.resources = await open_resources(state.settings, state.metrics)
    except Exception as error:
        detail = error.detail if isinstance(error, IcmLoraError) else str(error)
        fields = {"detail": detail, **describe_exception(error)}
        _logger.critical("the models could not be loaded", extra={"fields": fields})
        state.phase = Phase.FAILED
        state.on_load_failure()
        return
    if state.phase is Phase.LOADING:
        state.phase = Phase.READY
        fields = {}
        for service in state.resources.services:
            bundle = service.bundle
            state.metrics.set_build(
                service.modality,
                version=version("icm-lora"),
                bundle=bundle.name,
                bundle_version=bundle.version,
            )
            fields[f"{service.modality}_bundle"] = f"{bundle.name} {bundle.version}"
        _logger.info("ready", extra={"fields": fields})


def _use_openapi(app: FastAPI) -> None:
    """Replaces FastAPI's document by ours, built once when first asked for."""

    def read_openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            app.openapi_schema = build_openapi(app)
        return app.openapi_schema

    app.openapi = read_openapi  # type: ignore[method-assign]
