"""What a client is told last reaches it, however it sends and ends its side of the connection."""

import contextlib
import re
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.answers import figures, refused_connections
from tests.support.authority import Authority
from tests.support.held import serve_held
from tests.support.launch import ServerProcess, serve
from tests.support.samples import Sample
from tests.support.wire import assert_refusal, connect, read_all

pytestmark = pytest.mark.usefixtures("small_networks")

FLAGS = ("--max-body-bytes", "4000000")


@pytest.fixture(scope="module")
def plain() -> Iterator[ServerProcess]:
    with serve(*FLAGS) as process:
        yield process


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority(folder, "authority")
    trust = ssl.create_default_context(cafile=str(authority.certificate))
    with serve(*FLAGS, "--tls-cert", str(authority.issue("server")), trust=trust) as process:
        yield process


@pytest.fixture(params=["plain", "encrypted"])
def either(request: pytest.FixtureRequest) -> ServerProcess:
    process: ServerProcess = request.getfixturevalue(request.param)
    return process


def open_connection(server: ServerProcess) -> socket.socket:
    connection = connect(server)
    if server.trust is None:
        return connection
    return server.trust.wrap_socket(connection, server_hostname="127.0.0.1")


def exchange(server: ServerProcess, *parts: bytes) -> bytes:
    """All that is answered to a client that sends everything before it reads."""
    with open_connection(server) as connection:
        for part in parts:
            connection.sendall(part)
        return read_all(connection)


HOST = b"Host: x\r\n"
CLOSE = HOST + b"Connection: close\r\n"


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize(
    ("start", "headers", "status"),
    [
        (b"POST /segment", b"Content-Type: image/jpeg\r\n", 413),
        (b"POST /nowhere", b"", 404),
        (b"POST /health/live", b"", 405),
        (b"POST /segment", b"Content-Type: text/html\r\n", 415),
        (b"POST /segment/batch", b"Content-Type: image/jpeg\r\n", 415),
        (b"POST /segment?threshold=2", b"Content-Type: image/jpeg\r\n", 422),
        (b"POST /v2/models/none/infer", b"", 404),
    ],
)
def test_a_refusal_is_read_behind_the_whole_body(
    either: ServerProcess, version: bytes, start: bytes, headers: bytes, status: int
) -> None:
    body = bytes(6_000_000)
    head = b"%b HTTP/%b\r\n%b" % (start, version, CLOSE + headers)
    for _ in range(3):
        whole = head + b"Content-Length: %d\r\n\r\n" % len(body)
        answers = [exchange(either, whole, body)]
        if version == b"1.1":
            pieces = b"10000\r\n%b\r\n" % bytes(65536) * 90
            chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
            answers.append(exchange(either, chunked, pieces, b"0\r\n\r\n"))
        for answer in answers:
            assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:100]
            assert b"\r\nconnection: close\r\n" in answer.lower()


def test_a_refused_body_that_never_ends_is_cut() -> None:
    with serve("--stall-timeout-s", "1") as server, connect(server) as connection:
        before = refused_connections(server, "body_discarded")
        connection.sendall(
            b"POST /segment HTTP/1.1\r\n" + CLOSE + b"Content-Length: 10000000000\r\n\r\n"
        )
        give_up = time.perf_counter() + 30
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while time.perf_counter() < give_up:
                connection.sendall(bytes(65536))
        assert time.perf_counter() < give_up
        assert refused_connections(server, "body_discarded") == before + 1


def test_a_drain_does_not_wait_for_what_is_thrown_away() -> None:
    flags = ("--stall-timeout-s", "600", "--drain-grace-s", "0", "--drain-timeout-s", "600")
    with serve(*flags) as server, contextlib.ExitStack() as stack:
        for keeps in (b"", b"Connection: close\r\n"):
            connection = stack.enter_context(connect(server))
            connection.sendall(
                b"POST /nowhere HTTP/1.1\r\n" + HOST + keeps + b"Content-Length: 99999\r\n\r\nx"
            )
            assert connection.recv(10) == b"HTTP/1.1 4"
        server.terminate()
        assert server.process.wait(120) == 0


