"""`/stream`: masks as over HTTP, the newest frame first, and a word for each that is refused."""

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import numpy as np
import pytest

from server.keys import new_key
from tests.support.answers import figures, refused_connections
from tests.support.held import serve_held
from tests.support.launch import ServerProcess, serve
from tests.support.lesions import encode_photo, lesion_photo
from tests.support.samples import Sample
from tests.support.streams import PROTOCOL, close_of, opened, said, send_refused, stream
from tests.support.waiting import until
from tests.support.wire import connect, read_all

pytestmark = pytest.mark.usefixtures("small_networks")

PIXELS = lesion_photo(3, 160, 120).pixels
JPEG = encode_photo(PIXELS)


def frames(server: ServerProcess, status: str) -> float:
    return figures(server, status=status).get("slsnet_stream_frames_total", 0.0)


@pytest.fixture(scope="module")
def strict() -> Iterator[ServerProcess]:
    flags = ("--streams", "2", "--stream-frame-bytes", "60000", "--stream-frames-per-s", "20")
    with serve(*flags, "--max-pixels", "100000", "--log-level", "debug") as server:
        yield server


@pytest.mark.parametrize("form", ["png", "rle", "polygons"])
def test_masks_are_those_of_http(server: ServerProcess, photos: list[Sample], form: str) -> None:
    # Frames of several sizes, in one stream.
    sent = [JPEG, *(photo.data for photo in photos[:3]), encode_photo(PIXELS, "PNG")]
    query = f"?mask={form}&threshold=0.4&clean=true"
    with stream(server, query) as session:
        for number, photo in enumerate(sent, start=1):
            session.send(photo)
            message = said(session)
            assert (message["type"], message["frame"]) == ("mask", number), message
            assert message["dropped"] == 0
            expected = httpx.post(f"{server.url}/segment/json{query}", content=photo).json()
            for same in ("mask", "lesion", "image", "quality", "fitness", "clean", "model"):
                assert message["result"][same] == expected[same]
            stages = message["result"]["timings_ms"]
            assert set(stages) == {"decode", "queue", "infer"}
            assert message["total_ms"] >= sum(stages.values())


def test_bare_pixels_are_as_good_as_a_file(server: ServerProcess) -> None:
    height, width, _ = PIXELS.shape
    expected = httpx.post(f"{server.url}/segment/json", content=encode_photo(PIXELS, "PNG")).json()
    with stream(server, f"?frames=rgb&width={width}&height={height}") as session:
        session.send(PIXELS.tobytes())
        assert said(session)["result"]["mask"] == expected["mask"]
        # Of another size: the stream goes on.
        session.send(PIXELS.tobytes()[:-3])
        error = said(session)
        assert (error["frame"], error["error"]["status"]) == (2, 422)
        assert f"{width}×{height}" in error["error"]["detail"]
        session.send(PIXELS[::-1].tobytes())
        assert said(session)["type"] == "mask"


def test_a_broken_frame_is_told_and_the_next_is_served(strict: ServerProcess) -> None:
    wide = encode_photo(np.zeros((400, 300, 3), np.uint8))
    with stream(strict) as session, stream(strict) as other:
        for number, (frame, status) in enumerate(
            [(b"no photo", 415), (JPEG[:-200], 422), (b"", 422), (wide, 413)], start=1
        ):
            session.send(frame)
            error = said(session)
            assert error["type"] == "error"
            assert (error["frame"], error["error"]["status"]) == (number, status), error
            assert error["error"]["detail"]
            assert error["error"]["instance"] == "/stream"
        session.send(JPEG)
        assert said(session)["frame"] == 5
        other.send(JPEG)
        assert said(other)["frame"] == 1


def test_the_newest_frame_wins_and_a_stream_has_one_place(tmp_path: Path) -> None:
    with serve_held(tmp_path) as (server, hold), stream(server) as session, stream(server) as other:
        before = frames(server, "200")
        with hold():
            for count in range(50):
                session.send(JPEG)
                if not count:
                    until(lambda: figures(server)["slsnet_requests_in_flight"] == 1)
            until(lambda: frames(server, "dropped") == 48)
            other.send(JPEG)
            # However many the first has sent, the other is next.
            until(lambda: figures(server)["slsnet_requests_in_flight"] == 2)
            assert figures(server)["slsnet_streams"] == 2
        first, last = said(session), said(session)
        assert [first["frame"], last["frame"]] == [1, 50]
        assert [first["dropped"], last["dropped"]] == [48, 48]
        assert said(other)["dropped"] == 0
        until(lambda: frames(server, "200") == before + 3)


