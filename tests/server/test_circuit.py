"""A backend that fails all the time: requests stop being taken, and it is brought back."""

import threading
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from server.backends import BackendError, BackendInfo, Images
from server.http.app import create_app
from server.inference import batching, loading
from server.settings import Settings
from tests.support.app import backend_of, serve_app
from tests.support.lesions import drawn_photo
from tests.support.waiting import until

PHOTO = drawn_photo(0, 200, 150)


class Fragile:
    """Fails while it is told to."""

    def __init__(self, broken: threading.Event) -> None:
        self._broken = broken
        self.calls = 0

    def describe(self) -> BackendInfo:
        return BackendInfo("fragile", "1", "cpu", "fp32", 4)

    def warm_up(self) -> None:
        self.infer(np.zeros((1, 128, 128, 3), np.uint8))

    def infer(self, batch: Images) -> NDArray[np.float32]:
        self.calls += 1
        if self._broken.is_set():
            raise BackendError("the device is gone")
        return np.ones((len(batch), 128, 128), np.float32)

    def close(self) -> None:
        pass


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[Fragile]]:
    """What breaks the backends that a server opens, and these backends."""
    broken = threading.Event()
    opened: list[Fragile] = []

    def open_fragile(*_: Any, **__: Any) -> Fragile:
        opened.append(Fragile(broken))
        return opened[-1]

    monkeypatch.setattr(loading, "open_backend", open_fragile)
    return broken, opened


def test_a_backend_that_keeps_failing_is_left_alone_until_it_is_brought_back(
    fragile: tuple[threading.Event, list[Fragile]],
) -> None:
    broken, opened = fragile
    app, _ = create_app(Settings(backend="onnxruntime"))
    with serve_app(app) as client:

        def metric(name: str) -> float:
            lines = client.get("/metrics").text.splitlines()
            return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

        def segment() -> int:
            return client.post("/segment", content=PHOTO).status_code

        until(lambda: backend_of(client) == "fragile")
        assert segment() == 200
        assert metric("slsnet_circuit_open") == 0
        broken.set()
        # Each photo fails in its batch and once more alone; the fifth failure is one too many.
        assert [segment() for _ in range(3)] == [500, 500, 503]
        calls = opened[0].calls
        answer = client.post("/segment", content=PHOTO)
        assert answer.status_code == 503
        assert "loaded anew" in answer.json()["detail"]
        assert answer.headers["retry-after"]
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 200
        assert metric("slsnet_circuit_open") == 1
        assert metric("slsnet_ready") == 0
        assert opened[0].calls == calls
        until(lambda: len(opened) >= 3)
        assert client.get("/health/ready").status_code == 503
        broken.clear()
        until(lambda: backend_of(client) == "fragile")
        assert segment() == 200
        assert metric("slsnet_circuit_open") == 0


def test_a_backend_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = threading.Event()
    opened: list[Fragile] = []

    class Hanging(Fragile):
        def infer(self, batch: Images) -> NDArray[np.float32]:
            if hangs.is_set() and self is opened[0]:
                threading.Event().wait()
            return super().infer(batch)

    def open_hanging(*_: Any, **__: Any) -> Fragile:
        opened.append(Hanging(threading.Event()))
        return opened[-1]

    monkeypatch.setattr(loading, "open_backend", open_hanging)
    # A test does not wait for so long.
    monkeypatch.setattr(batching, "HUNG_S", 0.5)
    app, _ = create_app(Settings(backend="onnxruntime"))
    with serve_app(app) as client:
        until(lambda: backend_of(client) == "fragile")
        hangs.set()
        assert client.post("/segment", content=PHOTO).status_code == 503
        until(lambda: len(opened) == 2)
        until(lambda: backend_of(client) == "fragile")
        assert client.post("/segment", content=PHOTO).status_code == 200
    # What hangs does not hold up the end.


def test_single_failures_leave_the_backend_in_use(
    fragile: tuple[threading.Event, list[Fragile]],
) -> None:
    broken, opened = fragile
    app, _ = create_app(Settings(backend="onnxruntime"))
    with serve_app(app) as client:
        until(lambda: backend_of(client) == "fragile")
        for _ in range(4):
            broken.set()
            assert client.post("/segment", content=PHOTO).status_code == 500
            broken.clear()
            assert client.post("/segment", content=PHOTO).status_code == 200
    assert len(opened) == 1
