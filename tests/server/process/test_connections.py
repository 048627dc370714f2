"""Slow, greedy and silent clients: each is let go in bounded time, and others are served."""

import asyncio
import contextlib
import select
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from unittest.mock import Mock

import httpx
import pytest
import uvicorn
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, Scope
from uvicorn.server import ServerState

from server.inference.budgets import PixelBudget
from server.observe.metrics import Metrics
from server.process.connections import Connection, House
from server.settings import Settings
from tests.support.answers import figures, refused_connections
from tests.support.launch import ServerProcess, serve
from tests.support.samples import Sample
from tests.support.waiting import until
from tests.support.wire import assert_refusal, connect, read_all, send_apart

pytestmark = pytest.mark.usefixtures("small_networks")

LIMITS = {
    "--head-timeout-s": "1",
    "--stall-timeout-s": "1",
    "--min-bytes-per-s": "2000",
    "--max-header-bytes": "4096",
    "--max-connections": "20",
    "--keep-alive-s": "2",
    "--max-body-bytes": "1000000",
}


@pytest.fixture(scope="module")
def strict() -> Iterator[ServerProcess]:
    with serve(*(text for flag in LIMITS.items() for text in flag)) as process:
        yield process


def segments(server: ServerProcess, photo: Sample) -> bool:
    """Whether it answers with a mask; also a busy machine gets the photo there in time sometime."""
    return httpx.post(f"{server.url}/segment", content=photo.data).status_code == 200


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (b"", 408, "No whole request"),
        (b"POST /segment HTTP/1.1\r\nHost: x\r\nX-Slow:", 408, "No whole request"),
        (b"\r\n\r\n", 408, "No whole request"),
        (b"utter nonsense\r\n\r\n", 400, "not an HTTP/1.1 request"),
        (b"GET /model HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400, "not an HTTP"),
        (b"GET /" + 5000 * b"x" + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "4096 bytes"),
        (b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "for proxies"),
        (b"GET /model HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400, "more than one Host"),
        (
            b"GET /stream HTTP/1.1\r\nHost: x\r\nHost: y\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
            400,
            "more than one Host",
        ),
        (
            b"POST /segment HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            501,
            "but chunked",
        ),
        (
            b"POST /segment HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n",
            501,
            "but chunked",
        ),
        (
            b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
            + 900 * b"X: 1\r\n"
            + b"\r\n",
            431,
            "4096 bytes",
        ),
        (b"GET / HTTP/1.1\r\nX: " + 9000 * b"x", 431, "4096 bytes"),
        (b"GET / HTTP/1.1\r\n" + 900 * b"X: 1\r\n" + b"\r\n", 431, "4096 bytes"),
        (
            b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding:"
            b" chunked\r\n\r\n1\r\nx\r\n0\r\n" + 900 * b"X: 1\r\n",
            431,
            "4096 bytes",
        ),
        (
            b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n"
            b"Content-Type: image/png\r\n\r\nabc",
            408,
            "slower than 2000 bytes a second",
        ),
    ],
)
def test_what_never_becomes_a_request_is_refused(
    strict: ServerProcess, sent: bytes, status: int, words: str
) -> None:
    with connect(strict) as connection:
        connection.sendall(sent)
        assert_refusal(read_all(connection), status, words)


def test_a_body_that_trickles_is_cut_and_holds_no_place(
    strict: ServerProcess, photos: list[Sample]
) -> None:
    head = (
        b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
        b"Content-Length: 100000\r\n\r\n"
    )
    with connect(strict) as connection:
        connection.sendall(head)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while not select.select([connection], [], [], 0.1)[0]:
                connection.sendall(b"x")
        assert_refusal(read_all(connection), 408, "slower than")
    for name in ("slsnet_requests_in_flight", "slsnet_bytes_in_flight"):
        until(lambda: figures(strict)[name] == 0)  # noqa: B023
    until(lambda: segments(strict, photos[0]))


