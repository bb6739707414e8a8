"""`GET /metrics`: for Prometheus."""

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response

from engine.server.exposition import MetricsCollector
from engine.server.service import Service


def metrics_router(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter()
    registry = CollectorRegistry()
    registry.register(MetricsCollector(service))
    ProcessCollector(registry=registry)

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        tags=["Operations"],
    )
    async def metrics() -> Response:
        """Give all metrics in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return router
