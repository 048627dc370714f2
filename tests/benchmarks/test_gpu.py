"""The GPU's benchmark, without one: what it writes when, and which peak it holds a card against."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import gpu
from common.onnx import onnx_runner
from engines.device import Gpu
from server.backends import BackendInfo, Images
from tests.support import MODEL
from trt_build.samples import REFERENCE, load_samples


class Candidate:
    """The network on the CPU, which is cut off at its `cut`th batch of two."""

    def __init__(self, cut: int = 1 << 30) -> None:
        self._infer = onnx_runner(MODEL)
        self._known: dict[bytes, NDArray[np.float32]] = {}
        self._left = cut

    def describe(self) -> BackendInfo:
        return BackendInfo("torch", "2", "a GPU", "fp16", 2, model={"attention": "pooled"})

    def warm_up(self) -> None: ...

    def infer(self, batch: Images) -> NDArray[np.float32]:
        batch = np.asarray(batch)
        self._left -= len(batch) == 2
        if self._left < 0:
            raise KeyboardInterrupt
        key = batch.tobytes()
        if key not in self._known:
            self._known[key] = self._infer(batch)
        return self._known[key]

    def close(self) -> None: ...


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Gpu("NVIDIA A100-SXM4-80GB", "8.0", 80 << 30, 108)
    monkeypatch.setattr(gpu, "current_gpu", lambda: found)
    monkeypatch.setattr(gpu, "load_samples", lambda _: load_samples(REFERENCE, limit=1))


def test_failing_engine_leaves_figures_of_the_others(
    card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Candidate:
        raise ValueError("opset 12: export with 20 to 23")

    found = [(gpu.Result("broken", "fp16"), broken), (gpu.Result("whole", "fp16"), Candidate)]
    monkeypatch.setattr(gpu, "candidates", lambda *_: iter(found))
    arguments = ["--buckets", "1", "--seconds", "0", "--output", str(tmp_path / "out")]
    assert gpu.main(arguments) == 0
    text = (tmp_path / "out.md").read_text()
    assert "- broken fp16 skipped: opset 12: export with 20 to 23" in text
    assert "| whole | fp16 |" in text
    assert text.strip() == capsys.readouterr().out.strip()


def test_interrupted_measurement_keeps_its_figures(
    card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(gpu.Result("cut", "fp16"), lambda: Candidate(cut=5))]
    monkeypatch.setattr(gpu, "candidates", lambda *_: iter(found))
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--buckets", "1,2", "--seconds", "0", "--output", str(tmp_path / "out")])
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    (figure,) = result["figures"]
    assert figure["batch"] == 1
    assert figure["roofline_share"] > 0, "the peak of an A100 is known"
    assert "| cut | fp16 |" in (tmp_path / "out.md").read_text()


@pytest.mark.parametrize(
    ("name", "fp16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_card_is_held_against_its_own_peak(name: str, fp16: float | None) -> None:
    assert gpu.peak_tflops(Gpu(name, "8.0", 1, 1)).get("fp16") == fp16
