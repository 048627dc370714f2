"""Too many are told so at the head of their request, before a task is made or the framework asked.

What a refusal costs is taken from those that are served: by way of the framework it was nearly half
of an answer. Here admission's counters alone decide (`Door`), and the answer is made by the
layers around the framework, so that it is the framework's in all but its cost: keys, CORS,
headers, metrics and log are theirs (`Shedding`). Whatever else may be wrong with a request that is
refused so, its parameters or its type, it is told when it comes again.
"""

import asyncio
import math
import time
from types import SimpleNamespace

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn._types import HTTPScope

from server.http.openinference.protocol import INFER_PATHS
from server.http.parameters import is_bulk
from server.http.prefix import without_prefix
from server.http.problems import answer
from server.inference.errors import Overloaded
from server.inference.service import Service

__all__ = ["Door", "Shedding"]

_BATCH = "/segment/batch"

_ROUTES = {
    path: SimpleNamespace(path=route)
    for path, route in {
        **{path: path for path in ("/segment", "/segment/json", _BATCH)},
        **INFER_PATHS,
    }.items()
}
"""What takes a place in the queue, and for those who count it what the framework calls it."""

_REFUSAL = "refusal"


class Door:
    """What connections ask before they start a task."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._coming = [0, 0]
        """Interactive and bulk requests that have been let pass and have no place yet."""

    def refuses(self, scope: HTTPScope) -> bool:
        """Whether a request for a place, whose body has not come, would be refused one now.

        If so the scope says it to `Shedding`.
        """
        service = self._service
        path = without_prefix(scope["path"], service.settings.root_path)
        if path not in _ROUTES or scope["method"] != "POST" or not service.networks.works:
            return False
        headers = Headers(raw=list(scope["headers"]))
        bulk = path == _BATCH or is_bulk(headers.get("priority", ""))
        asked = headers.get("x-request-timeout-ms")
        try:
            asked_ms = None if asked is None else float(asked)
        except ValueError:
            return False
        if asked_ms is not None and not 0 < asked_ms < math.inf:
            # The framework says what is wrong with it.
            return False
        settings = service.settings
        timeout_s = (settings.bulk_timeout_s if path == _BATCH else settings.timeout_s)(asked_ms)
        coming = self._coming
        try:
            service.gate.check_room(
                deadline=time.perf_counter() + timeout_s,
                bulk=bulk,
                coming=coming[bulk],
                others_coming=coming[not bulk],
            )
        except Overloaded as problem:
            scope["state"][_REFUSAL] = problem.with_traceback(None)
            return True
        if not any(coming):
            # When all that has come by now has run, up to its place or its own refusal.
            asyncio.get_running_loop().call_soon(self._let_in)
        coming[bulk] += 1
        return False

    def _let_in(self) -> None:
        self._coming = [0, 0]


class Shedding:
    """ASGI layer that answers for the framework where the `Door` is closed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem: Overloaded | None = scope.get("state", {}).get(_REFUSAL)
        if problem is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = _ROUTES[scope["path"]]
        scope["state"]["reason"] = problem.reason
        response = answer(Request(scope), problem.status, problem.detail, problem.headers)
        await response(scope, receive, send)
