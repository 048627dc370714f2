"""What only an administrator's key opens: `POST /admin/reload`."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter

from server.answers import ModelAnswer, model_answer
from server.backends import BackendError, BackendInfo
from server.problems import Unprocessable

__all__ = ["admin_router"]


def admin_router(
    reload: Callable[[], Awaitable[BackendInfo]], on_reloaded: Callable[[], None]
) -> APIRouter:
    """The routes under `/admin`; `server.access` guards them.

    Args:
        reload: loads the network anew and lets it serve, or raises BackendError.
        on_reloaded: called when that has gone well.
    """
    router = APIRouter(prefix="/admin", include_in_schema=False)

    @router.post("/reload")
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