def test_a_refused_body_is_thrown_away_for_a_while_only(strict: ServerProcess) -> None:
    before = refused_connections(strict, "body_discarded")
    with connect(strict) as connection:
        connection.sendall(
            b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
            b"Content-Length: 10000000000\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
        give_up = time.perf_counter() + 30
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while time.perf_counter() < give_up:
                connection.sendall(bytes(65536))
    assert refused_connections(strict, "body_discarded") == before + 1


def test_an_answer_that_is_never_read_is_not_kept(strict: ServerProcess) -> None:
    before = refused_connections(strict, "answer_not_read")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", strict.port))
        connection.settimeout(30)
        # The largest of the answers, more often than the system's own buffers hold.
        with contextlib.suppress(OSError):
            for _ in range(30):
                connection.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: refused_connections(strict, "answer_not_read") > before)


def test_500_slow_clients_keep_nobody_out(strict: ServerProcess, photos: list[Sample]) -> None:
    """More than are held; who comes on top is told so, and room is there again in a moment."""
    with contextlib.ExitStack() as stack:
        slow = []
        for _ in range(500):
            connection = stack.enter_context(connect(strict))
            with contextlib.suppress(OSError):
                connection.sendall(b"POST /segment HTTP/1.1\r\nHost: x\r\nX-A: ")
            slow.append(connection)
        answers = [read_all(connection) for connection in slow]
        late = [answer for answer in answers if answer.startswith(b"HTTP/1.1 408 ")]
        told = [answer for answer in answers if answer.startswith(b"HTTP/1.1 503 ")]
        # Their places are free again after a second each, so that there must be few of them:
        # connecting takes some seconds on a slow machine.
        assert len(late) >= 20
        assert len(told) >= 100
        assert_refusal(told[0], 503, "20 connections")
        until(lambda: segments(strict, photos[0]))


def test_a_full_server_says_that_it_works(photos: list[Sample]) -> None:
    with serve("--max-connections", "4") as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=server.url)) for _ in range(4)]
        assert [one.get("/health/live").status_code for one in clients] == [200] * 4
        # Of those that say nothing the oldest goes, so that whoever asks is heard.
        silent = [stack.enter_context(connect(server)) for _ in range(40)]
        for path in ("/health/live", "/health/ready", "/v2/health/live", "/metrics?x=1"):
            answer = httpx.get(server.url + path)
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert_refusal(read_all(silent[0]), 503, "4 connections")
        refusal = httpx.post(f"{server.url}/segment", content=photos[0].data)
        assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "1")
        assert httpx.get(f"{server.url}/model").status_code == 503
        assert clients[0].get("/model").status_code == 200
        clients[1].close()
        with httpx.Client(base_url=server.url) as another:
            until(lambda: another.get("/model").status_code == 200)
            assert another.get("/model").headers.get("connection") != "close"


def test_a_full_server_says_that_it_works_below_a_prefix() -> None:
    flags = ("--max-connections", "2", "--root-path", "/skin")
    with serve(*flags) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=server.url)) for _ in range(2)]
        assert [one.get("/health/live").status_code for one in clients] == [200] * 2
        for path in ("/health/live", "/health/ready", "/v2/health/live", "/metrics?x=1"):
            for prefix in ("/skin", ""):
                assert httpx.get(server.url + prefix + path).status_code == 200, prefix + path
        for path in ("/skin/model", "/skin", "/skinhealth/live"):
            assert httpx.get(server.url + path).status_code == 503, path


def test_a_client_that_keeps_its_connection_is_served_again(strict: ServerProcess) -> None:
    with httpx.Client(base_url=strict.url) as client:
        for pause_s in (0, 1.3, 0):
            # Longer than a head may take, shorter than a connection is kept.
            time.sleep(pause_s)
            assert client.get("/health/live").status_code == 200


