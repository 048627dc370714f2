"""`stream()` of the Python client, against a real server."""

import asyncio
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from server.keys import new_key
from slsnet_client import (
    AsyncClient,
    Client,
    KeyRefused,
    Photo,
    RequestRefused,
    Streamed,
    Unreachable,
)
from tests.support import ROOT
from tests.support.answers import figures
from tests.support.authority import Authority
from tests.support.held import serve_held
from tests.support.launch import ServerProcess, free_port, serve
from tests.support.lesions import encode_photo, lesion_photo
from tests.support.waiting import until

PIXELS = lesion_photo(3, 160, 120).pixels
JPEG = encode_photo(PIXELS)

Run = Callable[..., list[Streamed]]


def _sync(
    url: str,
    frames: Any,
    key: str | None = None,
    verify: ssl.SSLContext | bool = True,
    retries: int = 0,
    **options: Any,
) -> list[Streamed]:
    with Client(url, api_key=key, verify=verify, retries=retries) as client:
        return list(client.stream(frames, **({"deadline_s": 60} | options)))


def _async(
    url: str,
    frames: Any,
    key: str | None = None,
    verify: ssl.SSLContext | bool = True,
    retries: int = 0,
    **options: Any,
) -> list[Streamed]:
    async def ask() -> list[Streamed]:
        async with AsyncClient(url, api_key=key, verify=verify, retries=retries) as client:
            answers = client.stream(frames, **({"deadline_s": 60} | options))
            return [answer async for answer in answers]

    return asyncio.run(ask())


@pytest.fixture(params=[_sync, _async], ids=["sync", "async"])
def run(request: pytest.FixtureRequest) -> Run:
    chosen: Run = request.param
    return chosen


def test_frames_get_the_masks_of_photos(server: ServerProcess, run: Run) -> None:
    frames: list[Photo] = [JPEG, PIXELS, b"no photo", lesion_photo(4, 90, 200).pixels]
    answers = run(server.url, frames, threshold=0.4, in_flight=1)
    assert [answer.index for answer in answers] == [0, 1, 2, 3]
    with Client(server.url) as client:
        for frame, answer in zip(frames, answers, strict=True):
            if isinstance(frame, bytes) and frame != JPEG:
                assert isinstance(answer.error, RequestRefused)
                assert answer.error.status == 415
                continue
            assert answer.result is not None
            expected = client.segment(frame, threshold=0.4)
            assert np.array_equal(answer.result.mask, expected.mask)
            assert answer.result.lesion == expected.lesion
            assert answer.result.quality == expected.quality
            assert answer.result.fitness == expected.fitness
            assert answer.latency_s > 0
            assert answer.dropped == 0


def test_frames_that_are_no_dermoscopic_photos_are_refused_if_asked(
    server: ServerProcess, run: Run
) -> None:
    frames = [np.zeros((120, 160, 3), np.uint8), JPEG]
    cap, photo = run(server.url, frames, reject_unfit=True, in_flight=1)
    assert isinstance(cap.error, RequestRefused) and photo.error is None


def test_frames_may_come_asynchronously(server: ServerProcess) -> None:
    async def camera() -> AsyncIterator[Photo]:
        for _ in range(3):
            await asyncio.sleep(0)
            yield JPEG

    assert [answer.index for answer in _async(server.url, camera())] == [0, 1, 2]


@pytest.mark.usefixtures("small_networks")
def test_a_frame_is_taken_once_there_is_room(tmp_path: Path, run: Run) -> None:
    taken = []

    def camera() -> Iterator[Photo]:
        for number in range(6):
            taken.append(number)
            yield JPEG

    with serve_held(tmp_path) as (server, hold):
        with hold():
            found: list[Streamed] = []
            thread = threading.Thread(
                target=lambda: found.extend(run(server.url, camera(), in_flight=2))
            )
            thread.start()
            until(lambda: figures(server)["slsnet_requests_in_flight"] == 1)
            until(lambda: len(taken) == 2)
            assert not found
        thread.join(60)
        assert [answer.index for answer in found] == list(range(6))
        assert {answer.dropped for answer in found} == {0}


