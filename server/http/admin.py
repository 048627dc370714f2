"""What only an administrator's key opens: `POST /admin/reload`."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter

from server.backends import BackendError, BackendInfo
from server.http.answers import ModelAnswer, model_answer
from server.http.reference import problem_response, problem_responses
from server.inference.errors import Unprocessable

__all__ = ["admin_router"]


def admin_router(
    reload: Callable[[], Awaitable[BackendInfo]], on_reloaded: Callable[[], None]
) -> APIRouter:
    """The routes under `/admin`; `server.http.access` guards them.

    Args:
        reload: loads the network anew and lets it serve, or raises BackendError.
        on_reloaded: called when that has gone well.
    """
    router = APIRouter(prefix="/admin", tags=["administration"])

    @router.post(
        "/reload",
        summary="Load the network from its file again",
        responses=_RELOAD_RESPONSES,
        # Not Basic: browsers send that by themselves.
        openapi_extra={"security": [{"bearer": []}, {"header": []}]},
    )
    async def load_again() -> ModelAnswer:
        """Load the network from its file again; answers with the model card once it serves."""
        try:
            backend = await reload()
        except BackendError as error:
            raise Unprocessable(
                f"The network from before goes on, the new one cannot serve: {error}"
            ) from error
        on_reloaded()
        return model_answer(backend)

    return router


_RELOAD_RESPONSES: dict[int | str, dict[str, Any]] = {
    **problem_responses(403, 404),
    422: problem_response(
        422,
        "The network in the file cannot serve; the one from before goes on.",
        "The network from before goes on, the new one cannot serve: ONNX Runtime cannot load"
        " model/weights/slsnet.onnx.",
        "/admin/reload",
    ),
}
