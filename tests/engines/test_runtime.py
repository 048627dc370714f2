"""Running an engine: slots, buckets, graphs and memory, on a CUDA that is simulated on the host.

What needs a GPU is in test_gpu.py.
"""

import dataclasses
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engines import cuda as cuda_module
from engines import runtime as runtime_module
from engines.device import Gpu, NoGpuError, current_gpu
from engines.plan import PlanError
from engines.runtime import SLOTS, EngineError, EngineRunner
from engines.tensorrt_api import TensorRT
from server.backends import BackendError
from server.backends.tensorrt import TensorRtBackend
from tests.support import surface
from tests.support.devices import has_gpu
from tests.support.fake_builder import CONTENT, KEY, plan_info
from tests.support.fake_cuda import SIDE, FakeContext, FakeCuda, FakeEngine, Status

GPU = Gpu("NVIDIA H100 80GB HBM3", "9.0", 80 << 30, 132)


class Machine:
    """A GPU with TensorRT, and an engine file for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.engine = folder / "x.engine"
        self.engine.write_bytes(CONTENT)
        plan_info().write(self.engine)
        self.monkeypatch = monkeypatch
        self.accepts = True
        self.surface = "tensorrt-11.4"
        self.version = "11.4.0"
        self.gpu = GPU
        self.plug_in(FakeCuda())
        monkeypatch.setattr(runtime_module, "current_gpu", lambda: self.gpu)
        monkeypatch.setattr(runtime_module, "find_tensorrt", lambda: self.tensorrt())

    def be_rtx(self) -> None:
        """A card with TensorRT for RTX, and a portable engine."""
        self.surface = "tensorrt-rtx-1.7"
        self.version = "1.7.1.116"
        self.gpu = Gpu("NVIDIA GeForce RTX 4090", "8.9", 24 << 30, 128)
        key = dataclasses.replace(
            KEY, library=f"tensorrt_rtx {self.version}", compute_capability="any"
        )
        plan_info(key).write(self.engine)

    def be_lean(self, *, version_compatible: bool = True) -> None:
        """TensorRT's lean runtime, and an engine that was built elsewhere."""
        self.surface = "tensorrt-lean-11.4"
        dataclasses.replace(plan_info(), version_compatible=version_compatible).write(self.engine)

    def plug_in(self, cuda: FakeCuda, scratch: int = 4096) -> None:
        self.cuda = cuda
        self.loaded = FakeEngine(cuda, KEY.buckets, scratch)
        self.monkeypatch.setattr(cuda_module, "runtime", cuda)

    def tensorrt(self) -> TensorRT:
        def deserialize(data: bytes) -> FakeEngine | None:
            assert data == CONTENT
            return self.loaded if self.accepts else None

        module = surface.module(self.surface)
        module.__version__ = self.version
        module.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=deserialize)
        return TensorRT(module)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
    return Machine(monkeypatch, tmp_path)


def _images(n: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, 3), np.uint8)


def _expected(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.divide(batch[..., 0], 255, dtype=np.float32)


def test_any_batch_is_answered_image_by_image(machine: Machine) -> None:
    runner = EngineRunner(machine.engine)
    for n in (1, 2, 3, 4, 5, 8, 11):
        batch = _images(n, seed=n)
        for given in (batch, list(batch)):  # in one array, or each in its own
            found = runner.infer(given)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, _expected(batch))


def test_results_are_the_callers_own(machine: Machine) -> None:
    runner = EngineRunner(machine.engine)
    first_batch = _images(2, seed=1)
    first = runner.infer(first_batch)
    for seed in range(2, 6):
        runner.infer(_images(2, seed=seed))
    np.testing.assert_array_equal(first, _expected(first_batch))


def test_every_bucket_of_every_slot_runs_as_a_graph_after_one_run(machine: Machine) -> None:
    runner = EngineRunner(machine.engine)
    contexts = machine.loaded.contexts
    assert len(contexts) == SLOTS * len(KEY.buckets)
    assert runner.graphs == len(contexts)
    # Twice for real, once recorded; every run after that is a launch, the first to prove it.
    assert [context.runs for context in contexts] == [3] * len(contexts)
    launches = sum(stream.launches for stream in machine.cuda.streams.values())
    assert launches == len(contexts)
    for n in (1, 2, 3, 4):
        runner.infer(_images(n))
    assert [context.runs for context in contexts] == [3] * len(contexts)
    assert sum(stream.launches for stream in machine.cuda.streams.values()) == launches + 4


