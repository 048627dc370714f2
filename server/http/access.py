"""Access: API keys, their rate, pages of other origins, and routes for administrators.

A page cannot set headers of a WebSocket, so there the key may come as a subprotocol. And a browser
opens a WebSocket to any server, with whatever credentials it has for that: CORS holds for answers
of HTTP only. So the page's origin is checked here.

The rate is a hand-written token bucket of a dozen lines: a library (limits, slowapi) has stores and
strategies for several processes, and this one only divides the rate by the number of workers.
"""

import base64
import binascii
import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from server.http.errors import Forbidden, NotFound, TooManyRequests, Unauthorized
from server.http.problems import STREAM_PROTOCOL, answer_problem, end_stream
from server.inference.errors import Problem
from server.keys import Key, KeyFile

__all__ = ["KEY", "KEY_PROTOCOL", "OPEN", "SPEND", "Access"]

OPEN = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
"""Paths that never need a key."""

KEY_PROTOCOL = "slsnet.key."
"""A subprotocol of a WebSocket that begins so is the API key."""

_ADMIN = ("/admin/", "/v2/repository/models/")
"""Paths that begin so are for administrators."""

KEY = "key"
"""Name in a WebSocket's state: the digest of its API key."""

SPEND = "spend"
"""Name in a WebSocket's state: a function that counts one more request of its key, or raises."""


@dataclass
class _Bucket:
    """The requests that a key may still send now (a token bucket)."""

    tokens: float
    filled: float


class Access:
    """ASGI layer that asks for a key; without a file everything but administrators' paths is open.

    The name of the key is put into the request's state as `client`.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyFile | None,
        *,
        metrics_keyed: bool,
        requests_per_s: float,
        burst: int,
        origins: Collection[str] = (),
    ) -> None:
        """Guard `app` by the keys of a file.

        Args:
            keys: the known keys; None lets everybody in.
            metrics_keyed: whether `/metrics` needs a key too.
            requests_per_s: what each key may send in the long run; 0 for no limit.
            burst: requests that a key may send at once.
            origins: those whose pages may open a WebSocket beside the server's own; `*` is all.
        """
        self._app = app
        self._keys = keys
        self._open = (*OPEN, *(() if metrics_keyed else ("/metrics",)))
        self._rate = requests_per_s
        self._burst = burst
        self._origins = origins
        self._buckets: dict[bytes, _Bucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            try:
                self._check(scope)
            except Problem as problem:
                if scope["type"] == "websocket":
                    await end_stream(WebSocket(scope, receive, send), problem)
                    return
                response = answer_problem(Request(scope), problem)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        path: str = scope["path"]
        headers = Headers(scope=scope)
        if scope["type"] == "websocket":
            self._check_origin(headers)
        is_admin = path == "/admin" or path.startswith(_ADMIN)
        if is_admin and (self._keys is None or not self._keys.has_admin):
            raise NotFound(
                "There is nothing here unless the server has an administrator's key: see"
                " `python -m server.keys new --help`."
            )
        if self._keys is None or path in self._open:
            return
        key = self._key(headers, scope.get("subprotocols", ()), basic=not is_admin)
        scope["state"]["client"] = key.name
        scope["state"][KEY] = key.digest
        if is_admin and key.scope != "admin":
            raise Forbidden("This path needs an administrator's key: send one.")
        if self._rate:
            scope["state"][SPEND] = partial(self._spend, key)
            self._spend(key)

    def _check_origin(self, headers: Headers) -> None:
        """Refuse pages of other sites; programs that are no browsers send no origin."""
        origin = headers.get("origin")
        if origin is None or origin in self._origins or "*" in self._origins:
            return
        if urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            raise Forbidden(
                f"Pages of {origin[:80]} may not use this server: its --cors-origins names those"
                " that may."
            )

    def _key(self, headers: Headers, protocols: Collection[str], *, basic: bool) -> Key:
        """The request's key; Basic, which browsers send by themselves, counts only if `basic`."""
        assert self._keys is not None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        shown = headers.get("x-api-key", "")
        if scheme.lower() == "bearer":
            shown = given.strip()
        elif scheme.lower() == "basic" and basic:
            shown = _password(given.strip())
        for protocol in protocols:
            if protocol.startswith(KEY_PROTOCOL):
                shown = protocol.removeprefix(KEY_PROTOCOL)
        if not shown:
            in_a_page = f", for a WebSocket also as the subprotocol `{KEY_PROTOCOL}KEY` beside"
            in_a_page += f" `{STREAM_PROTOCOL}`"
            raise Unauthorized(
                "This path needs an API key: send it as `Authorization: Bearer KEY` or"
                f" `X-API-Key: KEY`{in_a_page if protocols else ''}."
            )
        key = self._keys.find(shown)
        if key is None:
            raise Unauthorized("The API key is not known here.")
        return key

    def _spend(self, key: Key) -> None:
        now = time.monotonic()
        bucket = self._buckets.setdefault(key.digest, _Bucket(self._burst, now))
        bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.filled) * self._rate)
        bucket.filled = now
        if bucket.tokens < 1:
            wait_s = math.ceil((1 - bucket.tokens) / self._rate)
            raise TooManyRequests(
                f"This key may send {self._rate:g} requests a second. Try again in {wait_s} s"
                " (Retry-After).",
                wait_s,
                "key_rate",
            )
        bucket.tokens -= 1


def _password(encoded: str) -> str:
    """The password of HTTP Basic (RFC 7617); empty if there is none."""
    try:
        decoded = base64.b64decode(encoded, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return decoded.partition(":")[2]
