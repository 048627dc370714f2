"""The Python client, against real servers: full, killed, slow, locked, and of another kind."""

import asyncio
import json
import math
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import server as served
from server.keys import new_key
from slsnet_client import (
    VERSION,
    AsyncClient,
    Client,
    DeadlinePassed,
    KeyRefused,
    Photo,
    RequestRefused,
    Result,
    ServerBusy,
    ServerFailed,
    SlsnetError,
    Unreachable,
    overlay,
)
from tests.support import ROOT
from tests.support.held import serve_held
from tests.support.launch import ServerProcess, free_port, serve
from tests.support.lesions import encode_photo, lesion_photo
from tests.support.offline import Offline
from tests.support.waiting import until

PIXELS = lesion_photo(3).pixels
PNG = encode_photo(PIXELS, "PNG")
CAP = encode_photo(np.zeros((120, 160, 3), np.uint8), "PNG")

Segment = Callable[..., Result]


def _sync(server: str, photo: Photo, **options: Any) -> Result:
    named = {key: options.pop(key) for key in ("api_key", "retries") if key in options}
    with Client(server, **named) as client:
        return client.segment(photo, **options)


def _async(server: str, photo: Photo, **options: Any) -> Result:
    named = {key: options.pop(key) for key in ("api_key", "retries") if key in options}

    async def ask() -> Result:
        async with AsyncClient(server, **named) as client:
            return await client.segment(photo, **options)

    return asyncio.run(ask())


@pytest.fixture(params=[_sync, _async], ids=["sync", "async"])
def segment(request: pytest.FixtureRequest) -> Segment:
    chosen: Segment = request.param
    return chosen


class Stub:
    """A server of other manners: each answer is made here, and those at work are counted."""

    def __init__(self, answer: Callable[[int], tuple[int, dict[str, str], bytes]]) -> None:
        self.headers: list[dict[str, str]] = []
        self.at_work = self.most_at_work = 0
        lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    number = len(stub.headers)
                    stub.headers.append({k.lower(): v for k, v in self.headers.items()})
                    stub.at_work += 1
                    stub.most_at_work = max(stub.most_at_work, stub.at_work)
                status, headers, body = answer(number)
                with lock:
                    stub.at_work -= 1
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "Stub":
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture(scope="module")
def answered(server: ServerProcess) -> bytes:
    """A whole answer of the real server."""
    answer = httpx.post(f"{server.url}/segment/json", content=PNG)
    return answer.content


def test_every_kind_of_photo_gets_the_mask_of_the_network(
    server: ServerProcess, segment: Segment, offline: Offline, tmp_path: Path
) -> None:
    path = tmp_path / "lesion.png"
    path.write_bytes(PNG)
    expected = offline.mask(PNG)
    for photo in (path, str(path), PNG, PIXELS, Image.fromarray(PIXELS)):
        result = segment(server.url, photo)
        assert result.mask.dtype == np.bool_
        assert np.array_equal(result.mask, expected)
        assert result.lesion.area == expected.sum() and result.lesion.found
        assert result.network.name == "slsnet" and result.request_id and result.timings_ms
        assert result.probability is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["lesion.png"]


def test_masks_are_upright(server: ServerProcess, offline: Offline) -> None:
    turned = encode_photo(PIXELS, "JPEG", orientation=6)
    with Client(server.url) as client, Image.open(BytesIO(turned)) as picture:
        masks = [client.segment(photo).mask for photo in (turned, picture)]
        assert np.array_equal(masks[0], offline.mask(turned))
        for mask in masks:
            assert mask.shape == PIXELS.shape[:2]
            assert overlay(turned, mask).size == overlay(picture, mask).size


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_images_of_every_mode_are_taken(server: ServerProcess, mode: str) -> None:
    picture = Image.fromarray(PIXELS)
    if mode == "I;16":
        picture = Image.fromarray(PIXELS[..., 1].astype(np.uint16) * 257)
    with Client(server.url) as client:
        result = client.segment(picture if mode == "I;16" else picture.convert(mode))
    assert result.mask.shape == PIXELS.shape[:2]


def test_options_reach_the_network(server: ServerProcess, segment: Segment) -> None:
    result = segment(server.url, PNG, threshold=0.3, clean=True, probability=True, bulk=True)
    assert result.threshold == 0.3 and result.clean
    assert result.probability is not None and result.probability.shape == result.mask.shape
    plain = segment(server.url, PNG, threshold=0.3, clean=True)
    assert np.mean(plain.mask != result.mask) < 1e-4
    named = segment(server.url, PNG, threshold=0.3, clean=True, model="slsnet")
    assert np.array_equal(named.mask, plain.mask)
    with pytest.raises(RequestRefused, match="no network 'resnet'"):
        segment(server.url, PNG, model="resnet")
    with Client(server.url) as client:
        assert client.network("slsnet") == client.network()


