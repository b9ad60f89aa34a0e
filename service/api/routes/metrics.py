"""Prometheus exposition."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.auth import GuardedRoute, Scope, needs
from service.api.dependencies import StateDep
from service.api.metrics_server import render_metrics
from service.api.openapi import document_problems

router = APIRouter(tags=["health"], route_class=GuardedRoute)


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        **document_problems(),
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
    },
)
@needs(Scope.ADMIN)
async def read_metrics(request: Request, state: StateDep) -> Response:
    """All metrics in Prometheus' text format, or OpenMetrics where asked for.

    Absent where metrics have a port of their own.
    """
    return render_metrics(request, state.metrics)
