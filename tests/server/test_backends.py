"""The other ways to run the network: PyTorch, and ONNX Runtime where a GPU is or is not."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from common.stamp import unstamped
from server import backends
from server.backends import BackendError, open_backend
from tests.support import MODEL, ROOT
from tests.support.offline import Offline
from trt_build.samples import REFERENCE, batches, load_samples


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return next(batches(load_samples(REFERENCE, limit=3)))


def test_pytorch_gives_what_the_exported_graph_gives(pixels: NDArray[np.uint8]) -> None:
    torch = open_backend("torch", MODEL, threads=1)
    onnx = open_backend("onnxruntime", MODEL, threads=1)
    torch.warm_up()
    np.testing.assert_allclose(torch.infer(pixels), onnx.infer(pixels), atol=1e-4)
    info = torch.describe()
    assert (info.name, info.precision) == ("torch", "fp32")
    assert info.model["attention"] == onnx.describe().model["attention"] == "pooled"
    for backend in (torch, onnx):
        backend.close()


def test_images_that_come_together_on_a_cpu_get_a_thread_each(pixels: NDArray[np.uint8]) -> None:
    backend = open_backend("onnxruntime", MODEL, threads=3)
    info = backend.describe()
    assert (info.slots, info.max_batch) == (3, 1)
    alone = [backend.infer(image[None]) for image in pixels]
    with ThreadPoolExecutor(info.slots) as threads:
        together = list(threads.map(lambda n: backend.infer(pixels[n % 3][None]), range(24)))
    for n, probability in enumerate(together):
        np.testing.assert_array_equal(probability, alone[n % 3])
    np.testing.assert_array_equal(backend.infer(pixels), np.concatenate(alone))
    backend.close()


def test_weights_in_another_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest would not cover them. ONNX Runtime looks for them where the server was started."""
    network = onnx.load_model_from_string(unstamped(MODEL.read_bytes()))
    onnx.save(network, tmp_path / "n.onnx", save_as_external_data=True, location="weights.bin")
    assert (tmp_path / "weights.bin").exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendError, match=r"cannot load .*n\.onnx: .*weights\.bin"):
        open_backend("onnxruntime", tmp_path / "n.onnx", threads=1)


def test_weights_that_are_not_there_are_said(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"PyTorch cannot load .*nothing\.safetensors"):
        open_backend("torch", tmp_path / "nothing.onnx", threads=1)


def test_a_backend_that_does_not_exist_is_said() -> None:
    with pytest.raises(BackendError, match="There is no backend called 'tensorflow'"):
        open_backend("tensorflow", MODEL, threads=1)


def test_a_cuda_provider_that_does_not_load_leaves_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, offline: Offline
) -> None:
    """As with onnxruntime-gpu on a machine without a driver, or without CUDA's libraries."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(backends.log, "disabled", False)
    backend = open_backend("auto", MODEL, threads=1)
    assert backend.describe().device == "cpu"
    assert "serving on the CPU: " in caplog.text
    backend.close()


def test_choosing_a_backend_loads_no_other() -> None:
    """Serving starts without torch, without onnx, and without touching CUDA where it need not."""
    script = (
        "import sys; from pathlib import Path; from server.backends import open_backend;"
        "import server.inference.loading;"
        f"open_backend('auto', Path({str(MODEL)!r}), threads=1).warm_up();"
        "others = {'torch', 'onnx', 'openvino', 'tensorrt_rtx_bindings', 'ml_dtypes'};"
        "print(*others & sys.modules.keys())"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""


def test_telemetry_is_off_before_the_library_is_loaded(tmp_path: Path) -> None:
    """It keeps a device id in the home folder otherwise."""
    code = f"""
import os, pathlib
from server.backends import open_backend
backend = open_backend("onnxruntime", pathlib.Path({str(MODEL)!r}), threads=1)
print(os.environ["ORT_DISABLE_TELEMETRY"], sorted(p.name for p in pathlib.Path.home().iterdir()))
"""
    home = {"HOME": str(tmp_path), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=home, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1 []", done.stdout
    assert done.stderr == ""
