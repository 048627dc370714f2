"""The server starts on the CPU and hands over to the engine without losing a request."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.plan import Precision
from server.backends import Backend, BackendError, Images
from server.backends.engine_cache import EngineCache, EngineEvent
from server.http.app import create_app
from server.inference import loading
from server.settings import Settings
from tests.support.app import backend_of, serve_app
from tests.support.engines import EngineStub, Harness
from tests.support.lesions import drawn_photo
from tests.support.offline import CPU_BACKEND
from tests.support.waiting import until

PHOTO = drawn_photo(0, 200, 150)


def _use(
    monkeypatch: pytest.MonkeyPatch,
    harness: Harness,
    behaviour: str = "good",
    load: Callable[[Path], Backend] = EngineStub,
    **options: Any,
) -> None:
    def opened(
        folder: Path,
        model: Path,
        precision: Precision,
        on_event: Callable[[EngineEvent], None],
        *,
        cores: int,
    ) -> EngineCache:
        return harness.cache(behaviour, load, on_event=on_event, **options)

    monkeypatch.setattr(loading, "open_engine_cache", opened)


def test_the_cpu_serves_while_the_engine_is_built_and_no_request_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(tmp_path)
    _use(monkeypatch, harness, "held")
    app, _ = create_app(Settings(backend="auto", threads=1))
    seen: list[str] = []
    with serve_app(app) as client:
        until(lambda: backend_of(client) == CPU_BACKEND)
        while "tensorrt" not in seen[-3:]:
            answer = client.post("/segment", content=PHOTO, headers={"content-type": "image/jpeg"})
            assert answer.status_code == 200
            seen.append(backend_of(client))
            if len(seen) == 5:
                harness.let_go()
        assert seen[0] == CPU_BACKEND
        metrics = client.get("/metrics").text

    for event in ("miss", "build_started", "build_succeeded", "hit", "serving"):
        assert f'slsnet_engine_events_total{{event="{event}"}} 1.0' in metrics


def test_an_engine_that_is_there_serves_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(tmp_path)
    assert harness.cache().obtain(threading.Event()) is not None
    _use(monkeypatch, harness)
    monkeypatch.setattr(loading, "open_backend", lambda *_, **__: pytest.fail("not needed"))
    app, _ = create_app(Settings(backend="auto"))
    with serve_app(app) as client:
        until(lambda: backend_of(client) == "tensorrt")


def test_an_engine_from_a_busy_card_makes_way_for_one_from_an_idle_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[EngineStub] = []

    def load(engine: Path) -> EngineStub:
        opened.append(EngineStub(engine))
        return opened[-1]

    harness = Harness(tmp_path)
    _use(monkeypatch, harness, load=load, lull_s=0.5, look_s=0.02)
    app, _ = create_app(Settings(backend="auto", threads=1))
    with serve_app(app) as client:
        until(lambda: len(opened) == 2)
        answer = client.post("/segment", content=PHOTO, headers={"content-type": "image/jpeg"})
        assert answer.status_code == 200
    app, _ = create_app(Settings(backend="auto", threads=1))
    with serve_app(app) as client:
        until(lambda: backend_of(client) == "tensorrt")
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

    _use(monkeypatch, Harness(tmp_path), load=Broken)
    app, _ = create_app(Settings(backend="auto", threads=1))
    with serve_app(app) as client:
        until(lambda: "does not take over" in caplog.text)
        assert backend_of(client) == CPU_BACKEND
        answer = client.post("/segment", content=PHOTO, headers={"content-type": "image/jpeg"})
        assert answer.status_code == 200


def test_the_server_stops_while_an_engine_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(tmp_path)
    _use(monkeypatch, harness, "hangs")
    app, _ = create_app(Settings(backend="auto", threads=1))
    with serve_app(app) as client:
        until(lambda: harness.builds() == 1)
        assert backend_of(client) == CPU_BACKEND


def test_tensorrt_that_cannot_be_used_fails_only_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> EngineCache:
        raise BackendError("TensorRT cannot be used: no NVIDIA driver")

    monkeypatch.setattr(loading, "open_engine_cache", refuse)
    failed = threading.Event()
    app, _ = create_app(Settings(backend="tensorrt"), failed.set)
    with serve_app(app) as client:
        until(failed.is_set)
        assert backend_of(client) == "none"

    app, _ = create_app(Settings(backend="auto", threads=1))
    with serve_app(app) as client:
        until(lambda: backend_of(client) == CPU_BACKEND)


def test_an_engine_that_is_found_but_fails_leaves_the_cpu_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(EngineStub):
        def warm_up(self) -> None:
            raise BackendError("cudaErrorIllegalAddress")

    harness = Harness(tmp_path)
    assert harness.cache().obtain(threading.Event()) is not None
    _use(monkeypatch, harness, load=Broken)
    failed = threading.Event()
    app, _ = create_app(Settings(backend="auto", threads=1), failed.set)
    with serve_app(app) as client:
        until(lambda: backend_of(client) == CPU_BACKEND)
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
    _use(monkeypatch, harness, load=Fragile)
    app, _ = create_app(Settings(backend="auto", threads=1))
    with serve_app(app) as client:

        def segment() -> int:
            headers = {"content-type": "image/jpeg"}
            return client.post("/segment", content=PHOTO, headers=headers).status_code

        until(lambda: backend_of(client) == "tensorrt")
        assert segment() == 200
        works.clear()
        assert segment() == 500
        while backend_of(client) == "tensorrt":
            segment()
        until(lambda: backend_of(client) == CPU_BACKEND)
        assert [segment() for _ in range(3)] == [200] * 3
        assert 'event="lost"} 1.0' in client.get("/metrics").text
    assert "engine lost: it fails on every batch" in caplog.text
