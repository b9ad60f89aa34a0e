"""Prometheus exposition."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.dependencies import StateDep
from service.api.openapi import document_problems

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        **document_problems(),
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
    },
)
async def read_metrics(request: Request, state: StateDep) -> Response:
    """All metrics in Prometheus' text format, or OpenMetrics where asked for."""
    body, content_type = state.metrics.render(request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type})
