"""What comes behind a chunked body is never a header, neither of its request nor of the next."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.keys import new_key
from tests.support.launch import ServerProcess, serve
from tests.support.samples import Sample
from tests.support.wire import connect, read_all, send_apart

KEY, LINE = new_key("clinic")
TRAILER = b"X-API-Key: %b\r\n" % KEY.encode()
LAST = b"GET /model HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, small_network: Path
) -> Iterator[ServerProcess]:
    file: Path = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(LINE, encoding="utf-8")
    with serve("--api-keys-file", str(file), "--model", str(small_network)) as server:
        yield server


def statuses(server: ServerProcess, *pieces: bytes) -> list[int]:
    with connect(server) as connection:
        send_apart(connection, *pieces)
        answers = read_all(connection).split(b"HTTP/1.1 ")[1:]
    return [int(answer[:3]) for answer in answers]


def chunked(body: bytes, trailers: bytes = b"", headers: bytes = b"") -> bytes:
    return (
        b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n%b"
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n%b\r\n"
        % (headers, len(body), body, trailers)
    )


@pytest.mark.parametrize(
    "trailers", [TRAILER, TRAILER + b"X-Other: 1\r\n", 2 * TRAILER], ids=["one", "two", "twice"]
)
def test_a_key_in_a_trailer_opens_nothing(
    guarded: ServerProcess, photos: list[Sample], trailers: bytes
) -> None:
    small = b"x"
    for body in (small, photos[0].data):
        request = chunked(body, trailers)
        assert statuses(guarded, request + LAST) == [401, 401]
        assert statuses(guarded, request, LAST) == [401, 401]
    whole = chunked(small, trailers) + LAST
    for cut in range(len(whole) - len(LAST) - 6, len(whole) - len(LAST) + 3):
        assert statuses(guarded, whole[:cut], whole[cut:]) == [401, 401]


def test_requests_behind_trailers_keep_their_own_headers(
    guarded: ServerProcess, photos: list[Sample]
) -> None:
    photo = photos[0].data
    good = chunked(photo, b"X-Checksum: 1\r\n", TRAILER)
    whole = b"POST /segment HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b" % (
        TRAILER,
        len(photo),
        photo,
    )
    last = LAST.replace(b"Connection", TRAILER + b"Connection")
    assert statuses(guarded, good + good + whole + good + last) == [200] * 5