def test_an_http_1_0_client_reads_a_batch_to_the_end(
    either: ServerProcess, photos: list[Sample]
) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a.jpg"\r\n\r\n%b\r\n'
    body = 2 * (part % photos[0].data) + b"--x--\r\n"
    for accept, end in ((b"application/x-ndjson", b"}\n"), (b"multipart/mixed", b"--\r\n")):
        head = b"POST /segment/batch HTTP/1.0\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        head += b"Accept: %b\r\nContent-Length: %d\r\n\r\n" % (accept, len(body))
        answer = exchange(either, head + body)
        head, _, content = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"transfer-encoding" not in head.lower()
        assert b"content-length" not in head.lower()
        assert b"\r\nconnection: close" in head.lower()
        assert content.endswith(end)
        if end == b"}\n":
            assert content.startswith(b"{")
            assert content.count(b"\n") == 2
    # Those of known length say it.
    answer = exchange(either, b"GET /model HTTP/1.0\r\n\r\n")
    assert b"\r\ncontent-length: " in answer.lower()


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("route", ["/segment", "/segment/batch", "/health/live", "/v2", "many"])
def test_who_closes_its_side_is_answered(
    plain: ServerProcess, photos: list[Sample], version: bytes, route: str
) -> None:
    body, kind, count = b"", b"", 1
    method = b"GET"
    if route.startswith("/segment"):
        method, body, kind = b"POST", photos[0].data, b"image/jpeg"
    if route == "/segment/batch":
        kind = b"multipart/form-data; boundary=x"
        body = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n' + body
        body += b"\r\n--x--\r\n"
    if route == "many":
        if version == b"1.0":
            pytest.skip("one request a connection")
        route, count = "/model", 5
    head = b"%b %b HTTP/%b\r\nHost: x\r\n" % (method, route.encode(), version)
    if body:
        head += b"Content-Type: %b\r\nContent-Length: %d\r\n" % (kind, len(body))
    with connect(plain) as connection:
        connection.sendall(count * (head + b"\r\n" + body))
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200 ") == count


def test_who_closes_its_side_may_wait_long(tmp_path: Path, photos: list[Sample]) -> None:
    with serve_held(tmp_path) as (server, hold), connect(server) as connection:
        with hold():
            data = photos[0].data
            head = b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
            connection.sendall(head % len(data) + data)
            connection.shutdown(socket.SHUT_WR)
            # Interim answers come meanwhile, which every client passes over.
            interim = b""
            while interim.count(b"HTTP/1.1 100") < 4:
                interim += connection.recv(1)
            assert figures(server)["slsnet_requests_in_flight"] == 1
        answer = read_all(connection)
        assert answer.count(b"HTTP/1.1 200 ") == 1
        assert b"\r\nconnection: close\r\n" in answer


def test_half_a_request_has_no_answer(plain: ServerProcess) -> None:
    for half in (
        b"",
        b"GET /model HTTP/1.1\r\nHo",
        b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nabc",
    ):
        with connect(plain) as connection:
            connection.sendall(half)
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection) == b""
        with connect(plain) as connection:
            connection.sendall(b"GET /model HTTP/1.1\r\nHost: x\r\n\r\n" + half)
            connection.shutdown(socket.SHUT_WR)
            answer = read_all(connection)
            assert answer.count(b"HTTP/1.1 ") == 1
            assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("junk", "status", "words"),
    [
        (b"utter nonsense\r\n\r\n" + 300_000 * b"x", 400, "not an HTTP/1.1 request"),
        (b"\x16\x03\x01" + bytes(range(256)), 400, "not an HTTP/1.1 request"),
        (b"GET /" + 50_000 * b"x" + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "bytes that are"),
        (b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "for proxies"),
        (
            b"POST /segment HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            400,
            "not an HTTP/1.1 request",
        ),
    ],
)
def test_junk_behind_good_requests_leaves_them_their_answers(
    either: ServerProcess,
    photos: list[Sample],
    junk: bytes,
    status: int,
    words: str,
    together: bool,
) -> None:
    photo = photos[0].data
    get = b"GET /model HTTP/1.1\r\nHost: x\r\n\r\n"
    post = b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(photo) + photo
    for good in ([get], [post], [get, post, get]):
        whole = b"".join(good)
        parts = [whole + junk] if together else [whole, junk]
        answer = exchange(either, *parts)
        starts = list(re.finditer(rb"HTTP/1\.1 (\d+) ", answer))
        assert [start[1] for start in starts] == [b"200"] * len(good) + [b"%d" % status]
        assert_refusal(answer[starts[-1].start() :], status, words)


def test_junk_behind_a_last_request_is_passed_over(either: ServerProcess) -> None:
    for version in (b"1.0", b"1.1"):
        get = b"GET /model HTTP/%b\r\n" % version + CLOSE + b"\r\n"
        for junk in (b"utter nonsense\r\n\r\n" + 300_000 * b"x", get):
            answer = exchange(either, get + junk)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.count(b"HTTP/1.1 ") == 1
