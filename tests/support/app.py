"""A server in a thread of the test's own process, where a part of it can be replaced."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from starlette.types import ASGIApp

from tests.support.waiting import until


@contextmanager
def serve_app(app: ASGIApp) -> Iterator[httpx.Client]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(600)
        assert not thread.is_alive()


def backend_of(client: httpx.Client) -> str:
    answer = client.get("/health/ready")
    return str(answer.json()["backend"]) if answer.status_code == 200 else "none"
