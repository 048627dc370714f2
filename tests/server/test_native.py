"""The native backend against float32, against itself in other company, and where it cannot run."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from model.image import read_photo
from server import backends
from server.backends import BackendError, native, open_backend
from server.backends.native import NativeBackend, missing_here, trial_image
from server.backends.native.weights import WeightsError, network_weights, read_constants
from tests.conftest import MODEL, ROOT, Sample
from trt_build.parity import compare, onnx_runner
from trt_build.samples import REFERENCE, load_samples

runs_here = pytest.mark.skipif(bool(missing_here()), reason=missing_here())


@pytest.fixture(scope="module")
def backend() -> Iterator[NativeBackend]:
    backend = NativeBackend(MODEL, threads=2)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def pixels(photos: list[Sample]) -> NDArray[np.uint8]:
    return np.stack([read_photo(photo.data).pixels for photo in photos])


@runs_here
def test_masks_are_those_of_float32(backend: NativeBackend, data_dir: Path | None) -> None:
    folder = REFERENCE if data_dir is None else data_dir / "native"
    parity = compare(
        onnx_runner(MODEL),
        backend.infer,
        load_samples(folder, limit=24),
        name="native",
        precision="bf16",
        source=folder.name,
    )
    assert parity.failures() == []
    assert parity.mask_iou_min > 0.98
    assert parity.max_difference < 0.02


@runs_here
def test_an_answer_is_the_same_bits_in_any_company_and_on_any_number_of_threads(
    backend: NativeBackend, pixels: NDArray[np.uint8]
) -> None:
    alone = np.concatenate([backend.infer(one[None]) for one in pixels])
    assert len({answer.tobytes() for answer in alone}) == len(pixels)
    for threads in (1, 2, 3, 7):
        other = NativeBackend(MODEL, threads=threads)
        for size in (1, 2, 3, 5, 8, len(pixels)):
            np.testing.assert_array_equal(other.infer(pixels[:size]), alone[:size])
            np.testing.assert_array_equal(other.infer(pixels[size::-1]), alone[size::-1])
        other.close()


@runs_here
def test_what_it_says_of_itself(backend: NativeBackend) -> None:
    info = backend.describe()
    assert (info.name, info.device, info.precision) == ("native", "cpu", "bf16")
    assert info.model["name"] == "slsnet"
    with pytest.raises(BackendError, match="is no batch of images"):
        backend.infer(np.zeros((1, 128, 128, 4), np.uint8))


@runs_here
def test_opening_and_closing_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeBackend, "_compare", lambda *_: {})
    process = psutil.Process()

    def use() -> None:
        backend = NativeBackend(MODEL, threads=3)
        backend.warm_up()
        backend.close()

    use()
    memory, threads = process.memory_info().rss, process.num_threads()
    for _ in range(10):
        use()
    assert process.num_threads() == threads
    # One engine that is kept would be 50 MiB.
    assert process.memory_info().rss - memory < 100 * 2**20


@runs_here
def test_steep_attention_is_computed_by_the_way_that_cannot_underflow(tmp_path: Path) -> None:
    """Scores far beyond what float32's exponential takes, as other weights may give."""
    steep = onnx.load(MODEL)
    for constant in steep.graph.initializer:
        if constant.name in {
            f"generator.{pam}.key.0.{part}"
            for pam in ("down1.pam", "decoder2.0.pam")
            for part in ("weight", "bias")
        }:
            constant.CopyFrom(
                numpy_helper.from_array(40 * numpy_helper.to_array(constant), constant.name)
            )
        if constant.name.endswith((".down1.pam.eta", "decoder2.0.pam.eta")):
            constant.CopyFrom(
                numpy_helper.from_array(8 * numpy_helper.to_array(constant), constant.name)
            )
    path = tmp_path / "steep.onnx"
    onnx.save(steep, path)
    backend = NativeBackend(path, threads=2)
    image = trial_image()[None]
    np.testing.assert_allclose(backend.infer(image), onnx_runner(path)(image), atol=0.03)
    backend.close()


@runs_here
def test_another_computation_on_the_same_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as channel attention in the paper's form: the names and shapes are all the same."""
    model = onnx.load(MODEL)
    for node in model.graph.node:
        if node.op_type == "Sub" and node.input[0].startswith("amax"):
            node.input[0], node.input[1] = node.input[1], node.input[0]
    path = tmp_path / "eq1.onnx"
    onnx.save(model, path)
    with pytest.raises(BackendError, match=r"eq1\.onnx: on the trial image its answer differs"):
        NativeBackend(path, threads=2)
    monkeypatch.setattr(backends.log, "disabled", False)
    with caplog.at_level("INFO", logger=backends.log.name):
        backend = open_backend("auto", path, threads=2)
    assert backend.describe().name == "onnxruntime"
    assert "ONNX Runtime serves: The native backend does not serve" in caplog.text
    backend.close()


def test_a_processor_that_lacks_something_is_told_and_gets_onnx_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f avx512vl\n")
    if sys.platform == "linux":
        assert "avx512_bf16, avx512bw, avx512cd, avx512dq" in missing_here(cpuinfo)
        assert "cannot be read" in missing_here(tmp_path / "nothing")
    monkeypatch.setattr(native, "missing_here", lambda: "the processor has no avx512_bf16")
    with pytest.raises(BackendError, match="cannot run here: the processor has no avx512_bf16"):
        open_backend("native", MODEL, threads=1)
    backend = open_backend("auto", MODEL, threads=1)
    assert backend.describe().name == "onnxruntime"
    backend.close()


@runs_here
def test_a_library_that_does_not_load_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "slsnet.so"
    damaged.write_bytes(b"\x7fELF")
    monkeypatch.setattr(native, "LIBRARY", damaged)
    with pytest.raises(BackendError, match="library cannot be loaded"):
        NativeBackend(MODEL, threads=1)


def test_weights_are_read_as_the_onnx_package_reads_them() -> None:
    constants = read_constants(MODEL)
    expected = {
        constant.name: numpy_helper.to_array(constant)
        for constant in onnx.load(MODEL).graph.initializer
        if constant.data_type == onnx.TensorProto.FLOAT
    }
    assert constants.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(constants[name], values, name)


def test_files_that_are_not_this_network_are_told(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No such file"):
        read_constants(tmp_path / "nothing.onnx")
    whole = MODEL.read_bytes()
    path = tmp_path / "damaged.onnx"
    for content in (b"not a network", whole[: len(whole) // 2], b"\x3a\xff\xff\xff\xff\xff"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"damaged\.onnx is not an ONNX file"):
            read_constants(path)
    constants = read_constants(MODEL)
    constants["generator.head.bias"] = np.zeros(2, np.float32)
    with pytest.raises(WeightsError, match=r"not the shipped network: head\.bias is \[2\]"):
        network_weights(constants)
    del constants["generator.head.bias"]
    with pytest.raises(WeightsError, match=r"head\.bias is none, not \[1\]"):
        network_weights(constants)


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed")
def test_the_library_in_the_tree_is_what_its_source_gives() -> None:
    command = [sys.executable, "-m", "server.backends.native.build", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
