"""`--decode gpu`: what a server does whose GPU decodes, stops doing so, or was never there."""

import logging
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from engines.jpeg import GpuJpegError
from server.http.app import create_app
from server.inference import decoding
from server.inference.decoding import GpuDecoding
from server.observe.metrics import Metrics
from server.settings import Settings
from tests.support import ROOT
from tests.support.app import serve_app
from tests.support.devices import has_gpu
from tests.support.lesions import encode_photo, lesion_photo
from tests.support.waiting import until


class Reader:
    """Decodes on a GPU that is not there: every photo is one brown."""

    said = "a card: pixels are right"
    fails = False

    def __call__(self, data: bytes, orientation: int, size: int) -> NDArray[np.uint8] | None:
        if self.fails:
            raise GpuJpegError("CudaError: an illegal address")
        return np.full((size, size, 3), (150, 100, 80), np.uint8)


def _is_ready(client: httpx.Client) -> bool:
    return client.get("/health/ready").status_code == 200


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_server_without_a_gpu_says_so_and_does_not_start() -> None:
    command = [sys.executable, "-m", "server", "--port", "0", "--decode", "gpu"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 1
    assert "--decode gpu: " in ended.stderr and "Traceback" not in ended.stderr


def test_photos_go_to_the_gpu_until_it_fails_and_none_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reader = Reader()
    monkeypatch.setattr(decoding, "GpuJpeg", lambda: reader)
    photo = encode_photo(lesion_photo(5, 1000, 800).pixels, "JPEG")
    app, service = create_app(Settings(decode="gpu", threads=1))
    plain, _ = create_app(Settings(threads=1))

    def decoded() -> float:
        return service.metrics.registry.get_sample_value("slsnet_decoded_on_gpu_total") or 0

    with serve_app(app) as client, serve_app(plain) as other:
        for one in (client, other):
            until(partial(_is_ready, one))
        expected = other.post("/segment", content=photo).raise_for_status().content
        brown = client.post("/segment", content=photo).raise_for_status()
        assert decoded() == 1 and brown.content != expected
        # Another format, the CPU's.
        png = encode_photo(lesion_photo(5, 1000, 800).pixels, "PNG")
        client.post("/segment", content=png).raise_for_status()
        assert decoded() == 1

        reader.fails = True
        with caplog.at_level(logging.ERROR, "slsnet.decoding"):
            for _ in range(3):
                answer = client.post("/segment", content=photo).raise_for_status()
                assert answer.content == expected
        # Other tests of this process may have lowered the log's level.
        mine = [r for r in caplog.records if r.name == "slsnet.decoding"]
        told = [r.getMessage() for r in mine if r.levelno == logging.ERROR]
        assert told == [
            "the CPU decodes all photos from now on, the GPU failed: CudaError: an illegal address"
        ]
        assert decoded() == 1


def test_photos_that_fail_together_are_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    together = threading.Barrier(4)

    class Failing:
        said = "a card: pixels are right"

        def __call__(self, data: bytes, orientation: int, size: int) -> None:
            together.wait(600)
            raise GpuJpegError("CudaError: an illegal address")

    monkeypatch.setattr(decoding, "GpuJpeg", Failing)
    read = GpuDecoding(Metrics())
    with ThreadPoolExecutor(4) as threads, caplog.at_level(logging.ERROR, "slsnet.decoding"):
        assert list(threads.map(lambda _: read(b"", 1, 128), range(4))) == [None] * 4
    mine = [r for r in caplog.records if r.name == "slsnet.decoding"]
    assert [r.levelno for r in mine].count(logging.ERROR) == 1
