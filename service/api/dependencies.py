"""State of the service and what routes may ask for, as `Annotated` aliases."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from fastapi import Depends, Request

from service.api.quotas import Quotas
from service.api.resources import Resources
from service.errors import AdapterNotFoundError, NotReadyError
from service.metrics import ServiceMetrics
from service.settings import Settings
from service.tracing import Tracing

ADAPTER_ID_PATTERN = "[0-9a-f]{64}"


class Phase(StrEnum):
    """Where the service is in its life."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    DRAINING = "draining"


@dataclass
class ServiceState:
    """The one mutable object of an application (`app.state.service`).

    Attributes:
        settings: as read at the start.
        metrics: metrics of this application.
        quotas: limits of the tenants.
        phase: set by the lifespan and by the server's shutdown.
        resources: models and caches; None until they are loaded.
        tracing: where traces are wanted.
        started: Unix time at which the application was built.
        running_requests: that were let in and are not yet answered in full.
        refuses_requests: whether new ones are refused, for good.
        on_loaded: called when the models are loaded, before the first request.
        on_load_failure: called when loading failed, so that the process can end.
    """

    settings: Settings
    metrics: ServiceMetrics
    quotas: Quotas
    phase: Phase = Phase.LOADING
    resources: Resources | None = None
    tracing: Tracing | None = None
    started: int = field(default_factory=lambda: int(time.time()))
    running_requests: int = 0
    refuses_requests: bool = False
    on_loaded: Callable[[], None] = field(default=lambda: None)
    on_load_failure: Callable[[], None] = field(default=lambda: None)

    @property
    def load_failed(self) -> bool:
        """Whether the models could not be loaded."""
        return self.phase is Phase.FAILED

    def begin_drain(self) -> None:
        """Readiness turns 503; requests are still answered until `refuses_requests`."""
        if self.phase is not Phase.FAILED:
            self.phase = Phase.DRAINING

    async def give_up(self) -> None:
        """Ends what still runs: its clients get 503."""
        if self.resources is not None:
            for service in self.resources.services:
                await service.scheduler.drain(0)


def get_state(request: Request) -> ServiceState:
    """State of the application that serves the request."""
    state: ServiceState = request.app.state.service
    return state


StateDep = Annotated[ServiceState, Depends(get_state)]


def get_resources(state: StateDep) -> Resources:
    """Loaded models.

    Raises:
        NotReadyError: they are still loading, or could not be loaded.
    """
    if state.resources is None:
        raise NotReadyError(f"the service is {state.phase.value}: try again later")
    return state.resources


ResourcesDep = Annotated[Resources, Depends(get_resources)]


def parse_adapter_id(adapter_id: str) -> str:
    """An id of the right form; anything else cannot name an adapter.

    Raises:
        AdapterNotFoundError: it is not 64 hexadecimal digits.
    """
    if not re.fullmatch(ADAPTER_ID_PATTERN, adapter_id):
        raise AdapterNotFoundError("an adapter's id is 64 hexadecimal digits: see /generate-lora")
    return adapter_id


AdapterIdDep = Annotated[str, Depends(parse_adapter_id)]
