"""The GPU's requirements are the CPU's, with another ONNX Runtime and TensorRT beside it."""

import re

import pytest

from tests.support import ROOT


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    pins = {}
    for line in lines:
        if line[:1] not in ("", "#", "-"):
            name, _, version = re.split("[;#]", line)[0].strip().partition("==")
            pins[name] = version
    return pins


def test_gpu_requirements_follow_the_cpus() -> None:
    cpu, gpu = _pins("requirements.txt"), _pins("requirements-gpu.txt")
    assert gpu.keys() - cpu.keys() == {
        "cuda-python",
        "onnx",
        "onnxruntime-gpu[cuda,cudnn]",
        "tensorrt-cu13",
    }
    assert {name: gpu.get(name) for name in cpu if name != "onnxruntime"} == {
        name: pin for name, pin in cpu.items() if name != "onnxruntime"
    }
    assert "onnxruntime" not in gpu


@pytest.mark.parametrize("package", ["cuda-python", "onnx"])
def test_gpu_pins_are_the_tested_ones(package: str) -> None:
    tested = _pins("requirements-dev.txt") | _pins("requirements-train.txt")
    assert _pins("requirements-gpu.txt")[package] == tested[package]


def test_the_decoder_that_is_tested_is_the_one_that_serves() -> None:
    decode, tested = _pins("requirements-decode.txt"), _pins("requirements-dev.txt")
    assert decode["nvidia-nvimgcodec-cu13"] == tested["nvidia-nvimgcodec-cu13"]


def test_a_lean_runtime_is_of_the_version_that_builds() -> None:
    gpu, lean = _pins("requirements-gpu.txt"), _pins("requirements-lean.txt")
    version = gpu["tensorrt-cu13"]
    assert lean == {
        "cuda-bindings": gpu["cuda-python"],
        "tensorrt-lean-cu13-bindings": version,
        "tensorrt-lean-cu13-libs": version,
    }
