"""Access: API keys, their rate, and routes for administrators."""

import base64
import binascii
import math
import time
from dataclasses import dataclass
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.problems import answer
from server.inference.errors import NotFound, Overloaded, Problem
from server.keys import Key, KeyFile

__all__ = ["OPEN", "Access", "Forbidden", "Unauthorized"]

OPEN = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
"""Paths that never need a key."""


class Unauthorized(Problem):
    """The request has no key, or an unknown one."""

    status = HTTPStatus.UNAUTHORIZED
    reason = "unauthorized"

    def __init__(self, detail: str) -> None:
        # Basic makes a browser ask for the key by itself.
        challenge = 'Bearer realm="slsnet", Basic realm="slsnet", charset="UTF-8"'
        super().__init__(detail, {"WWW-Authenticate": challenge})


class Forbidden(Problem):
    """The key does not open this path."""

    status = HTTPStatus.FORBIDDEN
    reason = "forbidden"


@dataclass
class _Bucket:
    """The requests that a key may still send now (a token bucket)."""

    tokens: float
    filled: float


class Access:
    """ASGI layer that asks for a key; without a file of keys everything but `/admin` is open.

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
    ) -> None:
        """Guard `app` by the keys of a file.

        Args:
            keys: the known keys; None lets everybody in.
            metrics_keyed: whether `/metrics` needs a key too.
            requests_per_s: what each key may send in the long run; 0 for no limit.
            burst: requests that a key may send at once.
        """
        self._app = app
        self._keys = keys
        self._open = (*OPEN, *(() if metrics_keyed else ("/metrics",)))
        self._rate = requests_per_s
        self._burst = burst
        self._buckets: dict[bytes, _Bucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except Problem as problem:
                request = Request(scope)
                request.state.reason = problem.reason
                response = answer(request, problem.status, problem.detail, problem.headers)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        path: str = scope["path"]
        is_admin = path == "/admin" or path.startswith("/admin/")
        if is_admin and (self._keys is None or not self._keys.has_admin):
            raise NotFound(
                "There is nothing here unless the server has an administrator's key: see"
                " `python -m server.keys new --help`."
            )
        if self._keys is None or path in self._open:
            return
        key = self._key(Headers(scope=scope), basic=not is_admin)
        scope["state"]["client"] = key.name
        if is_admin and key.scope != "admin":
            raise Forbidden("This path needs an administrator's key: send one.")
        if self._rate:
            self._spend(key)

    def _key(self, headers: Headers, *, basic: bool) -> Key:
        """The request's key; Basic, which browsers send by themselves, counts only if `basic`."""
        assert self._keys is not None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        shown = headers.get("x-api-key", "")
        if scheme.lower() == "bearer":
            shown = given.strip()
        elif scheme.lower() == "basic" and basic:
            shown = _password(given.strip())
        if not shown:
            raise Unauthorized(
                "This path needs an API key: send it as `Authorization: Bearer KEY` or"
                " `X-API-Key: KEY`."
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
            raise Overloaded(
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
