"""The server starts on the CPU and hands over to the engine without losing a request."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from numpy.typing import NDArray
from starlette.types import ASGIApp

from server.backends import BackendError, Images
from server.backends.engine_cache import EngineCache, EngineEvent
from server.http.app import create_app
from server.inference import loading
from server.settings import Settings
from tests.server.test_engine_cache import EngineStub, Harness
from tests.support.lesions import encode_photo, lesion_photo
from tests.support.offline import CPU_BACKEND
from trt_build.plan import Precision

PHOTO = encode_photo(lesion_photo(0, 200, 150).pixels)


def _use(monkeypatch: pytest.MonkeyPatch, cache: EngineCache) -> None:
    def opened(
        folder: Path,
        model: Path,
        precision: Precision,
        on_event: Callable[[EngineEvent], None],
        *,
        cores: int,
    ) -> EngineCache:
        cache._on_event = on_event
        return cache

    monkeypatch.setattr(loading, "open_engine_cache", opened)


@contextmanager
def _serve(app: ASGIApp) -> Iterator[httpx.Client]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        _until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def _backend(client: httpx.Client) -> str:
    answer = client.get("/health/ready")
    return str(answer.json()["backend"]) if answer.status_code == 200 else "none"


def _until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_cpu_serves_while_the_engine_is_built_and_no_request_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(monkeypatch, Harness(tmp_path).cache("slow"))
    app, _ = create_app(Settings(backend="auto", threads=1))
    seen: list[str] = []
    with _serve(app) as client:
        _until(lambda: _backend(client) == CPU_BACKEND)
        while "tensorrt" not in seen[-3:]:
            answer = client.post("/segment", content=PHOTO, headers={"content-type": "image/jpeg"})
            assert answer.status_code == 200
            seen.append(_backend(client))
        assert seen[0] == CPU_BACKEND
        metrics = client.get("/metrics").text

    for event in ("miss", "build_started", "build_succeeded", "hit", "serving"):
        assert f'slsnet_engine_events_total{{event="{event}"}} 1.0' in metrics


def test_an_engine_that_is_there_serves_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(tmp_path)
    assert harness.cache().obtain(threading.Event()) is not None
    _use(monkeypatch, harness.cache())
    monkeypatch.setattr(loading, "open_backend", lambda *_, **__: pytest.fail("not needed"))
    app, _ = create_app(Settings(backend="auto"))
    with _serve(app) as client:
        _until(lambda: _backend(client) == "tensorrt")


def test_an_engine_from_a_busy_card_makes_way_for_one_from_an_idle_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[EngineStub] = []

    def load(engine: Path) -> EngineStub:
        opened.append(EngineStub(engine))
        return opened[-1]

    harness = Harness(tmp_path)
    _use(monkeypatch, harness.cache(load=load, lull_s=0.5, look_s=0.02))
    app, _ = create_app(Settings(backend="auto", threads=1))
    with _serve(app) as client:
        _until(lambda: len(opened) == 2)
        answer = client.post("/segment", content=PHOTO, headers={"content-type": "image/jpeg"})
        assert answer.status_code == 200
    app, _ = create_app(Settings(backend="auto", threads=1))
    with _serve(app) as client:
        _until(lambda: _backend(client) == "tensorrt")
    assert harness.builds() == 2
    assert len(opened) == 3


def test_an_engine_that_fails_its_warm_up_does_not_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(EngineStub):
        def infer(self, batch: Images) -> NDArray[np.float32]:
            raise BackendError("cudaErrorIllegalAddress")

        def warm_up(self) -> None:
            self.infer(np.zeros((1, 128, 128, 3), np.uint8))

    _use(monkeypatch, Harness(tmp_path).cache(load=Broken))
    app, _ = create_app(Settings(backend="auto", threads=1))
    with _serve(app) as client:
        _until(lambda: "does not take over" in caplog.text)
        assert _backend(client) == CPU_BACKEND
        answer = client.post("/segment", content=PHOTO, headers={"content-type": "image/jpeg"})
        assert answer.status_code == 200


def test_the_server_stops_while_an_engine_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(tmp_path)
    _use(monkeypatch, harness.cache("hangs"))
    app, _ = create_app(Settings(backend="auto", threads=1))
    with _serve(app) as client:
        _until(lambda: harness.builds() == 1)
        assert _backend(client) == CPU_BACKEND


def test_tensorrt_that_cannot_be_used_fails_only_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> EngineCache:
        raise BackendError("TensorRT cannot be used: no NVIDIA driver")

    monkeypatch.setattr(loading, "open_engine_cache", refuse)
    failed = threading.Event()
    app, _ = create_app(Settings(backend="tensorrt"), failed.set)
    with _serve(app) as client:
        _until(failed.is_set)
        assert _backend(client) == "none"

    app, _ = create_app(Settings(backend="auto", threads=1))
    with _serve(app) as client:
        _until(lambda: _backend(client) == CPU_BACKEND)


def test_an_engine_that_is_found_but_fails_leaves_the_cpu_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(EngineStub):
        def warm_up(self) -> None:
            raise BackendError("cudaErrorIllegalAddress")

    harness = Harness(tmp_path)
    assert harness.cache().obtain(threading.Event()) is not None
    _use(monkeypatch, harness.cache(load=Broken))
    failed = threading.Event()
    app, _ = create_app(Settings(backend="auto", threads=1), failed.set)
    with _serve(app) as client:
        _until(lambda: _backend(client) == CPU_BACKEND)
        assert 'event="load_failed"} 1.0' in client.get("/metrics").text
    assert not failed.is_set()


def test_a_gpu_that_is_lost_leaves_the_cpu_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    works = threading.Event()
    works.set()

    class Fragile(EngineStub):
        def infer(self, batch: Images) -> NDArray[np.float32]:
            if not works.is_set():
                raise BackendError("a batch of 1 failed: cudaErrorIllegalAddress")
            return super().infer(batch)

    harness = Harness(tmp_path)
    assert harness.cache().obtain(threading.Event()) is not None
    _use(monkeypatch, harness.cache(load=Fragile))
    app, _ = create_app(Settings(backend="auto", threads=1))
    with _serve(app) as client:

        def segment() -> int:
            headers = {"content-type": "image/jpeg"}
            return client.post("/segment", content=PHOTO, headers=headers).status_code

        _until(lambda: _backend(client) == "tensorrt")
        assert segment() == 200
        works.clear()
        assert segment() == 500
        while _backend(client) == "tensorrt":
            segment()
        _until(lambda: _backend(client) == CPU_BACKEND)
        assert [segment() for _ in range(3)] == [200] * 3
        assert 'event="lost"} 1.0' in client.get("/metrics").text
    assert "engine lost: it fails on every batch" in caplog.text