def test_a_frame_that_is_no_dermoscopic_photo_is_told_of_or_refused(server: ServerProcess) -> None:
    cap = encode_photo(np.zeros((120, 160, 3), np.uint8))
    with stream(server) as session:
        session.send(cap)
        assert said(session)["result"]["fitness"]["unfit"]
    with stream(server, "?reject_unfit=true") as session:
        session.send(cap)
        error = said(session)
        assert (error["frame"], error["error"]["status"]) == (1, 422)
        assert "no dermoscopic photo" in error["error"]["detail"]
        session.send(JPEG)
        assert not said(session)["result"]["fitness"]["unfit"]


def test_a_late_frame_is_told(tmp_path: Path) -> None:
    with serve_held(tmp_path) as (server, hold), stream(server, "?deadline_ms=300") as session:
        with hold():
            session.send(JPEG)
            error = said(session)
        assert (error["frame"], error["error"]["status"]) == (1, 504)
        assert "deadline_ms" in error["error"]["detail"]
        assert "X-Request-Timeout-Ms" not in error["error"]["detail"]
        assert frames(server, "504") == 1
        until(lambda: figures(server)["slsnet_requests_in_flight"] == 0)


def test_the_work_of_a_client_that_left_is_dropped(tmp_path: Path) -> None:
    with serve_held(tmp_path) as (server, hold):
        with hold():
            with stream(server) as session, stream(server) as other:
                for client in (session, other):
                    client.send(JPEG)
                until(lambda: figures(server)["slsnet_requests_in_flight"] == 2)
            until(lambda: figures(server)["slsnet_requests_in_flight"] == 0)
            until(lambda: figures(server)["slsnet_streams"] == 0)
        assert httpx.post(f"{server.url}/segment", content=JPEG).status_code == 200


def test_what_is_at_work_is_answered_when_the_server_stops(tmp_path: Path) -> None:
    with serve_held(tmp_path, "--drain-grace-s", "0") as (server, hold):
        with stream(server) as session, stream(server) as idle:
            with hold():
                session.send(JPEG)
                until(lambda: figures(server)["slsnet_requests_in_flight"] == 1)
                server.terminate()
                # It is told at once; the other is still at work.
                assert said(idle)["error"]["status"] == 503
                assert close_of(idle)[0] == 1012
            assert said(session)["type"] == "mask"
            assert said(session)["error"]["status"] == 503
            assert close_of(session)[0] == 1012
        assert server.wait() == 0


def test_too_many_streams(strict: ServerProcess) -> None:
    until(lambda: figures(strict)["slsnet_streams"] == 0)
    with stream(strict) as session:
        with stream(strict), opened(strict) as third:
            refusal = said(third)
            assert refusal["frame"] is None
            assert refusal["error"]["status"] == 429
            assert refusal["retry_after_s"] == 1
            code, reason = close_of(third)
            assert code == 4429
            assert "2 streams" in reason
        until(lambda: figures(strict)["slsnet_streams"] == 1)
        with stream(strict) as again:
            again.send(JPEG)
            assert said(again)["type"] == "mask"
        session.send(JPEG)
        assert said(session)["frame"] == 1


def test_too_large_too_many_and_text(strict: ServerProcess) -> None:
    until(lambda: figures(strict)["slsnet_streams"] == 0)
    with stream(strict) as good:
        with stream(strict) as session:
            send_refused(session, b"x" * 2_000_000)
            code, reason = close_of(session)
            assert code == 1009
            assert "60000" in reason
        with stream(strict) as session:
            # In fragments.
            send_refused(session, [b"x" * 40_000, b"x" * 40_000])
            assert close_of(session)[0] == 1009
        with stream(strict) as session:
            for _ in range(100):
                send_refused(session, b"x")
            while (message := said(session))["frame"] is not None:
                assert message["error"]["status"] == 415
            assert message["error"]["status"] == 429
            assert "20 frames a second" in message["error"]["detail"]
            assert close_of(session)[0] == 4429
        with stream(strict) as session:
            session.send("a frame?")
            assert said(session)["error"]["status"] == 400
            assert close_of(session)[0] == 4400
        good.send(JPEG)
        assert said(good)["frame"] == 1


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("?treshold=0.4", "treshold"),
        ("?threshold=2", "threshold"),
        ("?threshold=0.1_5", "no underscores"),
        ("?deadline_ms=2_000", "no underscores"),
        ("?frames=rgb&width=1_0&height=10", "no underscores"),
        ("?mask=png&mask=rle", "more than once"),
        ("?mask=probabilities", "polygons"),
        ("?deadline_ms=0", "deadline_ms"),
        ("?frames=rgb&width=160", "width and height"),
        ("?width=160&height=120", "frames=rgb"),
        ("?frames=rgb&width=200&height=200", "60000 bytes"),
        ("?api_key=secret", "api_key"),
    ],
)
def test_parameters_are_checked(strict: ServerProcess, query: str, words: str) -> None:
    with opened(strict, query) as session:
        refusal = said(session)
        assert refusal["error"]["status"] == 422
        assert words in refusal["error"]["detail"]
        assert close_of(session)[0] == 4422


