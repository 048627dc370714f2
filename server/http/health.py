"""Health, the model card and metrics."""

from fastapi import APIRouter
from starlette.responses import Response

from server.http.answers import ModelAnswer, StatusAnswer, model_answer
from server.http.parameters import NetworkName
from server.http.reference import problem_responses, unknown_network
from server.inference.service import Service

__all__ = ["health_router"]

_PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


def health_router(service: Service) -> APIRouter:
    """The routes `/health`, `/model` and `/metrics`."""
    router = APIRouter()

    @router.get("/health/live", tags=["health"], summary="Whether the process works")
    async def live() -> StatusAnswer:
        return StatusAnswer(status="live")

    @router.get(
        "/health/ready",
        tags=["health"],
        summary="Whether to send requests here",
        responses=problem_responses(503),
    )
    async def ready() -> StatusAnswer:
        service.check_server_ready()
        return StatusAnswer(status="ready", backend=service.backend.name)

    @router.get(
        "/model",
        tags=["model"],
        summary="The model card of a network, and which others there are",
        responses={**problem_responses(503), **unknown_network()},
    )
    async def card(
        model: NetworkName = None,
    ) -> ModelAnswer:
        return model_answer(service.networks, model)

    @router.get(
        "/metrics",
        tags=["health"],
        summary="Figures for Prometheus",
        response_class=Response,
        responses={
            200: {
                "content": {
                    "text/plain": {
                        "schema": {"type": "string"},
                        "example": "# HELP slsnet_requests_in_flight Segmentation requests being"
                        " worked on or waiting\n# TYPE slsnet_requests_in_flight gauge\n"
                        "slsnet_requests_in_flight 3.0\n",
                    }
                }
            }
        },
    )
    async def prometheus() -> Response:
        return Response(service.metrics.render(), headers={"Content-Type": _PROMETHEUS_TEXT})

    return router