def test_an_answer_comes_in_one_piece(strict: ServerProcess) -> None:
    with connect(strict) as connection:
        for answers in (1, 2):
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            # Linux: tcpi_data_segs_in of struct tcp_info.
            known = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 156)
            assert int.from_bytes(known[152:156], sys.byteorder) == answers


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_a_client_that_has_said_all_is_answered(strict: ServerProcess, method: bytes) -> None:
    for _ in range(100):
        with connect(strict) as connection:
            connection.sendall(method + b" /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection).startswith(b"HTTP/1.1 200 OK\r\n")


def test_pipelined_requests_are_answered_in_turn(strict: ServerProcess) -> None:
    request = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
    with connect(strict) as connection:
        connection.sendall(4 * (request + b"\r\n") + request + b"Connection: close\r\n\r\n")
        assert read_all(connection).count(b"HTTP/1.1 200 OK") == 5
    with connect(strict) as connection:
        connection.sendall(1000 * (request + b"\r\n"))
        assert_refusal(read_all(connection), 429, "sent before any was answered")


UPGRADE = (
    b"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\n"
    b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
)
LAST = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_a_wish_for_another_protocol_is_passed_over(
    server: ServerProcess, photos: list[Sample], protocol: bytes
) -> None:
    wish = UPGRADE % protocol
    photo = photos[0].data
    get = b"GET /model HTTP/1.1\r\n" + wish + b"\r\n"
    head = b"POST /segment HTTP/1.1\r\nContent-Type: image/jpeg\r\n" + wish
    whole = head + b"Content-Length: %d\r\n\r\n" % len(photo)
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(photo)
    for pieces in (
        [get],
        [get[:70], get[70:]],
        [whole + photo],
        [whole, photo],
        [whole[:70], whole[70:] + photo[:100], photo[100:9000], photo[9000:]],
        [chunked + photo[:100], photo[100:], b"\r\n0\r\n\r\n"],
    ):
        with connect(server) as connection:
            send_apart(connection, *pieces)
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n"), answer
            connection.sendall(LAST)
            answer += read_all(connection)
            assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2
            assert answer.endswith(httpx.get(f"{server.url}/health/live").content)
    with connect(server) as connection:
        connection.sendall(2 * get + whole + photo + LAST)
        assert read_all(connection).count(b"HTTP/1.1 200 OK\r\n") == 4
    with connect(server) as connection:
        connection.sendall(get.replace(b"Upgrade,", b"Upgrade, close,"))
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nconnection: close\r\n" in answer
    with connect(server) as connection:
        connection.sendall(100 * get)
        assert_refusal(read_all(connection), 429, "sent before any was answered")


@pytest.mark.parametrize("together", [True, False])
def test_trailers_are_no_headers(
    server: ServerProcess, photos: list[Sample], together: bool
) -> None:
    photo = photos[0].data
    head = b"POST /segment HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    head += b"Connection: close\r\nTrailer: X-Request-ID, Accept\r\n\r\n"
    body = b"%x\r\n%b\r\n" % (len(photo), photo)
    trailer = b"0\r\nX-Request-ID: from-a-trailer\r\nAccept: application/json\r\n\r\n"
    with connect(server) as connection:
        if together:
            connection.sendall(head + body + trailer)
        else:
            send_apart(connection, head, body, trailer)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"content-type: image/png" in answer.lower()
    assert b"from-a-trailer" not in answer


@pytest.mark.parametrize("coding", [b"chunked", b"Chunked", b" chunked  "])
def test_chunked_is_known_however_it_is_written(
    server: ServerProcess, photos: list[Sample], coding: bytes
) -> None:
    photo = photos[0].data
    with connect(server) as connection:
        connection.sendall(
            b"POST /segment HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:%b\r\n\r\n" % coding
            + b"%x\r\n%b\r\n0\r\n\r\n" % (len(photo), photo)
            + LAST
        )
        assert read_all(connection).count(b"HTTP/1.1 200 OK\r\n") == 2


def test_a_body_that_came_behind_another_request_has_its_time(photos: list[Sample]) -> None:
    photo = photos[0].data
    step = len(photo) // 4
    # Only a head's time is short.
    flags = ("--head-timeout-s", "1", "--stall-timeout-s", "600")
    with serve(*flags) as server, connect(server) as connection:
        connection.sendall(
            b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\nPOST /segment HTTP/1.1\r\nHost: x\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(photo)
        )
        for start in range(0, len(photo), step):
            # Slowly: it takes longer than a head may.
            time.sleep(0.4)
            connection.sendall(photo[start : start + step])
        assert read_all(connection).count(b"HTTP/1.1 200 OK\r\n") == 2


@contextlib.asynccontextmanager
async def served(app: ASGI3Application) -> AsyncIterator[int]:
    """The port where an application is served in this process."""
    config = uvicorn.Config(app, http=Connection, ws="none", log_config=None)
    config.load()
    house, state = House(Settings(), Metrics()), ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(house, config, state, {}), "127.0.0.1"
    )
    async with server:
        yield server.sockets[0].getsockname()[1]


