"""ONNX Runtime's CUDA provider, on a CUDA simulated on the host: which threads capture, and when.

The provider is simulated as its source has it: a graph for each thread and batch size, recorded in
CUDA's global mode at the second run (``cuda_graph.cc``, ``cuda_execution_provider.cc``).
"""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.device import Gpu
from server.backends import BackendError, onnxruntime_cuda
from server.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from server.inference.batching import Batcher
from server.observe.metrics import Metrics
from tests.support import MODEL
from tests.support.fake_cuda import FakeCuda, FakeStream, Status

GLOBAL = 0
BUCKETS = (1, 2, 4, 8, 16)


class FakeValue:
    def __init__(self, shape: list[int], dtype: type) -> None:
        self.array: NDArray[Any] = np.zeros(shape, dtype)

    def update_inplace(self, array: NDArray[Any]) -> None:
        self.array[...] = array

    def numpy(self) -> NDArray[Any]:
        return self.array.copy()


class FakeSession:
    """Gives the red channel as probability."""

    def __init__(self, gpu: "FakeOnnxRuntime") -> None:
        self.gpu = gpu
        self.streams: dict[int, FakeStream] = {}
        self.runs: dict[tuple[int, str], int] = {}

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def get_modelmeta(self) -> Any:
        return SimpleNamespace(custom_metadata_map={})

    def get_inputs(self) -> Any:
        return [SimpleNamespace(name="image", type="tensor(uint8)", shape=["n", 128, 128, 3])]

    def get_outputs(self) -> Any:
        return [SimpleNamespace(name="probability", type="tensor(float)", shape=["n", 128, 128])]

    def io_binding(self) -> Any:
        bound: dict[str, FakeValue] = {}
        return SimpleNamespace(
            bound=bound,
            bind_ortvalue_input=bound.__setitem__,
            bind_ortvalue_output=bound.__setitem__,
        )

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        thread = threading.get_ident()
        cuda = self.gpu.cuda
        if thread not in self.streams:
            self.streams[thread] = cuda.cudaStreamCreateWithFlags(1)[1]
        stream = self.streams[thread]
        key = (thread, options.graph)
        self.runs[key] = self.runs.get(key, 0) + 1
        if options.graph and self.runs[key] == 2:
            self.gpu.captures.append((threading.current_thread().name, options.graph))
            cuda.cudaStreamBeginCapture(stream, GLOBAL)
            self.gpu.while_capturing()
            status, _ = cuda.cudaStreamEndCapture(stream)
            if status is not Status.cudaSuccess:
                raise RuntimeError(f"CUDA failure 901: {status.name}")
        image, probability = binding.bound["image"], binding.bound["probability"]
        np.divide(image.array[..., 0], 255, out=probability.array)


class FakeOnnxRuntime:
    """Stands for the module ``onnxruntime``."""

    __version__ = "1.31.1"

    def __init__(self) -> None:
        self.cuda = FakeCuda()
        self.captures: list[tuple[str, str]] = []
        self.while_capturing: Callable[[], None] = lambda: None
        self.sessions: list[FakeSession] = []
        self.SessionOptions = SimpleNamespace
        self.OrtValue = SimpleNamespace(
            ortvalue_from_shape_and_type=lambda shape, dtype, *_: FakeValue(shape, dtype)
        )

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def preload_dlls(self) -> None: ...

    def InferenceSession(self, *_: Any, **__: Any) -> FakeSession:  # noqa: N802
        self.sessions.append(FakeSession(self))
        return self.sessions[-1]

    def RunOptions(self) -> Any:  # noqa: N802
        options: Any = SimpleNamespace(graph="")

        def add(_name: str, value: str) -> None:
            options.graph = value

        options.add_run_config_entry = add
        return options


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeOnnxRuntime:
    fake = FakeOnnxRuntime()
    monkeypatch.setattr(onnxruntime_cuda, "onnxruntime", fake)
    monkeypatch.setattr(onnxruntime_cuda, "current_gpu", lambda: Gpu("a GPU", "9.0", 80 << 30, 132))
    return fake