def test_a_graph_whose_answer_is_another_than_the_networks_is_not_used(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FakeContext, "spoils_graphs", True)
    runner = EngineRunner(machine.engine)
    assert runner.graphs == 0
    assert "no CUDA graph for batches of 2: its answers are not the engine's" in caplog.text
    batch = _images(3)
    np.testing.assert_array_equal(runner.infer(batch), _expected(batch))
    runner.close()
    assert machine.cuda.held() == 0


@pytest.mark.parametrize("capturable", [True, False])
def test_rtx_is_asked_whether_its_work_may_be_recorded(
    machine: Machine, caplog: pytest.LogCaptureFixture, capturable: bool
) -> None:
    machine.be_rtx()
    machine.loaded.user_allocation = capturable
    runner = EngineRunner(machine.engine)
    assert runner.graphs == (SLOTS * len(KEY.buckets) if capturable else 0)
    why = "TensorRT for RTX says that it cannot be recorded"
    assert (why in caplog.text) is not capturable
    batch = _images(3)
    np.testing.assert_array_equal(runner.infer(batch), _expected(batch))


def test_two_batches_are_in_flight_on_streams_and_memory_of_their_own(machine: Machine) -> None:
    runner = EngineRunner(machine.engine)
    inside = threading.Barrier(SLOTS, timeout=600)
    launch = machine.cuda.cudaGraphLaunch

    def launch_together(executable: Any, stream: Any) -> Any:
        inside.wait()
        return launch(executable, stream)

    machine.cuda.cudaGraphLaunch = launch_together  # type: ignore[method-assign]
    batches = [_images(3, seed) for seed in range(6)]
    found: dict[int, NDArray[np.float32]] = {}

    def work(i: int) -> None:
        found[i] = runner.infer(batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for i, batch in enumerate(batches):
        np.testing.assert_array_equal(found[i], _expected(batch))
    launches = [stream.launches - len(KEY.buckets) for stream in machine.cuda.streams.values()]
    assert launches == [3, 3]


def test_the_buckets_of_a_slot_share_its_scratch_memory(machine: Machine) -> None:
    scratch = 1 << 20
    machine.plug_in(FakeCuda(), scratch)
    EngineRunner(machine.engine)
    assert SLOTS * scratch < machine.cuda.used() < (SLOTS + 1) * scratch


def test_where_nothing_can_be_captured_it_runs_without_graphs(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.plug_in(FakeCuda(captures=False))
    caplog.set_level(logging.WARNING, "slsnet.tensorrt")
    runner = EngineRunner(machine.engine)
    assert runner.graphs == 0
    assert "no CUDA graph for batches of 1: cudaStreamBeginCapture" in caplog.text
    batch = _images(3)
    np.testing.assert_array_equal(runner.infer(batch), _expected(batch))


def test_closing_gives_everything_back(machine: Machine) -> None:
    runner = EngineRunner(machine.engine)
    assert machine.cuda.held() > 0
    runner.close()
    assert machine.cuda.held() == 0


@pytest.mark.parametrize("capacity", [100, 10_000, 30_000, 50_000])
def test_too_little_memory_is_said_and_nothing_is_kept(machine: Machine, capacity: int) -> None:
    machine.plug_in(FakeCuda(capacity), scratch=25_000)
    with pytest.raises(EngineError, match=r"out of GPU memory: 2 contexts need 0\.00 GB"):
        EngineRunner(machine.engine)
    assert machine.cuda.held() == 0


def test_too_little_memory_is_counted_before_anything_was_taken_or_freed(machine: Machine) -> None:
    machine.plug_in(FakeCuda(3_000_000_000), scratch=40_000_000)
    machine.cuda.allocate(2_950_000_000)
    with pytest.raises(EngineError, match=r"need 0\.08 GB .*, 0\.05 GB were free"):
        EngineRunner(machine.engine)


@pytest.mark.parametrize("spin", [False, True])
def test_threads_wait_for_the_gpu_as_told(machine: Machine, spin: bool) -> None:
    TensorRtBackend(machine.engine, spin=spin).close()
    spinning, asleep = FakeCuda.cudaDeviceScheduleSpin, FakeCuda.cudaDeviceScheduleBlockingSync
    assert machine.cuda.flags == (spinning if spin else asleep)


def test_lasting_cuda_error_fails_all_batches_and_close_returns(machine: Machine) -> None:
    runner = EngineRunner(machine.engine)
    machine.cuda.sticky = Status.cudaErrorIllegalAddress
    for _ in range(SLOTS + 1):
        with pytest.raises(EngineError, match="cudaErrorIllegalAddress"):
            runner.infer(_images(2))
    with pytest.raises(BackendError, match="cudaErrorIllegalAddress"):
        TensorRtBackend(machine.engine)
    runner.close()


def test_a_failed_inference_is_an_error_and_the_slot_goes_on(machine: Machine) -> None:
    runner = EngineRunner(machine.engine)
    launch = machine.cuda.cudaGraphLaunch

    def cudaGraphLaunch(*_: Any) -> tuple[Status]:  # noqa: N802
        return (Status.cudaErrorInvalidValue,)

    machine.cuda.cudaGraphLaunch = cudaGraphLaunch  # type: ignore[method-assign, assignment]
    for _ in range(SLOTS + 1):
        with pytest.raises(EngineError, match="a batch of 2 failed: cudaGraphLaunch"):
            runner.infer(_images(2))
    machine.cuda.cudaGraphLaunch = launch  # type: ignore[method-assign]
    np.testing.assert_array_equal(runner.infer(_images(2)), _expected(_images(2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("truncated", "truncated: 50000 of 100000 bytes"),
        ("corrupt", "is corrupt"),
        ("missing", "cannot be read: No such file"),
        ("no sidecar", "is missing: build the engine"),
        ("other version", "was built by tensorrt 11.4.0, this is tensorrt 10.16.1"),
        ("other gpu", "built for compute capability 9.0, NVIDIA L4 has 8.9"),
        ("other model", "built for NVIDIA H100 .* this is NVIDIA H200, 132 multiprocessors"),
        ("slice", "this is NVIDIA H100 80GB HBM3 MIG 1g.10gb, 16 multiprocessors: build it here"),
        ("refused", "cannot load"),
    ],
)
def test_an_engine_that_does_not_fit_says_why(machine: Machine, change: str, message: str) -> None:
    if change == "truncated":
        machine.engine.write_bytes(CONTENT[:50_000])
    elif change == "corrupt":
        machine.engine.write_bytes(CONTENT[::-1])
    elif change == "missing":
        machine.engine.unlink()
    elif change == "no sidecar":
        machine.engine.with_name("x.engine.json").unlink()
    elif change == "other version":
        machine.version = "10.16.1"
    elif change == "other gpu":
        machine.gpu = Gpu("NVIDIA L4", "8.9", 24 << 30, 58)
    elif change == "other model":
        machine.gpu = Gpu("NVIDIA H200", "9.0", 141 << 30, 132)
    elif change == "slice":
        machine.gpu = Gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "9.0", 10 << 30, 16)
    else:
        machine.accepts = False
    with pytest.raises(PlanError, match=message):
        EngineRunner(machine.engine)
    with pytest.raises(BackendError, match=message):
        TensorRtBackend(machine.engine)
    assert machine.cuda.held() == 0


@pytest.mark.parametrize(
    ("version_compatible", "version", "fits"),
    [
        (False, "11.5.0", False),
        (True, "11.5.0", True),
        (True, "11.3.9", False),
        (True, "12.0", False),
    ],
)
def test_a_version_compatible_engine_runs_under_later_minor_versions(
    machine: Machine, version_compatible: bool, version: str, fits: bool
) -> None:
    info = dataclasses.replace(plan_info(), version_compatible=version_compatible)
    machine.version = version
    if fits:
        runtime_module.check_fits(info, machine.tensorrt(), GPU)
    else:
        with pytest.raises(PlanError, match="build it again"):
            runtime_module.check_fits(info, machine.tensorrt(), GPU)


@pytest.mark.parametrize("version", ["11.4.0", "11.6.0"])
def test_the_lean_runtime_runs_version_compatible_engines(machine: Machine, version: str) -> None:
    machine.be_lean()
    machine.version = version
    backend = TensorRtBackend(machine.engine)
    assert backend.describe().version == f"tensorrt_lean {version}"
    batch = _images(3)
    np.testing.assert_array_equal(backend.infer(batch), _expected(batch))
    backend.close()


@pytest.mark.parametrize(
    ("version_compatible", "version"), [(False, "11.4.0"), (True, "11.3.9"), (True, "12.0")]
)
def test_the_lean_runtime_says_what_it_does_not_run(
    machine: Machine, version_compatible: bool, version: str
) -> None:
    machine.be_lean(version_compatible=version_compatible)
    machine.version = version
    message = rf"by tensorrt 11.4.0, this is tensorrt_lean {version}: build it with --version-comp"
    with pytest.raises(PlanError, match=message):
        EngineRunner(machine.engine)


@pytest.mark.parametrize(("built_for", "fits"), [("8.0+", True), ("9.0", True), ("8.9", False)])
def test_portable_engines_run_on_other_gpus(machine: Machine, built_for: str, fits: bool) -> None:
    info = plan_info(dataclasses.replace(KEY, compute_capability=built_for, device="any"))
    if fits:
        runtime_module.check_fits(info, machine.tensorrt(), GPU)
    else:
        with pytest.raises(PlanError, match="build it here"):
            runtime_module.check_fits(info, machine.tensorrt(), GPU)


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        (Gpu("NVIDIA RTX A4000", "8.6", 16 << 30, 48), ""),
        (Gpu("NVIDIA GeForce RTX 5090", "12.0", 32 << 30, 170), ""),
        (Gpu("NVIDIA A30", "8.0", 24 << 30, 56), "build it with --compute-capability 8.0"),
        (Gpu("NVIDIA T4", "7.5", 16 << 30, 40), "build it with --compute-capability 7.5"),
        (GPU, "does not run on NVIDIA H100 .*only on 7.5, 8.0, 8.6, 8.9, 12.0, 12.1: install"),
    ],
)
def test_rtx_runs_on_the_cards_that_it_lists(machine: Machine, gpu: Gpu, message: str) -> None:
    machine.be_rtx()
    machine.gpu = gpu
    if not message:
        EngineRunner(machine.engine).close()
    else:
        with pytest.raises(BackendError, match=message):
            TensorRtBackend(machine.engine)
        assert not machine.loaded.contexts, "refused before anything is loaded"


