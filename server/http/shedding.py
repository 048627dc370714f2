"""A full server refuses a request at its head, before a task is made or the framework runs.

Refusals take time from the requests that are served: in the framework one cost nearly half of an
answer. Here admission's counters alone decide (`Door`), and the layers around the framework answer
(`Shedding`), with the same keys, CORS, headers, metrics and log. Other faults of a refused request,
such as its parameters or type, are told when it comes again.

Many refusals still cost much, and a client that is refused at once comes back at once. So refusals
have a pace. A request beyond it waits with its body unread, which slows its sender down. Then it is
checked once more, and let in if there is room by now.

It is hand-written because libraries for rate limits count requests and time, where this depends on
the queue, the bytes in flight and the pace.
"""

import asyncio
import math
import time

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn._types import HTTPScope

from server.http.admitted import admitted
from server.http.context import CAME
from server.http.prefix import without_prefix
from server.http.problems import answer_problem
from server.inference.errors import Overloaded
from server.inference.service import Service

__all__ = ["Door", "Shedding"]

_REFUSAL = "refusal"

# Refusals a second, in the long run and beyond those at once: some percent of a core.
_PER_S = 250
_AT_ONCE = 50

# A request waits to be refused for at most this share of the time that it may take.
_PATIENCE = 0.1


class Door:
    """What connections ask before they start a task."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._coming = [0, 0]
        """Numbers of interactive and bulk requests that were let in and have no place yet."""
        self._last = -math.inf
        """When the last refusal is due by their pace, second of `time.perf_counter`."""

    def refuses(self, scope: HTTPScope) -> float | None:
        """Seconds until a request for a place, whose body has not come, is to be refused.

        None lets it in. Ask again after the wait: the request is refused at once then (0), or let
        in. The scope says to `Shedding` what it is refused for.
        """
        came = scope["state"].setdefault(CAME, time.perf_counter())
        refused = scope["state"].pop(_REFUSAL, None)
        service = self._service
        route = admitted(without_prefix(scope["path"], service.settings.root_path))
        if route is None or scope["method"] != "POST" or not service.networks.default.works:
            return None
        headers = Headers(raw=list(scope["headers"]))
        bulk = route.is_bulk(headers.get("priority", ""))
        asked = headers.get("x-request-timeout-ms")
        try:
            asked_ms = None if asked is None else float(asked)
        except ValueError:
            return None
        if asked_ms is not None and not 0 < asked_ms < math.inf:
            # The framework will say what is wrong with it.
            return None
        timeout_s = route.timeout_s(service.settings, asked_ms)
        coming = self._coming
        try:
            service.gate.check_room(
                deadline=came + timeout_s,
                bulk=bulk,
                coming=coming[bulk],
                others_coming=coming[not bulk],
            )
        except Overloaded as problem:
            scope["state"][_REFUSAL] = problem.with_traceback(None)
            return 0 if refused else self._wait_s(timeout_s * _PATIENCE)
        if not any(coming):
            # Once all requests that have come by now have a place, or are refused.
            asyncio.get_running_loop().call_soon(self._let_in)
        coming[bulk] += 1
        return None

    def _wait_s(self, most: float) -> float:
        """Seconds until the next refusal is due, but at most so many."""
        now = time.perf_counter()
        due = max(self._last, now - _AT_ONCE / _PER_S) + 1 / _PER_S
        due = min(due, now + most)
        self._last = max(self._last, due)
        return max(0.0, due - now)

    def _let_in(self) -> None:
        self._coming = [0, 0]


class Shedding:
    """ASGI layer that refuses requests for which the `Door` is closed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem: Overloaded | None = scope.get("state", {}).get(_REFUSAL)
        if problem is None:
            await self._app(scope, receive, send)
            return
        # Those who count it take its path.
        scope["route"] = admitted(scope["path"])
        response = answer_problem(Request(scope), problem)
        await response(scope, receive, send)