def _image(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (128, 128, 3), np.uint8)


def test_every_bucket_is_captured_before_the_first_request_and_none_after(
    gpu: FakeOnnxRuntime,
) -> None:
    backend = OnnxRuntimeCudaBackend(MODEL)
    loading = threading.Thread(target=backend.warm_up)
    loading.start()
    loading.join()
    captured = list(gpu.captures)
    assert sorted(int(graph) for _, graph in captured) == list(BUCKETS)

    answers: dict[int, NDArray[np.float32]] = {}

    def ask(n: int) -> None:
        answers[n] = backend.infer(np.stack([_image(i) for i in range(n)]))

    threads = [threading.Thread(target=ask, args=(n,)) for n in (1, 2, 3, 8, 16, 20) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gpu.captures == captured, "a capture while serving voids what others do, or is voided"
    for n, answer in answers.items():
        np.testing.assert_allclose(answer[n - 1], _image(n - 1)[..., 0] / 255, atol=1e-6)
    backend.close()


def test_what_serves_replays_what_was_captured_at_load(gpu: FakeOnnxRuntime) -> None:
    backend = OnnxRuntimeCudaBackend(MODEL)
    backend.warm_up()
    captured = list(gpu.captures)

    async def serve() -> None:
        batcher = Batcher(backend, Metrics())
        for seed in range(3):
            (found,) = await batcher.submit([_image(seed)], deadline=float("inf"))
            np.testing.assert_allclose(found.probability, _image(seed)[..., 0] / 255, atol=1e-6)
        await batcher.close()

    asyncio.run(serve())
    assert gpu.captures == captured


def test_two_networks_take_turns_so_that_one_captures_while_the_other_rests(
    gpu: FakeOnnxRuntime,
) -> None:
    """As at a reload: the old one's copies would be refused during the new one's capture."""
    first = OnnxRuntimeCudaBackend(MODEL)
    second = OnnxRuntimeCudaBackend(MODEL)
    assert len({name for name, _ in gpu.captures}) == 1, "one thread has the GPU"
    first.close()
    second.close()


def test_an_allocation_elsewhere_voids_a_capture_and_it_serves_without_graphs(
    gpu: FakeOnnxRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    def allocate() -> None:
        thread = threading.Thread(target=gpu.cuda.cudaMalloc, args=(100,))
        thread.start()
        thread.join()

    gpu.while_capturing = allocate
    backend = OnnxRuntimeCudaBackend(MODEL)
    assert "no CUDA graphs in ONNX Runtime" in caplog.text
    np.testing.assert_allclose(
        backend.infer(_image(1)[None])[0], _image(1)[..., 0] / 255, atol=1e-6
    )
    backend.close()


def test_a_network_that_does_not_load_is_said(
    gpu: FakeOnnxRuntime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any, **__: Any) -> FakeSession:
        raise RuntimeError("libcublas.so.13: cannot open shared object file")

    monkeypatch.setattr(gpu, "InferenceSession", broken)
    with pytest.raises(BackendError, match=r"cannot load .* on a GPU: libcublas"):
        OnnxRuntimeCudaBackend(MODEL)


def test_a_gpu_that_hangs_is_left_to_itself(
    gpu: FakeOnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the CPU serves, instead of a load that never ends."""
    backend = OnnxRuntimeCudaBackend(MODEL)
    entered, free = threading.Event(), threading.Event()

    def hang(_binding: Any, _options: Any) -> None:
        entered.set()
        free.wait(60)

    monkeypatch.setattr(gpu.sessions[0], "run_with_iobinding", hang)
    # A test does not wait for so long.
    monkeypatch.setattr(onnxruntime_cuda, "STUCK_S", 0.05)
    asking = threading.Thread(target=backend.infer, args=(_image(1)[None],))
    asking.start()
    assert entered.wait(60)
    try:
        with pytest.raises(BackendError, match="a GPU has not come back"):
            OnnxRuntimeCudaBackend(MODEL)
    finally:
        free.set()
        asking.join()
    backend.close()
