"""Ray's gateway, without a cluster: what it refuses before it has taken a request in."""

import asyncio
from typing import Any

import pytest
from fastapi import Request
from starlette.responses import Response
from starlette.types import Message

from server.settings import Settings

pytest.importorskip("ray", reason="needs Ray: pip install -r requirements-ray.txt")

from ray.exceptions import ObjectStoreFullError

from server.ray_app import Answer, Gateway


class Replicas:
    """Stands in for the handle of the replicas."""

    def __init__(self, error: Exception | None = None) -> None:
        self.bodies: list[bytes] = []
        self._error = error

    @property
    def answer(self) -> "Replicas":
        return self

    async def remote(self, _scope: dict[str, Any], body: bytes) -> Answer:
        self.bodies.append(body)
        if self._error:
            raise self._error
        return 413, [], b"too large"


class Client:
    """Sends a body, piece by piece, as far as it is read."""

    def __init__(self, path: str, size: int) -> None:
        headers = [(b"content-length", b"%d" % size)]
        self.request = Request(
            {
                "type": "http",
                "http_version": "1.1",
                "method": "POST",
                "scheme": "http",
                "path": path,
                "query_string": b"",
                "headers": headers,
                "client": ("127.0.0.1", 1),
                "server": ("127.0.0.1", 2),
                "state": {"request_id": "mine"},
            },
            self._receive,
        )
        self.sent = 0
        self._size = size

    async def _receive(self) -> Message:
        piece = min(2**20, self._size - self.sent)
        self.sent += piece
        return {
            "type": "http.request",
            "body": bytes(piece),
            "more_body": self.sent < self._size,
        }


def forward(replicas: Replicas, client: Client) -> Response:
    # Serve's wrapper of the class needs a cluster.
    gateway = Gateway.__mro__[1](replicas, Settings())
    response: Response = asyncio.run(gateway.forward(client.request))
    return response


@pytest.mark.parametrize(("path", "size"), [("/segment", 100), ("/segment/batch", 300)])
def test_a_length_that_is_too_much_is_refused_unread(path: str, size: int) -> None:
    replicas, client = Replicas(), Client(path, size * 2**20)
    assert forward(replicas, client).status_code == 413
    assert client.sent == 0
    assert replicas.bodies == [b""], "the replica refuses it in its own words"


def test_a_batch_may_be_larger_than_a_photo() -> None:
    replicas, client = Replicas(), Client("/segment/batch", 100 * 2**20)
    forward(replicas, client)
    assert [len(body) for body in replicas.bodies] == [100 * 2**20]


def test_a_full_object_store_is_a_full_server() -> None:
    replicas, client = Replicas(ObjectStoreFullError("no room")), Client("/segment", 1000)
    response = forward(replicas, client)
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "1"