def test_a_stream_with_requests_behind_it_ends_with_its_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        told, ended = asyncio.Event(), asyncio.Event()

        async def endless(
            _scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
        ) -> None:
            async def listen() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                told.set()

            listening = asyncio.create_task(listen())
            await send(
                {"type": "http.response.start", "status": 200, "headers": [], "trailers": False}
            )
            while not told.is_set():
                await send({"type": "http.response.body", "body": b"line", "more_body": True})
                await asyncio.sleep(0.02)
            await listening
            ended.set()

        get = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        async with served(endless) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(get)
            await reader.readuntil(b"line")
            writer.write(get)
            await reader.readuntil(b"line")
            writer.transport.abort()
            await asyncio.wait_for(ended.wait(), 10)

    asyncio.run(scenario())
    assert "Exception" not in caplog.text


def _asked(
    application: ASGI3Application, transport: Mock, state: ServerState, settings: Settings
) -> Connection:
    """A connection over this transport, whose client has sent one request."""
    transport.get_extra_info.return_value = None
    config = uvicorn.Config(application, ws="none", log_config=None)
    config.load()
    connection = Connection(House(settings, Metrics()), config, state, {})
    connection.connection_made(transport)
    connection.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    return connection


def test_the_rest_of_an_answer_that_was_left_off_is_not_kept() -> None:
    async def scenario() -> None:
        async def leaves_off(
            _scope: Scope, _receive: ASGIReceiveCallable, send: ASGISendCallable
        ) -> None:
            await send(
                {"type": "http.response.start", "status": 200, "headers": [], "trailers": False}
            )

        closed, aborted = asyncio.Event(), asyncio.Event()
        transport = Mock(asyncio.Transport)
        transport.is_closing.side_effect = closed.is_set
        transport.get_write_buffer_size.return_value = 1000
        transport.close.side_effect = closed.set
        transport.abort.side_effect = aborted.set
        connection = _asked(leaves_off, transport, ServerState(), Settings(stall_timeout_s=0.1))
        await asyncio.wait_for(closed.wait(), 10)
        connection.pause_writing()
        connection.resume_writing()
        await asyncio.wait_for(aborted.wait(), 10)

    asyncio.run(scenario())


def test_nothing_is_written_to_a_client_that_has_left() -> None:
    """Uvloop would raise, and the log have a traceback."""

    async def scenario() -> None:
        async def begins(
            _scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
        ) -> None:
            await send(
                {"type": "http.response.start", "status": 200, "headers": [], "trailers": False}
            )
            connection.connection_lost(None)
            await receive()

        transport = Mock(asyncio.Transport)
        transport.is_closing.return_value = False
        state = ServerState()
        connection = _asked(begins, transport, state, Settings())
        await asyncio.wait(list(state.tasks), timeout=30)
        await asyncio.sleep(0)
        transport.write.assert_not_called()

    asyncio.run(scenario())


def test_photos_wait_for_each_other_where_pixels_are_limited() -> None:
    budget = PixelBudget(100)
    most = 0

    def decode(pixels: int) -> None:
        nonlocal most
        with budget.room(pixels):
            most = max(most, budget.used)
            # Or none would find another there.
            time.sleep(0.01)

    threads = [threading.Thread(target=decode, args=(pixels,)) for pixels in (60, 60, 40, 99, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert 60 <= most <= 100
    assert budget.used == 0
    with budget.room(1000):
        assert budget.used == 1000


def waiting(budget: PixelBudget) -> int:
    # Private, for nothing else tells that a thread has come to where it waits.
    return len(budget._waiting)


@pytest.mark.parametrize(
    "pixels",
    [(90, 1000, 10, 95, 5), (90, 40, 40, 40)],
    ids=["any", "a large one before small ones"],
)
def test_photos_are_decoded_in_the_order_in_which_they_came(pixels: Sequence[int]) -> None:
    budget = PixelBudget(100)
    order: list[int] = []

    def decode(pixels: int) -> None:
        with budget.room(pixels):
            order.append(pixels)

    threads = [threading.Thread(target=decode, args=(count,)) for count in pixels]
    with budget.room(50):
        for place, thread in enumerate(threads, 1):
            thread.start()
            until(lambda: waiting(budget) == place)  # noqa: B023
        # Even one for which there would be room.
        assert not order
    for thread in threads:
        thread.join(30)
    assert order == list(pixels)
    assert budget.used == 0
