"""Liveness and readiness, for orchestrators and load balancers."""

from fastapi import APIRouter

from service.api.auth import GuardedRoute, needs
from service.api.dependencies import Phase, StateDep
from service.api.openapi import document_problems
from service.api.schemas import Liveness, Readiness
from service.errors import NotReadyError

router = APIRouter(tags=["health"], route_class=GuardedRoute)


@router.get("/health/live", responses=document_problems(NotReadyError))
@needs(None)
async def read_liveness(state: StateDep) -> Liveness:
    """200 while the process is worth keeping; 503 once loading the models has failed."""
    if state.phase is Phase.FAILED:
        raise NotReadyError("the models could not be loaded: see the log")
    return Liveness(status="live")


@router.get("/health/ready", responses=document_problems(NotReadyError))
@needs(None)
async def read_readiness(state: StateDep) -> Readiness:
    """200 while requests are welcome, with the lost components; 503 while loading or draining."""
    if state.phase is not Phase.READY or state.resources is None:
        raise NotReadyError(f"the service is {state.phase.value}")
    return Readiness(status="ready", degraded=state.resources.list_lost())
