"""`POST /admin/reload`, for administrators' keys."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter

from server.backends import BackendError, BackendInfo
from server.http.answers import ModelAnswer, model_answer
from server.http.reference import problem_response, problem_responses
from server.inference.errors import Unprocessable
from server.inference.service import Service

__all__ = ["admin_router"]


def admin_router(
    service: Service, reload: Callable[[], Awaitable[BackendInfo]], on_reloaded: Callable[[], None]
) -> APIRouter:
    """The routes under `/admin`. `server.http.access` guards them.

    Args:
        service: has the networks.
        reload: loads all networks again and lets them serve, or raises BackendError.
        on_reloaded: called after that.
    """
    router = APIRouter(prefix="/admin", tags=["administration"])

    @router.post(
        "/reload",
        summary="Load all networks from their files again",
        responses=_RELOAD_RESPONSES,
        # Basic is not offered: browsers send it by themselves.
        openapi_extra={"security": [{"bearer": []}, {"header": []}]},
    )
    async def load_again() -> ModelAnswer:
        """Load all networks from their files again; answers with the model card once they serve."""
        try:
            await reload()
        except BackendError as error:
            raise Unprocessable(
                f"The new network cannot serve, the one from before goes on: {error}"
            ) from error
        on_reloaded()
        return model_answer(service.networks)

    return router


_RELOAD_RESPONSES: dict[int | str, dict[str, Any]] = {
    **problem_responses(403, 404),
    422: problem_response(
        422,
        "The network in the file cannot serve, the one from before goes on.",
        "The new network cannot serve, the one from before goes on: ONNX Runtime cannot load"
        " model/weights/slsnet.onnx.",
        "/admin/reload",
    ),
}