def test_no_gpu_is_said_in_one_sentence(machine: Machine) -> None:
    def nothing() -> Gpu:
        raise NoGpuError("no NVIDIA GPU is visible to this process")

    machine.monkeypatch.setattr(runtime_module, "current_gpu", nothing)
    with pytest.raises(BackendError, match="no NVIDIA GPU is visible to this process"):
        TensorRtBackend(machine.engine)


def test_the_backend_describes_the_engine(machine: Machine) -> None:
    info = TensorRtBackend(machine.engine).describe()
    assert (info.name, info.device, info.precision) == ("tensorrt", GPU.name, "fp16")
    assert (info.max_batch, info.slots, info.buckets) == (4, 2, (1, 2, 4))
    assert info.model == {"name": "slsnet"}


def test_the_simulation_has_only_what_cuda_python_has() -> None:
    """A function that the real module does not have would be found on a GPU only."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    names = [name for name in vars(FakeCuda) if name.startswith("cuda")]
    assert len(names) > 20
    assert [name for name in names if not hasattr(runtime, name)] == []
    assert [name for name in Status.__members__ if not hasattr(runtime.cudaError_t, name)] == []


def test_cuda_without_a_driver_is_a_clean_error() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
    if has_gpu():
        pytest.skip("there is a GPU")
    with pytest.raises(NoGpuError, match=r"^no NVIDIA [^\n]*$"):
        current_gpu()
