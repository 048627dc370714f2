"""Refused before the framework is asked: with the same answer, and with the same checks before."""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import uvicorn
from uvicorn._types import HTTPScope
from uvicorn.server import ServerState

from server.http import shedding
from server.http.admitted import ADMITTED
from server.http.context import RequestContext
from server.http.shedding import Door, Shedding
from server.inference import admission
from server.inference.admission import Gate
from server.keys import new_key
from server.observe.metrics import Metrics
from server.process.connections import Connection, House
from server.settings import Settings
from tests.support.answers import figures
from tests.support.held import serve_held
from tests.support.launch import ServerProcess
from tests.support.samples import Sample
from tests.support.waiting import until
from tests.support.wire import connect

ORIGIN = "https://clinic.example"
PATHS = {path: route.path for path, route in ADMITTED.items()}
IN_FLIGHT = "slsnet_requests_in_flight"


@dataclass
class Full:
    """A server whose queue is full, and stays so."""

    server: ServerProcess
    key: str
    slow: socket.socket
    """On which a byte of a photo is missing."""

    def post(self, path: str, body: bytes = b"-", **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with_key = {"X-API-Key": self.key, **named}
        return httpx.post(f"{self.server.url}{path}", content=body, headers=with_key, timeout=600)

    def answers(self, route: str, status: int) -> float:
        return answers(self.server, route, status)


def answers(server: ServerProcess, route: str, status: int) -> float:
    """How many the server says that it has given."""
    return figures(server, path=route, status=str(status)).get("slsnet_requests_total", 0)


@pytest.fixture(scope="module")
def full(
    tmp_path_factory: pytest.TempPathFactory, photos: list[Sample], small_network: Path
) -> Iterator[Full]:
    folder = tmp_path_factory.mktemp("full")
    key, line = new_key("clinic")
    (folder / "keys").write_text(f"{line}\n", encoding="utf-8")
    keyed = ("--api-keys-file", str(folder / "keys"), "--root-path", "/slsnet")
    patient = ("--stall-timeout-s", "600", "--request-timeout-ms", "600000")
    flags = ("--max-queue", "2", "--cors-origins", ORIGIN, *keyed, *patient)
    with (
        serve_held(folder, *flags, "--model", str(small_network)) as (server, hold),
        ThreadPoolExecutor(2) as waiting,
        hold(),
        connect(server) as slow,
    ):
        slow.sendall(
            f"POST /segment HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\nOrigin: {ORIGIN}\r\n"
            "Content-Length: 2\r\n\r\n-".encode()
        )
        held = Full(server, key, slow)
        until(lambda: figures(server)[IN_FLIGHT] == 1)
        waiting.submit(held.post, "/segment", photos[0].data)
        until(lambda: figures(server)[IN_FLIGHT] == 2)
        # A body that does not come keeps its place for a second.
        until(lambda: held.post("/segment").status_code != 429)
        waiting.submit(held.post, "/segment", photos[0].data)
        until(lambda: figures(server)[IN_FLIGHT] == 3)
        yield held
        # Or those that wait would do so for ever.
        server.process.kill()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prefix", ["", "/slsnet"])
def test_a_full_server_refuses_on_every_path_that_takes_a_place(
    full: Full, prefix: str, path: str
) -> None:
    before = full.answers(PATHS[path], 429)
    answer = full.post(prefix + path, X_Request_ID="mine-1", Origin=ORIGIN)
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.headers["X-Request-ID"] == "mine-1"
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Server-Timing"].startswith("total;dur=")
    said = answer.json()
    if path.startswith("/v2/"):
        assert set(said) == {"error"}
        assert answer.headers["Content-Type"] == "application/json"
    else:
        assert said["status"] == 429
        assert said["instance"] == path
        assert said["request_id"] == "mine-1"
        assert answer.headers["Content-Type"] == "application/problem+json"
    assert full.answers(PATHS[path], 429) == before + 1
    lines = (line for line in full.server.log().splitlines() if " mine-1 clinic POST " in line)
    assert all(" 429 total;dur=" in line for line in lines)


def test_a_refusal_is_the_frameworks_in_all_but_its_cost(full: Full) -> None:
    early = full.post("/segment", Origin=ORIGIN)
    # This one has lost its place, which the framework finds out when all of it is there.
    full.slow.sendall(b"-")
    framework = HTTPResponse(full.slow)
    framework.begin()
    whole = json.loads(framework.read())
    assert framework.status == early.status_code == 429
    headers = {name.lower(): value for name, value in framework.getheaders()}
    assert list(early.headers) == list(headers)
    for name in set(headers) - {"date", "x-request-id", "server-timing", "content-length"}:
        assert early.headers[name] == headers[name]
    assert {**early.json(), "request_id": ""} == {**whole, "request_id": ""}
    assert list(early.json()) == list(whole)


def test_who_has_no_key_is_told_so_first(full: Full) -> None:
    before = full.answers("/segment", 429)
    answer = full.post("/segment", X_API_Key="nobody's")
    assert answer.status_code == 401
    assert "WWW-Authenticate" in answer.headers
    assert full.answers("/segment", 429) == before


@pytest.mark.parametrize("timeout", ["soon", "-1", "nan"])
def test_what_is_wrong_with_a_deadline_is_said_all_the_same(full: Full, timeout: str) -> None:
    assert full.post("/segment", X_Request_Timeout_Ms=timeout).status_code == 422


def test_a_full_server_says_that_it_lives(full: Full) -> None:
    with ThreadPoolExecutor(8) as clients:
        refused = [clients.submit(full.post, "/segment", bytes(100_000)) for _ in range(100)]
        for path in ("/health/live", "/health/ready", "/v2/health/ready", "/metrics"):
            assert httpx.get(f"{full.server.url}{path}").status_code == 200
        assert {future.result().status_code for future in refused} == {429}


def test_a_connection_is_kept_for_a_small_body_and_closed_for_a_large_one(full: Full) -> None:
    headers = {"X-API-Key": full.key}
    with httpx.Client(base_url=full.server.url, headers=headers) as client:
        for _ in range(3):
            small = client.post("/segment", content=bytes(100_000))
            assert small.status_code == 429
            assert "Connection" not in small.headers
    for length in (b"Content-Length: 33554432", b"Transfer-Encoding: chunked"):
        with connect(full.server) as connection:
            connection.sendall(
                b"POST /segment HTTP/1.1\r\nHost: x\r\nX-API-Key: %b\r\n%b\r\n\r\n10000\r\n"
                % (full.key.encode(), length)
            )
            with contextlib.suppress(ConnectionError):
                connection.sendall(bytes(65536))
            answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"\r\nconnection: close\r\n" in answer
        assert answer.endswith(b"}")


def test_pipelined_requests_are_refused_in_turn(full: Full) -> None:
    head = b"POST /segment HTTP/1.1\r\nHost: x\r\nX-API-Key: %b\r\nContent-Length: 3\r\n%b\r\n"
    request = head + b"abc"
    live = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    key = full.key.encode()
    with connect(full.server) as connection:
        connection.sendall(
            live + request % (key, b"") + live + request % (key, b"Connection: close\r\n") + live
        )
        said = connection.makefile("rb").read()
    assert re.findall(rb"HTTP/1.1 (\d+) ", said) == [b"200", b"429", b"200", b"429"]


@pytest.mark.usefixtures("small_networks")
def test_bulk_is_refused_where_others_are_not(tmp_path: Path, photos: list[Sample]) -> None:
    bulk = {"Priority": "bulk"}
    with (
        serve_held(tmp_path, "--max-queue", "2") as (server, hold),
        ThreadPoolExecutor(2) as clients,
    ):
        url = f"{server.url}/segment"
        with hold():
            first = clients.submit(httpx.post, url, content=photos[0].data, headers=bulk)
            until(lambda: figures(server)[IN_FLIGHT] == 1)
            refused = httpx.post(url, content=photos[0].data, headers=bulk)
            second = clients.submit(httpx.post, url, content=photos[0].data)
            until(lambda: figures(server)[IN_FLIGHT] == 2)
            assert httpx.post(url, content=photos[0].data).status_code == 429
        assert refused.status_code == 429
        assert first.result().status_code == second.result().status_code == 200
        # There is room again.
        assert httpx.post(url, content=photos[0].data, headers=bulk).status_code == 200


def test_each_that_was_sent_is_served_or_refused(tmp_path: Path, photos: list[Sample]) -> None:
    with serve_held(tmp_path, "--max-queue", "3") as (server, _), ThreadPoolExecutor(16) as clients:
        url = f"{server.url}/segment"
        with httpx.Client(limits=httpx.Limits(max_connections=16)) as client:
            sent = [
                clients.submit(client.post, url, content=photo.data)
                for _ in range(10)
                for photo in photos
            ]
            statuses = [future.result().status_code for future in sent]
        assert set(statuses) == {200, 429}
        assert answers(server, "/segment", 200) == statuses.count(200)
        assert answers(server, "/segment", 429) == statuses.count(429)


@contextlib.asynccontextmanager
async def connected(
    app: Any, refuses: Callable[[Any], float | None]
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, Connection]]:
    """A client of an application whose connection asks `refuses`; both of its ends."""
    config = uvicorn.Config(app, http=Connection, ws="none", log_config=None)
    config.load()
    house = House(Settings(), Metrics(), refuses)
    connection = Connection(house, config, ServerState(), {})
    server = await asyncio.get_running_loop().create_server(lambda: connection, "127.0.0.1")
    async with server:
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        yield reader, writer, connection
        writer.transport.abort()
        connection.transport.abort()
        # Both are gone by the end of the loop's next turn.
        await asyncio.sleep(0)
        await asyncio.sleep(0)


