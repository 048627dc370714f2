"""Slow, greedy and silent clients: each is let go in bounded time, and others are served."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.launch import ServerProcess, serve
from server.uploads import PixelBudget
from tests.conftest import Sample
from tests.server.test_load import figures

LIMITS = {
    "--head-timeout-s": "1",
    "--stall-timeout-s": "1",
    "--min-bytes-per-s": "2000",
    "--max-header-bytes": "4096",
    "--max-connections": "150",
    "--keep-alive-s": "2",
    "--max-body-bytes": "1000000",
}


@pytest.fixture(scope="module")
def strict() -> Iterator[ServerProcess]:
    with serve(*(text for flag in LIMITS.items() for text in flag)) as process:
        yield process


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes, however it does."""
    received = b""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


def refused(server: ServerProcess, reason: str) -> float:
    name = f'slsnet_connections_refused_total{{reason="{reason}"}}'
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0)


def assert_refusal(answer: bytes, status: int, words: str) -> None:
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    assert b"Connection: close" in head
    assert words.encode() in body


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (b"", 408, "No whole request"),
        (b"POST /segment HTTP/1.1\r\nHost: x\r\nX-Slow:", 408, "No whole request"),
        (b"\r\n\r\n", 408, "No whole request"),
        (b"utter nonsense\r\n\r\n", 400, "not an HTTP/1.1 request"),
        (b"GET /model HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400, "not an HTTP"),
        (b"GET /" + 5000 * b"x" + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "4096 bytes"),
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
            for _ in range(40):
                connection.sendall(b"x")
                time.sleep(0.1)
        assert_refusal(read_all(connection), 408, "slower than")
    values = figures(strict)
    assert values["slsnet_requests_in_flight"] == values["slsnet_bytes_in_flight"] == 0
    answer = httpx.post(f"{strict.url}/segment", content=photos[0].data)
    assert answer.status_code == 200


def test_a_refused_body_is_thrown_away_for_a_while_only(strict: ServerProcess) -> None:
    before = refused(strict, "body_discarded")
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
    assert refused(strict, "body_discarded") == before + 1


def test_an_answer_that_is_never_read_is_not_kept(strict: ServerProcess) -> None:
    before = refused(strict, "answer_not_read")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", strict.port))
        connection.settimeout(30)
        # The largest of the answers, more often than the system's own buffers hold.
        with contextlib.suppress(OSError):
            for _ in range(30):
                connection.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n")
                time.sleep(0.02)
        give_up = time.perf_counter() + 30
        while refused(strict, "answer_not_read") == before:
            assert time.perf_counter() < give_up
            time.sleep(0.1)


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
        assert len(late) >= 100
        assert len(told) >= 100
        assert_refusal(told[0], 503, "150 connections")
        assert b"Retry-After: 1" in told[0]
        answer = httpx.post(f"{strict.url}/segment", content=photos[0].data)
        assert answer.status_code == 200


def test_a_client_that_keeps_its_connection_is_served_again(strict: ServerProcess) -> None:
    with httpx.Client(base_url=strict.url) as client:
        for pause_s in (0, 1.3, 0):
            time.sleep(pause_s)
            assert client.get("/health/live").status_code == 200


def test_pipelined_requests_are_answered_in_turn(strict: ServerProcess) -> None:
    request = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
    with connect(strict) as connection:
        connection.sendall(4 * (request + b"\r\n") + request + b"Connection: close\r\n\r\n")
        assert read_all(connection).count(b"HTTP/1.1 200 OK") == 5
    with connect(strict) as connection:
        connection.sendall(1000 * (request + b"\r\n"))
        assert_refusal(read_all(connection), 429, "sent before any was answered")


def test_photos_wait_for_each_other_where_pixels_are_limited() -> None:
    budget = PixelBudget(100)
    most = 0

    def decode(pixels: int) -> None:
        nonlocal most
        with budget.room(pixels):
            most = max(most, budget.used)
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
