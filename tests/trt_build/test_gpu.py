"""On a GPU: execution, graphs, parity on the device. Skipped, with the reason, elsewhere.

The same file runs on any GPU; without an installed TensorRT the CUDA layer alone is tested.
"""

import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from common.onnx import onnx_runner
from engines.plan import PRECISIONS, PlanInfo, Precision, read_plan_info
from engines.runtime import EngineRunner
from engines.tensorrt_api import TensorRT, TensorRTError, find_tensorrt
from server.backends import Backend, BackendError
from server.backends.engine_cache import EngineEvent, open_engine_cache
from server.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from server.backends.tensorrt import TensorRtBackend
from tests.support import MODEL
from tests.support.devices import why_no_gpu
from trt_build import parity
from trt_build.build import BuildOptions, build
from trt_build.calibrate import measure_ranges
from trt_build.parity import GENERATED, gate_engine
from trt_build.samples import REFERENCE, batches, load_samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(why_no_gpu()), reason=why_no_gpu() or "there is a GPU"),
]


@pytest.fixture(scope="module")
def trt() -> TensorRT:
    try:
        trt = find_tensorrt()
        trt.check_builds()
    except TensorRTError as error:
        pytest.skip(str(error))
    return trt


def test_photos_decoded_on_the_card_have_the_cpus_masks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("nvidia.nvimgcodec", reason="needs requirements-decode.txt")
    code = parity.main(["--onnx", str(MODEL), "--decode", "gpu"])
    said = capsys.readouterr().out
    assert code == 0 and "decoded gpu" in said, said


@pytest.fixture(scope="module")
def built(trt: TensorRT, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PlanInfo]:
    engine = tmp_path_factory.mktemp("engine") / "fp16.engine"
    return engine, build(MODEL, engine, BuildOptions(buckets=(1, 2, 4, 8)), trt=trt)


def test_memory_streams_and_graphs_of_cuda() -> None:
    from engines import cuda

    pixels = cuda.PinnedArray((4, 1024), np.dtype(np.uint8))
    back = cuda.PinnedArray((4, 1024), np.dtype(np.uint8))
    device = cuda.DeviceMemory(pixels.array.nbytes)
    stream = cuda.Stream()

    def enqueue() -> None:
        stream.copy(device.address, pixels.address, pixels.array.nbytes)
        stream.copy(back.address, device.address, pixels.array.nbytes)

    graph = stream.capture(enqueue)
    stream.synchronize()
    assert not back.array.any(), "recording runs nothing"
    for seed in range(3):
        pixels.array[:] = np.random.default_rng(seed).integers(0, 256, (4, 1024), np.uint8)
        graph.launch()
        stream.synchronize()
        np.testing.assert_array_equal(back.array, pixels.array)

    def broken() -> None:
        stream.synchronize()

    with pytest.raises(cuda.CudaError):
        stream.capture(broken)
    enqueue()
    stream.synchronize()
    with pytest.raises(cuda.CudaMemoryError, match="out of memory"):
        cuda.DeviceMemory(1 << 50)
    for resource in (graph, stream, device, back, pixels):
        resource.close()


def test_an_engine_gives_the_networks_masks(built: tuple[Path, PlanInfo]) -> None:
    engine, info = built
    assert info.layers_from == "inspector"
    samples = load_samples(REFERENCE)
    result = gate_engine(MODEL, engine, samples, GENERATED)
    assert result.failures() == []
    noted = read_plan_info(engine).parity
    assert noted is not None
    assert noted["failures"] == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_passes_the_gate(
    trt: TensorRT, tmp_path: Path, precision: Precision
) -> None:
    samples = load_samples(REFERENCE)
    ranges = measure_ranges(MODEL, samples) if precision == "int8" else None
    engine = tmp_path / "x.engine"
    options = BuildOptions(precision=precision, buckets=(8,))
    build(MODEL, engine, options, ranges=ranges, trt=trt)
    assert gate_engine(MODEL, engine, samples, GENERATED).failures() == []


def test_every_bucket_runs_as_a_graph_and_padding_changes_nothing(
    built: tuple[Path, PlanInfo],
) -> None:
    runner = EngineRunner(built[0])
    try:
        assert runner.graphs == 2 * 4
        (pixels,) = batches(load_samples(REFERENCE, limit=8))
        expected = onnx_runner(MODEL)(pixels)
        for n in range(1, 9):
            np.testing.assert_allclose(runner.infer(pixels[:n]), expected[:n], atol=0.05)
    finally:
        runner.close()


def test_threads_get_their_own_answers(built: tuple[Path, PlanInfo]) -> None:
    backend = TensorRtBackend(built[0])
    (pixels,) = batches(load_samples(REFERENCE, limit=8))
    alone = [backend.infer(pixels[i : i + 1])[0] for i in range(8)]
    wrong: list[int] = []

    def work(i: int) -> None:
        answers = [backend.infer(pixels[i : i + 1])[0] for _ in range(50)]
        wrong.extend(i for answer in answers if np.abs(answer - alone[i]).max() > 1e-3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    backend.close()
    assert wrong == []


def test_a_batch_is_faster_than_its_images_one_by_one(built: tuple[Path, PlanInfo]) -> None:
    runner = EngineRunner(built[0])
    pixels = np.zeros((8, 128, 128, 3), np.uint8)

    def seconds(size: int) -> float:
        started = time.perf_counter()
        for _ in range(50):
            for start in range(0, 8, size):
                runner.infer(pixels[start : start + size])
        return time.perf_counter() - started

    seconds(8)
    assert seconds(8) < seconds(1)
    runner.close()


def test_the_cache_builds_gates_and_serves(trt: TensorRT, tmp_path: Path) -> None:
    events: list[EngineEvent] = []
    cache = open_engine_cache(tmp_path, MODEL, "fp16", events.append)
    backend: Backend | None = cache.obtain(threading.Event())
    assert backend is not None, events
    assert backend.describe().name == "tensorrt"
    assert "serving" in events
    backend.close()


def test_onnx_runtime_serves_on_the_gpu() -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider: install onnxruntime-gpu")
    try:
        backend = OnnxRuntimeCudaBackend(MODEL)
    except BackendError as error:
        pytest.skip(str(error))
    backend.warm_up()
    (pixels,) = batches(load_samples(REFERENCE, limit=8))
    expected = onnx_runner(MODEL)(pixels)
    for n in (1, 3, 8):
        np.testing.assert_allclose(backend.infer(pixels[:n]), expected[:n], atol=1e-3)
    backend.close()