def test_a_deadline_may_be_infinite(server: ServerProcess, segment: Segment) -> None:
    assert segment(server.url, PNG, deadline_s=math.inf).lesion.found
    with Client(server.url) as client:
        assert all(not answer.error for answer in client.stream([PNG], deadline_s=math.inf))


def test_a_picture_that_is_no_dermoscopic_photo_is_refused_if_asked(
    server: ServerProcess, segment: Segment
) -> None:
    result = segment(server.url, CAP)
    assert result.fitness is not None and result.fitness["unfit"]
    assert result.quality is not None and result.quality["grade"] in {"good", "fair", "poor"}
    with Client(server.url) as client:
        for ask in (
            lambda: segment(server.url, CAP, reject_unfit=True),
            lambda: client.segment_as(CAP, "svg", reject_unfit=True),
            lambda: client.segment_json(CAP, reject_unfit=True),
        ):
            with pytest.raises(RequestRefused, match="no dermoscopic photo"):
                ask()
        [refused, fit] = client.segment_many([CAP, PNG], reject_unfit=True)
    assert isinstance(refused.error, RequestRefused) and fit.error is None


def test_features_and_other_forms(server: ServerProcess, segment: Segment) -> None:
    result = segment(server.url, PNG, features=True)
    assert result.features is not None and result.features["perimeter"] > 0
    assert result.fitness is not None and result.fitness["distance"] > 0
    assert segment(server.url, PNG).features is None
    with Client(server.url) as client:
        drawn = client.segment_as(PNG, "overlay-png", threshold=0.3)
        levels = client.segment_as(PIXELS, "npy", clean=True, bulk=True)
        with pytest.raises(RequestRefused, match="format"):
            client.segment_as(PNG, "gif")  # type: ignore[arg-type]
    assert Image.open(BytesIO(drawn)).size == PIXELS.shape[1::-1]
    assert np.load(BytesIO(levels)).shape == PIXELS.shape[:2]

    async def ask() -> bytes:
        async with AsyncClient(server.url) as client:
            return await client.segment_as(PNG, "overlay-png", threshold=0.3)

    assert asyncio.run(ask()) == drawn


def test_the_outline_is_drawn_where_the_mask_ends(server: ServerProcess) -> None:
    mask = np.zeros(PIXELS.shape[:2], np.bool_)
    mask[100:300, 150:400] = True
    drawn = np.asarray(overlay(PIXELS, mask, (255, 0, 255)))
    assert (drawn[100, 200] == (255, 0, 255)).all()
    far = [(200, 250), (50, 50), (400, 500)]
    assert all((drawn[at] == PIXELS[at]).all() for at in far)
    none = overlay(PIXELS, np.zeros_like(mask))
    assert np.array_equal(np.asarray(none), PIXELS)
    with pytest.raises(ValueError, match="pixels"):
        overlay(PIXELS, mask[:-1])


@pytest.fixture(scope="module")
def strict(small_network: Path) -> Iterator[ServerProcess]:
    with serve("--max-body-bytes", "200000", "--model", str(small_network)) as server:
        yield server


