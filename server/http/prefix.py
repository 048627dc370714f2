"""Paths below a prefix that a proxy in front of the server does not strip."""

from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["UnderPrefix", "without_prefix"]


def without_prefix(path: str, prefix: str) -> str:
    """The path without `prefix` (empty for none); a path that is not below it stays as it is."""
    if not f"{path}/".startswith(f"{prefix}/"):
        return path
    return path.removeprefix(prefix) or "/"


class UnderPrefix:
    """ASGI layer that takes the prefix off a path; paths without it stay as they are.

    So a server answers proxies that strip the prefix, proxies that do not, and direct requests,
    such as for its health.
    """

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            path: str = scope["path"]
            if (below := without_prefix(path, self._prefix)) != path:
                scope = {**scope, "path": below}
        await self._app(scope, receive, send)