def test_no_task_is_made_for_who_is_refused() -> None:
    async def scenario() -> None:
        tasks: list[Any] = []

        async def refuses(_scope: Any, _receive: Any, send: Callable[[Any], Any]) -> None:
            with contextlib.suppress(RuntimeError):
                tasks.append(asyncio.current_task())
            start = {"type": "http.response.start", "status": 429, "headers": []}
            await send(start)
            await send({"type": "http.response.body", "body": b"later"})

        def is_full(scope: Any) -> float | None:
            return 0 if scope["path"] == "/full" else None

        async with connected(refuses, is_full) as (reader, writer, _):
            for path in (b"/full", b"/other"):
                writer.write(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
                assert (await reader.readuntil(b"later")).startswith(b"HTTP/1.1 429 ")
        refused, other = tasks
        assert refused is None
        assert other is not None

    asyncio.run(scenario())


class Clock:
    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@dataclass
class Front:
    """A door, before a queue with one place that is taken until it is given back."""

    door: Door
    clock: Clock
    give_back: Callable[[], None]

    def ask(self, timeout_ms: float | None = None) -> tuple[HTTPScope, float | None]:
        headers = [] if timeout_ms is None else [(b"x-request-timeout-ms", b"%g" % timeout_ms)]
        scope: Any = {"path": "/segment", "method": "POST", "headers": headers, "state": {}}
        return scope, self.door.refuses(scope)

    def ask_until_one_waits(self) -> tuple[HTTPScope, float]:
        for _ in range(10_000):
            scope, wait_s = self.ask()
            assert wait_s is not None
            if wait_s:
                return scope, wait_s
        raise AssertionError("nobody waits")


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    clock = Clock()
    monkeypatch.setattr(shedding, "time", clock)
    monkeypatch.setattr(admission, "time", clock)
    settings = Settings(max_queue=1)
    gate = Gate(settings)
    service: Any = SimpleNamespace(
        settings=settings, gate=gate, networks=SimpleNamespace(default=SimpleNamespace(works=True))
    )
    with contextlib.ExitStack() as place:
        place.enter_context(gate.places(1, bulk=False))

        async def take() -> Front:
            return Front(Door(service), clock, place.close)

        yield asyncio.run(take())


def test_refusals_have_a_pace_and_the_first_have_none(front: Front) -> None:
    assert [front.ask()[1] for _ in range(10)] == [0] * 10
    front.ask_until_one_waits()
    waits = [wait_s for _ in range(100) if (wait_s := front.ask()[1])]
    assert len(waits) == 100
    assert waits == sorted(waits)
    # So many in ten seconds, however many ask.
    told = 0
    for _ in range(1000):
        front.clock.now += 0.01
        told += sum(front.ask()[1] == 0 for _ in range(50))
    assert told < 4000
    front.clock.now += 60
    assert front.ask()[1] == 0


@pytest.mark.parametrize("timeout_ms", [20, 1000, 30_000])
def test_nobody_waits_long_to_be_refused_by_what_it_may_take(
    front: Front, timeout_ms: float
) -> None:
    waits = [front.ask()[1] for _ in range(5000)]
    assert max(wait_s or 0 for wait_s in waits) == pytest.approx(3)
    _, wait_s = front.ask(timeout_ms)
    assert wait_s == pytest.approx(timeout_ms / 10_000)


def test_who_has_waited_is_refused_and_not_told_to_wait_again(front: Front) -> None:
    scope, wait_s = front.ask_until_one_waits()
    for _ in range(100):
        front.ask()
    front.clock.now += wait_s
    assert front.door.refuses(scope) == 0


def test_who_has_waited_is_let_in_if_there_is_room_by_then(front: Front) -> None:
    async def scenario() -> None:
        scope, wait_s = front.ask_until_one_waits()
        front.give_back()
        front.clock.now += wait_s
        assert front.door.refuses(scope) is None
        # Its deadline is what it was, and nothing says any more that it is refused.
        messages: list[Any] = []

        async def app(scope: Any, _receive: Any, _send: Any) -> None:
            messages.append(scope["state"]["stages"].started)

        await RequestContext(Shedding(app), Metrics(), lambda: False)(
            cast(Any, {**scope, "type": "http"}), cast(Any, None), cast(Any, None)
        )
        assert messages == [front.clock.now - wait_s]

    asyncio.run(scenario())


async def echo(_scope: Any, receive: Any, send: Any) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    length = str(len(body)).encode()
    headers = [(b"content-length", length)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def refuse(_scope: Any, _receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"5")]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": b"later"})


def test_who_waits_to_be_refused_is_not_read() -> None:
    async def scenario() -> None:
        asked = asyncio.Event()

        def refuses(_scope: Any) -> float | None:
            asked.set()
            return 3600

        async with connected(refuse, refuses) as (_, writer, connection):
            size = 64 * 2**20
            writer.write(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size)
            writer.write(bytes(size))
            await asked.wait()
            async with asyncio.timeout(60):
                while not connection.flow.read_paused:  # noqa: ASYNC110  # it has no event
                    await asyncio.sleep(0)
            assert writer.transport.get_write_buffer_size() > size / 2
            assert connection.cycle is not None
            assert len(connection.cycle.body) < 2**20

    asyncio.run(scenario())


def test_who_was_let_in_after_all_is_read_whole() -> None:
    async def scenario() -> None:
        asked: list[str] = []

        def refuses(scope: Any) -> float | None:
            asked.append(scope["path"])
            return 0.05 if len(asked) == 1 else None

        async with connected(echo, refuses) as (reader, writer, _):
            body = bytes(range(256)) * 20_000
            request = b"POST /%d HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b"
            # The second one waits behind the first.
            writer.write(request % (1, len(body), body) + request % (2, 3, b"abc"))
            for sent in (body, b"abc"):
                await reader.readuntil(b"\r\n\r\n")
                assert await reader.readexactly(len(sent)) == sent
        assert asked == ["/1", "/1", "/2"]

    asyncio.run(scenario())


@pytest.mark.parametrize("length", [3, 2**19])
def test_a_connection_goes_on_after_a_refusal_that_was_waited_for(length: int) -> None:
    async def scenario() -> None:
        waits = [0.05, 0, 0, 0.05, 0]
        async with connected(refuse, lambda _scope: waits.pop(0)) as (reader, writer, _):
            for _ in range(3):
                writer.write(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % length)
                writer.write(bytes(length))
                assert (await reader.readuntil(b"later")).startswith(b"HTTP/1.1 429 ")
        assert waits == []

    asyncio.run(scenario())


def test_a_server_that_stops_keeps_nobody_waiting() -> None:
    async def scenario() -> None:
        asked = asyncio.Event()
        waits = [3600, 0]

        def refuses(_scope: Any) -> float | None:
            asked.set()
            return waits.pop(0)

        async with connected(refuse, refuses) as (reader, writer, connection):
            writer.write(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc")
            await asked.wait()
            connection.shutdown()
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"\r\nconnection: close\r\n" in answer

    asyncio.run(scenario())


def test_malformed_chunk_while_waiting_gets_only_400() -> None:
    async def scenario() -> None:
        waits = [0.05, 0]
        async with connected(refuse, lambda _scope: waits.pop(0)) as (reader, writer, _):
            writer.write(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nno number\r\n")
            answer = await reader.read()
            # It begins later than the wait before the refusal, so it ends later.
            await asyncio.sleep(0.05)
        assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [b"400"]
        assert waits == [0]

    asyncio.run(scenario())