def test_a_stream_that_is_left_ends(server: ServerProcess) -> None:
    with Client(server.url) as client:
        for answer in client.stream([JPEG] * 100, deadline_s=60):
            assert answer.result is not None
            break
        until(lambda: figures(server)["slsnet_streams"] == 0)
        assert client.segment(JPEG).mask.any()


@pytest.mark.usefixtures("small_networks")
def test_a_stream_outlives_its_server() -> None:
    answers = []
    with serve() as server, Client(server.url, retries=1000) as client:
        for answer in client.stream([JPEG] * 6, deadline_s=60, in_flight=1):
            answers.append(answer)
            if len(answers) == 2:
                server.kill_and_start_again()
    assert [answer.error for answer in answers] == [None] * len(answers)
    # A frame that was on its way when the server died is dropped, and counted.
    assert len(answers) + answers[-1].dropped == 6
    assert answers[-1].index == 5


@pytest.mark.usefixtures("small_networks")
def test_a_frame_that_is_awaited_while_the_server_dies_is_not_lost() -> None:
    taken, there = threading.Event(), threading.Event()

    def camera() -> Iterator[Photo]:
        yield JPEG
        taken.set()
        there.wait()
        yield PIXELS

    with serve() as server, Client(server.url, retries=1000) as client:
        stream = client.stream(camera(), deadline_s=60)
        assert next(stream).index == 0
        taken.wait()
        server.kill_and_start_again()
        there.set()
        (answer,) = stream
    assert (answer.index, answer.dropped, answer.error) == (1, 0, None)


@pytest.fixture(scope="module")
def strict(
    tmp_path_factory: pytest.TempPathFactory, small_network: Path
) -> Iterator[tuple[str, str]]:
    """URL of a server that wants a key and small frames, and the key."""
    key, line = new_key("clinic")
    keys = tmp_path_factory.mktemp("strict") / "keys"
    keys.write_text(line, encoding="utf-8")
    flags = ("--stream-frame-bytes", "20000", "--root-path", "/skin")
    with serve("--api-keys-file", str(keys), *flags, "--model", str(small_network)) as server:
        yield f"{server.url}/skin/", key


def test_keys(strict: tuple[str, str], run: Run) -> None:
    url, key = strict
    with pytest.raises(KeyRefused, match="API key"):
        run(url, [JPEG])
    (answer,) = run(url, [JPEG], key=key)
    assert answer.result is not None


def test_what_ends_a_stream_is_told(strict: tuple[str, str], run: Run) -> None:
    url, key = strict
    with pytest.raises(RequestRefused, match="20000") as refused:
        run(url, [JPEG, b"x" * 30_000], key=key)
    assert refused.value.status == 413
    with pytest.raises(RequestRefused, match="threshold") as refused:
        run(url, [JPEG], key=key, threshold=2)
    assert refused.value.status == 422
    assert refused.value.request_id
    with pytest.raises(Unreachable):
        run(f"http://127.0.0.1:{free_port()}", [JPEG])


@pytest.mark.usefixtures("small_networks")
def test_over_tls(tmp_path: Path, run: Run) -> None:
    authority = Authority(tmp_path, "authority")
    trust = ssl.create_default_context(cafile=str(authority.certificate))
    with serve("--tls-cert", str(authority.issue("server")), trust=trust) as server:
        (answer,) = run(server.url, [JPEG], verify=trust)
        assert answer.result is not None
        with pytest.raises(Unreachable, match=r"(?i)certificate"):
            run(server.url, [JPEG])


def test_a_frame_that_cannot_be_read_here_ends_it(server: ServerProcess, run: Run) -> None:
    with pytest.raises(OSError, match="absent"):
        run(server.url, ["absent.jpg"])
    until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 200)


def test_without_websockets_only_streams_are_missing(server: ServerProcess) -> None:
    code = f"""
import sys
sys.modules["websockets"] = None
from slsnet_client import Client
with Client("{server.url}") as client:
    client.segment("docs/lesion.jpg")
    try:
        list(client.stream(["docs/lesion.jpg"]))
    except ImportError as error:
        print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "client")},
        capture_output=True,
        text=True,
    )
    assert "slsnet-client[stream]" in ran.stdout, ran.stderr
