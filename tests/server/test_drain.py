"""SIGTERM: what was accepted is answered, readiness says no, and the process ends with 0."""

import asyncio
import contextlib
import errno
import json
import select
import signal
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import uvicorn
import uvloop

from server.http.app import create_app
from server.process import worker
from server.process.connections import Connection
from server.process.port import refuse_newcomers
from server.process.worker import _Server
from server.settings import Settings
from tests.support.answers import figures
from tests.support.authority import Authority
from tests.support.clients import terminate_under_load
from tests.support.held import serve_held
from tests.support.launch import serve
from tests.support.samples import Sample
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("small_networks")


def test_sigterm_under_load_loses_nothing(photos: list[Sample]) -> None:
    with serve("--drain-grace-s", "3") as server:
        terminate_under_load(server, photos[:8])


def test_photos_that_the_drain_has_no_time_for_are_told_so(
    tmp_path: Path, photos: list[Sample]
) -> None:
    files = [("file", ("a.jpg", photos[0].data))] * 100
    # Half of it is for the answer's end.
    flags = ("--drain-grace-s", "0", "--drain-timeout-s", "10")
    with serve_held(tmp_path, *flags) as (server, hold), ThreadPoolExecutor(1) as client:
        with hold():
            url = f"{server.url}/segment/batch"
            sending = client.submit(httpx.post, url, files=files, timeout=60)
            until(lambda: figures(server)["slsnet_queue_depth"] > 0)
            server.terminate()
            answer = sending.result()
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert sorted(line["index"] for line in lines) == list(range(100))
        assert {line["status"] for line in lines} == {503}
        assert "going down" in lines[0]["error"]["detail"]
        assert server.wait() == 0


def test_idle_server_ends_with_0() -> None:
    with serve("--drain-grace-s", "0") as server:
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0


class _Listener(socket.socket):
    """Fails first."""

    errors: ClassVar[list[OSError]] = []

    def accept(self) -> Any:
        if self.errors:
            raise self.errors.pop(0)
        return super().accept()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_who_fails_at_tls_while_the_port_closes_harms_nobody(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    # For a busy machine.
    monkeypatch.setattr(worker, "LAST_HANDSHAKES_S", 5.0)
    authority = Authority(tmp_path, "authority")
    trust = ssl.create_default_context(cafile=str(authority.certificate))
    settings = Settings(head_timeout_s=3600, tls_cert=authority.issue("server"))
    app, service = create_app(settings)
    config = uvicorn.Config(app, http=Connection, log_config=None, ssl_certfile=settings.tls_cert)
    config.load()

    def ask(connection: socket.socket) -> bytes:
        with trust.wrap_socket(connection, server_hostname="127.0.0.1") as encrypted:
            encrypted.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            return encrypted.recv(12)

    async def close_the_port(listener: socket.socket, good: socket.socket) -> bytes:
        # Private: clients have to come between the last accept and the end of the port.
        server = _Server(config, service, [])
        server._loop = asyncio.get_running_loop()
        server.lifespan = config.lifespan_class(config)
        server.servers = []
        answer = asyncio.create_task(asyncio.to_thread(ask, good))
        await server._accept_backlog(listener)
        return await answer

    with _Listener() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        plain, *_, good = [
            stack.enter_context(socket.create_connection(listener.getsockname(), timeout=600))
            for _ in range(20)
        ]
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        _Listener.errors = [ConnectionAbortedError()]
        with asyncio.Runner(loop_factory=loop) as runner:
            assert runner.run(close_the_port(listener, good)) == b"HTTP/1.1 200"


class _Crowded(socket.socket):
    """Whenever nobody is waiting any more, somebody else connects."""

    late: ClassVar[list[socket.socket]] = []

    def accept(self) -> Any:
        try:
            return super().accept()
        except BlockingIOError:
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(self.getsockname())
            self.late.append(client)
            raise


def test_who_connects_after_the_last_accept_is_refused_and_not_reset() -> None:
    app, service = create_app(Settings())
    config = uvicorn.Config(app, http=Connection, log_config=None)

    async def serve_for_a_moment() -> None:
        # Private: clients have to come between the last accept and the end of the port.
        server = _Server(config, service, [])
        asyncio.get_running_loop().call_later(0.1, setattr, server, "should_exit", True)
        await server.serve([listener])

    with _Crowded() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        with socket.socket() as probe:
            if not refuse_newcomers(probe):
                pytest.skip("this system has no filters for sockets")
        asyncio.run(serve_for_a_moment())
        assert _Crowded.late
        for client in _Crowded.late:
            stack.enter_context(client)
            select.select([], [client], [], 60)
            error = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            assert errno.errorcode[error] == "ECONNREFUSED"


def test_no_file_left_for_who_has_connected_last_is_survived() -> None:
    app, service = create_app(Settings())

    async def close_the_port() -> None:
        # Private: the files have to be short at this very moment.
        config = uvicorn.Config(app, http=Connection, log_config=None)
        config.load()
        server = _Server(config, service, [])
        server._loop = asyncio.get_running_loop()
        server.servers = []
        with _Listener() as listener:
            _Listener.errors = [OSError(errno.EMFILE, "Too many open files")]
            await server._accept_backlog(listener)
            assert listener.fileno() == -1

    asyncio.run(close_the_port())


def test_a_log_on_a_full_disk_costs_no_answer_and_no_exit_code(photos: list[Sample]) -> None:
    program = """
import os, runpy, sys
os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
sys.argv[0] = "server"
runpy.run_module("server", run_name="__main__", alter_sys=True)
"""
    # Python's own buffers are what is tried here.
    with serve(command=["-c", program], environment={"PYTHONUNBUFFERED": ""}) as server:
        for _ in range(100):
            httpx.get(f"{server.url}/health/live").raise_for_status()
        httpx.post(f"{server.url}/segment", content=photos[0].data).raise_for_status()
        server.terminate()
        assert server.wait() == 0


def test_readiness_says_no_in_a_drain_and_a_second_signal_ends_at_once() -> None:
    with serve("--drain-grace-s", "600") as server:
        server.terminate()
        # Until then it may not have heard the first one, and two at once count as one.
        until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503)
        # And it is asked here, where the grace is long enough for any machine.
        ready = httpx.get(f"{server.url}/health/ready")
        assert "going down" in ready.json()["detail"]
        live = httpx.get(f"{server.url}/health/live")
        assert live.status_code == 200
        assert live.headers["connection"] == "close"
        assert server.process.poll() is None
        server.terminate()
        assert server.wait() == 128 + signal.SIGTERM