@pytest.fixture(scope="module")
def impatient() -> Iterator[ServerProcess]:
    with serve("--stall-timeout-s", "0.3") as server:
        yield server


def test_a_stream_without_frames_ends() -> None:
    # Where clients have their time: nothing is to end it but that no frame comes.
    with serve("--keep-alive-s", "2") as server, stream(server) as session:
        refusal = said(session)
        assert refusal["error"]["status"] == 408
        assert close_of(session)[0] == 4408


HANDSHAKE = (
    b"GET /stream HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


def frame_of(data: bytes, announced: int = 0) -> bytes:
    """A binary message as a client sends it, its mask all zeros."""
    return struct.pack(">BBQI", 0x82, 0xFF, announced or len(data), 0) + data


def test_a_client_that_does_not_read_is_cut_off(impatient: ServerProcess) -> None:
    with connect(impatient) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # On a slow machine it may be cut off before all is sent.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(HANDSHAKE + b"\r\n")
            for _ in range(3):
                connection.sendall(frame_of(JPEG))
        until(lambda: refused_connections(impatient, "answer_not_read") >= 1)
        until(lambda: figures(impatient)["slsnet_streams"] == 0)
        # This body too has to come within 0.3 s.
        until(lambda: httpx.post(f"{impatient.url}/segment", content=JPEG).status_code == 200)


def test_frames_that_come_slowly_count_as_bytes_in_flight() -> None:
    with serve("--max-bytes-in-flight", "100000") as server:
        with connect(server) as connection:
            connection.sendall(HANDSHAKE + b"\r\n" + frame_of(b"x" * 80_000, announced=90_000))
            until(lambda: figures(server)["slsnet_bytes_in_flight"] >= 80_000)
            with stream(server) as session:
                send_refused(session, b"x" * 50_000)
                code, reason = close_of(session)
                assert code == 1013
                assert "memory" in reason
            assert httpx.post(f"{server.url}/segment", content=b"x" * 50_000).status_code == 429
        until(lambda: figures(server)["slsnet_bytes_in_flight"] == 0)
        with stream(server) as session:
            session.send(JPEG)
            assert said(session)["type"] == "mask"
        assert figures(server)["slsnet_bytes_in_flight"] == 0


class Locked:
    def __init__(self, server: ServerProcess, key: str) -> None:
        self.server = server
        self.key = key


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    key, line = new_key("clinic")
    file.write_text(line, encoding="utf-8")
    flags = ("--api-keys-file", str(file), "--cors-origins", "https://clinic.example")
    rate = ("--key-requests-per-s", "0.001", "--key-burst", "4", "--log-level", "debug")
    with serve(*flags, *rate) as server:
        yield Locked(server, key)


def test_keys(locked: Locked) -> None:
    server, key = locked.server, locked.key
    for options in (
        {},
        {"protocols": (PROTOCOL, "slsnet.key.slsnet_guess")},
        {"headers": {"Authorization": "Bearer slsnet_guess"}},
    ):
        with opened(server, **options) as session:
            refusal = said(session)
            assert refusal["error"]["status"] == 401
            assert "API key" in refusal["error"]["detail"]
            assert close_of(session)[0] == 4401
    # The handshake counts for the key's rate, and each frame.
    with stream(server, protocols=(PROTOCOL, f"slsnet.key.{key}")) as session:
        assert session.subprotocol == PROTOCOL
        for _ in range(2):
            session.send(JPEG)
            assert said(session)["type"] == "mask"
    with stream(server, headers={"Authorization": f"Bearer {key}"}) as session:
        session.send(JPEG)
        error = said(session)
        assert (error["frame"], error["error"]["status"]) == (1, 429)
        assert "requests a second" in error["error"]["detail"]
        assert error["retry_after_s"] > 0
    with opened(server, headers={"X-API-Key": key}) as session:
        assert said(session)["error"]["status"] == 429
        assert close_of(session)[0] == 4429
    until(lambda: "clinic GET /stream 101" in server.log())
    assert key not in server.log()


def test_a_key_has_so_many_streams_and_no_other_notices(tmp_path: Path) -> None:
    made = {name: new_key(name) for name in ("clinic", "lab")}
    file = tmp_path / "keys"
    file.write_text("\n".join(line for _, line in made.values()), encoding="utf-8")
    clinic, lab = ({"X-API-Key": key} for key, _ in made.values())
    with serve("--api-keys-file", str(file), "--key-streams", "1", "--streams", "3") as server:
        with stream(server, headers=clinic) as session:
            with opened(server, headers=clinic) as second:
                refusal = said(second)
                assert (refusal["frame"], refusal["error"]["status"]) == (None, 429)
                assert refusal["retry_after_s"] == 1
                code, reason = close_of(second)
                assert code == 4429 and "This key" in reason
            with stream(server, headers=lab) as other:
                for client in (session, other):
                    client.send(JPEG)
                    assert said(client)["frame"] == 1
        # What is closed gives its place back.
        until(lambda: figures(server)["slsnet_streams"] == 0)
        with stream(server, headers=clinic) as again:
            again.send(JPEG)
            assert said(again)["type"] == "mask"
    # Without keys there is nobody to count for.
    with serve("--key-streams", "1") as server, stream(server), stream(server):
        assert figures(server)["slsnet_streams"] == 2


def test_pages_of_other_sites_are_refused(locked: Locked, strict: ServerProcess) -> None:
    until(lambda: figures(strict)["slsnet_streams"] == 0)
    for origin in ("https://evil.example", "http://127.0.0.1:1", "null"):
        with opened(strict, origin=origin) as session:
            assert said(session)["error"]["status"] == 403
            assert close_of(session)[0] == 4403
    with stream(strict, origin=strict.url):
        pass
    with opened(locked.server, origin="https://evil.example") as session:
        assert said(session)["error"]["status"] == 403
    with opened(locked.server, origin="https://clinic.example") as session:
        # The origin is right; only the key is missing.
        assert said(session)["error"]["status"] == 401


def test_a_session_is_one_line_of_the_log_and_says_nothing_of_frames(strict: ServerProcess) -> None:
    until(lambda: figures(strict)["slsnet_streams"] == 0)
    labels = {"path": "/stream", "reason": "", "status": "101"}
    before = figures(strict, **labels).get("slsnet_requests_total", 0.0)
    with stream(strict, "?clean=true", headers={"X-Request-ID": "session-1"}) as session:
        session.send(JPEG)
        assert said(session)["result"]["request_id"] == "session-1"
    until(lambda: figures(strict, **labels).get("slsnet_requests_total") == before + 1)
    # Another thread writes it.
    until(lambda: "session-1" in strict.log())
    (line,) = [line for line in strict.log().splitlines() if "session-1" in line]
    assert 'GET /stream 101 frames;desc="1", dropped;desc="0"' in line
    assert "clean" not in strict.log()
    assert "ff d8" not in strict.log()
    assert figures(strict, path="/stream")["slsnet_request_seconds_count"] > 0


def test_over_http_the_way_is_told(server: ServerProcess) -> None:
    answer = httpx.get(f"{server.url}/stream")
    assert answer.status_code == 426
    assert answer.headers["upgrade"] == "websocket"
    assert "asyncapi.json" in answer.json()["detail"]
    with connect(server) as connection:
        # A handshake that is none, and one behind another request.
        connection.sendall(HANDSHAKE.replace(b"Version: 13", b"Version: 7") + b"\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 4")
    with connect(server) as connection:
        connection.sendall(b"GET /model HTTP/1.1\r\nHost: x\r\n\r\n" + HANDSHAKE + b"\r\n")
        connection.sendall(b"GET /model HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = read_all(connection)
        assert answers.count(b"HTTP/1.1 200") == 2
        assert answers.count(b"HTTP/1.1 426") == 1
    with connect(server) as connection:
        connection.sendall(HANDSHAKE + b"Cookie: " + b"x" * 20_000 + b"\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 431")


def test_a_full_server_refuses_the_handshake_over_http() -> None:
    with (
        serve("--max-connections", "1") as server,
        stream(server) as session,
        connect(server) as connection,
    ):
        connection.sendall(HANDSHAKE + b"\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 503 ")
        session.send(JPEG)
        assert said(session)["type"] == "mask"


def test_below_a_prefix() -> None:
    with serve("--root-path", "/skin") as server:
        for path in ("/skin/stream", "/stream"):
            with stream(server, path=path) as session:
                session.send(JPEG)
                assert said(session)["type"] == "mask"


def test_messages_are_as_the_reference_says(server: ServerProcess) -> None:
    document = httpx.get(f"{server.url}/asyncapi.json").json()
    assert document["asyncapi"] == "3.0.0"
    for reference in _references(document):
        found: Any = document
        for name in reference.removeprefix("#/").split("/"):
            found = found[name]
        assert found
    channel = document["channels"]["stream"]
    assert channel["address"] == "/stream"
    parameters = set(channel["bindings"]["ws"]["query"]["properties"])
    assert {"threshold", "size", "clean", "mask", "deadline_ms", "frames"} <= parameters

    def check(message: dict[str, Any], name: str) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema_rs.validator_for(schema).validate(message)

    with opened(server, "?mask=polygons&deadline_ms=60000") as session:
        check(said(session), "Ready")
        session.send(JPEG)
        check(said(session), "Masked")
        session.send(b"")
        check(said(session), "Failed")
        session.send("text")
        check(said(session), "Failed")


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value
            else:
                yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)