def test_a_refusal_says_what_the_server_said(segment: Segment, strict: ServerProcess) -> None:
    broken = PNG[: len(PNG) // 2][:150_000]
    for photo, status in ((b"no photo", 415), (broken, 422), (bytes(300_000), 413), (b"", 400)):
        with pytest.raises(RequestRefused) as refused:
            segment(strict.url, photo)
        error = refused.value
        assert error.status == status and error.title and error.type == "about:blank"
        assert error.detail and error.request_id and error.request_id in str(error)


@pytest.fixture(scope="module")
def locked(
    tmp_path_factory: pytest.TempPathFactory, small_network: Path
) -> Iterator[tuple[ServerProcess, str]]:
    """A server that wants a key, and the key."""
    key, line = new_key("clinic")
    file = tmp_path_factory.mktemp("locked") / "keys"
    file.write_text(f"{line}\n", encoding="utf-8")
    with serve("--api-keys-file", str(file), "--model", str(small_network)) as server:
        yield server, key


def test_keys(segment: Segment, locked: tuple[ServerProcess, str]) -> None:
    server, key = locked
    assert segment(server.url, PNG, api_key=key).lesion.found
    for wrong in (None, "wrong"):
        with pytest.raises(KeyRefused) as refused:
            segment(server.url, PNG, api_key=wrong)
        assert refused.value.status == 401 and "wrong" not in str(refused.value)


def test_what_is_no_photo_is_not_sent(segment: Segment, tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(FileNotFoundError):
        segment(nowhere, tmp_path / "absent.jpg")
    for pixels in (PIXELS / 255, PIXELS[..., :2], 5):
        with pytest.raises(TypeError):
            segment(nowhere, pixels)
    with pytest.raises(Unreachable) as lost:
        segment(nowhere, PNG, retries=1)
    assert lost.value.status is None and lost.value.request_id


@pytest.mark.usefixtures("small_networks")
def test_a_server_killed_and_started_again_is_not_noticed() -> None:
    with serve() as server, Client(server.url, deadline_s=120, retries=1000) as client:
        expected = client.segment(PNG).mask
        for _ in range(2):
            server.process.kill()
            server.wait()
            with ThreadPoolExecutor(1) as threads:
                asked = threads.submit(client.segment, PNG)
                server.kill_and_start_again()
                assert np.array_equal(asked.result().mask, expected)
                assert np.array_equal(client.segment(PNG).mask, expected)


@pytest.mark.usefixtures("small_networks")
def test_a_full_server_is_asked_again_when_it_says(tmp_path: Path) -> None:
    with (
        serve_held(tmp_path, "--max-queue", "1") as (server, hold),
        Client(server.url, deadline_s=120, retries=100) as client,
        ThreadPoolExecutor(2) as threads,
    ):
        with hold():
            first = threads.submit(client.segment, PNG)
            metrics = f"{server.url}/metrics"
            until(lambda: "\nslsnet_requests_in_flight 1.0" in httpx.get(metrics).text)
            with pytest.raises(ServerBusy) as full, Client(server.url, retries=0) as hasty:
                hasty.segment(PNG)
            assert full.value.status == 429 and (full.value.retry_after_s or 0) >= 1
            second = threads.submit(client.segment, PNG)
        assert first.result().lesion.found and second.result().lesion.found


@pytest.mark.parametrize("status", [429, 503])
def test_repeats_keep_one_id_and_tell_what_is_left(
    answered: bytes, segment: Segment, status: int
) -> None:
    def answer(number: int) -> tuple[int, dict[str, str], bytes]:
        return (status, {"Retry-After": "1"}, b"{}") if number < 1 else (200, {}, answered)

    with Stub(answer) as stub:
        segment(stub.url, PNG, deadline_s=60)
        first, second = stub.headers
    assert first["x-request-id"] == second["x-request-id"]
    told = [int(sent["x-request-timeout-ms"]) for sent in (first, second)]
    assert told[0] <= 60_000 and told[1] <= told[0] - 1000


def test_nothing_is_repeated_that_cannot_help(segment: Segment) -> None:
    said = json.dumps({"title": "Oh", "detail": "It failed.", "type": "urn:x", "request_id": "7"})
    for status, kind in ((500, ServerFailed), (422, RequestRefused), (504, DeadlinePassed)):
        failure = (status, dict[str, str](), said.encode())
        with Stub(partial(lambda answer, _: answer, failure)) as stub:
            with pytest.raises(kind) as failed:
                segment(stub.url, PNG)
            assert len(stub.headers) == 1
        assert (failed.value.title, failed.value.type) == ("Oh", "urn:x")
        assert (failed.value.detail, failed.value.request_id) == ("It failed.", "7")
    # Where the pause would end after the deadline, nobody waits for it.
    with Stub(lambda _: (503, {"Retry-After": "3600"}, b"<html>")) as stub:
        with pytest.raises(ServerBusy) as busy:
            segment(stub.url, PNG)
        assert busy.value.retry_after_s == 3600 and len(stub.headers) == 1


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"mask": {"format": "png"}}'])
def test_an_answer_of_something_else_is_told(segment: Segment, body: bytes) -> None:
    with Stub(lambda _: (200, {}, body)) as stub, pytest.raises(ServerFailed, match="address"):
        segment(stub.url, PNG)


def test_the_client_keeps_the_deadline_where_the_server_does_not(
    server: ServerProcess, segment: Segment
) -> None:
    asleep = threading.Event()

    def answer(_: int) -> tuple[int, dict[str, str], bytes]:
        asleep.wait()
        return 200, {}, b""

    with pytest.raises(DeadlinePassed):
        segment(server.url, PNG, deadline_s=0.001)
    with Stub(answer) as stub:
        try:
            with pytest.raises(DeadlinePassed) as late:
                segment(stub.url, PNG, deadline_s=0.3)
            assert late.value.request_id
        finally:
            asleep.set()


@pytest.mark.parametrize("is_async", [False, True])
def test_many_come_as_they_get_done(answered: bytes, is_async: bool) -> None:
    one_came = threading.Event()

    def answer(number: int) -> tuple[int, dict[str, str], bytes]:
        # The first to ask is answered once another's outcome is there.
        return 200 if number or one_came.wait(60) else 500, {}, answered

    options: dict[str, Any] = {"concurrency": 2, "ordered": False}
    with Stub(answer) as stub:
        outcomes = []
        if is_async:

            async def ask() -> None:
                async with AsyncClient(stub.url, deadline_s=120) as client:
                    async for outcome in client.segment_many([PNG] * 4, **options):
                        outcomes.append(outcome)
                        one_came.set()

            asyncio.run(ask())
        else:
            with Client(stub.url, deadline_s=120) as client:
                for outcome in client.segment_many([PNG] * 4, **options):
                    outcomes.append(outcome)
                    one_came.set()
    assert all(outcome.result for outcome in outcomes)
    assert sorted(outcome.index for outcome in outcomes) == [0, 1, 2, 3]


@pytest.mark.parametrize("is_async", [False, True])
def test_no_more_are_at_work_than_allowed(answered: bytes, is_async: bool) -> None:
    taken = 0
    three = threading.Barrier(3)

    def photos() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(12):
            taken += 1
            yield PNG

    def answer(_: int) -> tuple[int, dict[str, str], bytes]:
        # Three at a time get here, or it breaks.
        three.wait(60)
        return 200, {}, answered

    with Stub(answer) as stub:
        if is_async:

            async def ask() -> list[int]:
                async with AsyncClient(stub.url, deadline_s=120) as client:
                    many = client.segment_many(photos(), concurrency=3)
                    return [outcome.index async for outcome in many if outcome.result]

            indices = asyncio.run(ask())
        else:
            with Client(stub.url, deadline_s=120) as client:
                many = client.segment_many(photos(), concurrency=3)
                first = next(many)
                assert taken == 3
                indices = [first.index, *(outcome.index for outcome in many if outcome.result)]
        assert indices == list(range(12))
        assert stub.most_at_work == 3
        assert {sent["priority"] for sent in stub.headers} == {"bulk"}


def test_one_of_many_fails_alone(server: ServerProcess, tmp_path: Path) -> None:
    with Client(server.url) as client:
        outcomes = list(client.segment_many([PNG, b"no photo", tmp_path / "absent", PIXELS]))
        with pytest.raises(ValueError, match="concurrency"):
            list(client.segment_many([PNG], concurrency=0))
    assert [outcome.result is not None for outcome in outcomes] == [True, False, False, True]
    assert isinstance(outcomes[1].error, SlsnetError)
    assert isinstance(outcomes[2].error, FileNotFoundError)


def test_it_opens_no_file_to_write(server: ServerProcess, tmp_path: Path) -> None:
    code = """if True:
        import os, sys
        import numpy as np
        from slsnet_client import Client, overlay

        written = []
        def watch(event, values):
            flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT
            if event == "open" and values[0] != os.devnull and values[2] & flags:
                written.append(values)
        sys.dont_write_bytecode = True
        sys.addaudithook(watch)
        with Client(sys.argv[1], deadline_s=600) as client:
            for photo in ("docs/lesion.jpg", np.full((3000, 4000, 3), 128, np.uint8)):
                overlay(photo, client.segment(photo, probability=True).mask)
        assert not written, written
        open(sys.argv[2], "w").close()
        assert written
        """
    subprocess.run(
        [sys.executable, "-c", code, server.url, str(tmp_path / "noticed")],
        cwd=ROOT,
        env={"PYTHONPATH": "client"},
        check=True,
    )


def test_the_guides_example_runs(server: ServerProcess) -> None:
    for guide in ("docs/guides/python-client.md", "client/README.md"):
        found = re.search(r"```python\n(.*?)```", (ROOT / guide).read_text(), re.DOTALL)
        assert found
        code = found[1].replace("http://127.0.0.1:8000", server.url)
        code = code.replace('"lesion.jpg"', '"docs/lesion.jpg"').replace(
            '.save("outlined.png")', ""
        )
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=ROOT,
            env={"PYTHONPATH": "client"},
            check=True,
        )


def test_it_needs_only_what_its_package_names() -> None:
    project = tomllib.loads((ROOT / "client/pyproject.toml").read_text())["project"]
    named = {re.split(r"[<>=]", one)[0] for one in project["dependencies"]}
    assert named == {"httpx", "numpy", "pillow"}
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert whole["requires-python"].startswith(project["requires-python"])
    code = (
        "import sys, slsnet_client;"
        "print(*({'server', 'photos', 'torch', 'onnxruntime', 'fastapi'} & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "client", capture_output=True, check=True
    )
    assert not loaded.stdout.strip()


def test_client_and_server_have_one_version() -> None:
    assert served.VERSION == VERSION
