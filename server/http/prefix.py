"""Paths below a prefix that a proxy in front of the server adds and does not take away again."""

from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["UnderPrefix"]


class UnderPrefix:
    """ASGI layer that takes the prefix off a path; paths without it stay as they are.

    So the same server answers a proxy that strips the prefix, one that does not, and whoever asks
    it directly, such as for its health.
    """

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and f"{scope['path']}/".startswith(f"{self._prefix}/"):
            scope = {**scope, "path": scope["path"].removeprefix(self._prefix) or "/"}
        await self._app(scope, receive, send)
