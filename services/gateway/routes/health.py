"""The routes of health: whether the process runs, and whether it can answer requests."""

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic_core import to_json

from services.gateway.problems import HttpProblem
from services.gateway.readiness import PROBE_PERIOD_S, Readiness


def build_router(readiness: Readiness) -> APIRouter:
    """Build the routes. They need no API key, so they do not say why a gateway is not ready."""
    routes = APIRouter(tags=["health"])

    @routes.get("/healthz", summary="Tell whether the process runs")
    async def healthz() -> Response:
        return Response(to_json({"status": "ok"}), media_type="application/json")

    @routes.get("/readyz", summary="Tell whether the gateway can answer requests")
    async def readyz() -> Response:
        if readiness.not_ready_reason:
            raise HttpProblem(
                "unavailable", "the gateway is not ready: a backend is unavailable", retry_after_s=PROBE_PERIOD_S
            )
        return Response(to_json({"status": "ready"}), media_type="application/json")

    return routes
