"""Real engines from the shipped ONNX file, built by TensorRT for RTX, which needs no GPU for it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from engines.plan import PlanInfo, Precision, file_sha256, read_engine, read_plan_info
from engines.tensorrt_api import TensorRTError, find_tensorrt, plan_key
from tests.support import MODEL, ROOT
from tests.support.devices import has_gpu
from trt_build.__main__ import main
from trt_build.build import BuildError, BuildOptions, build
from trt_build.calibrate import CalibrationError, read_ranges
from trt_build.layers import disagreements, expected_types

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")

Build = Callable[..., PlanInfo]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def ranges() -> dict[str, float]:
    model = onnx.load(MODEL)
    return {node.input[0]: 4.0 for node in model.graph.node if node.op_type == "Conv"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "low", "scratch_gb"),
    [
        ("fp16", "fp16", 0.25),
        pytest.param("bf16", "bf16", 0.25, marks=pytest.mark.thorough),
        ("int8", "int8", 0.25),
        pytest.param("tf32", "fp32", 0.6, marks=pytest.mark.thorough),
        ("fp32", "fp32", 0.6),
    ],
)
def test_every_precision_builds_as_asked_and_says_so(
    engines: Path, ranges: dict[str, float], precision: Precision, low: str, scratch_gb: float
) -> None:
    output = engines / f"{precision}.engine"
    info = build(MODEL, output, BuildOptions(precision=precision, buckets=(1, 64)), ranges=ranges)

    assert info == read_plan_info(output)
    assert len(read_engine(output, info)) == info.engine_bytes
    assert info.key.onnx_sha256 == file_sha256(MODEL)
    assert info.key.library.startswith("tensorrt")
    assert info.key.precision == precision
    assert info.key.buckets == (1, 64)
    assert info.model["name"] == "slsnet"
    convolutions = [layer for layer in info.layers if layer.kind == "correlation"]
    # Some 1×1 convolutions become products of matrices, which are layers of another kind.
    assert len(convolutions) >= 2 * 85, "one for each convolution and bucket"
    nodes = {node for layer in info.layers for node in layer.nodes}
    assert nodes >= {node.name for node in onnx.load(MODEL).graph.node if node.op_type == "Conv"}
    share = sum(layer.reads[0] == low for layer in convolutions) / len(convolutions)
    assert share == 1 if precision != "int8" else share > 0.65
    # 8.9 GB where exact attention is materialised.
    assert max(info.scratch_bytes.values()) < scratch_gb * 1e9


def test_half_precision_keeps_the_attention_fused(engines: Path) -> None:
    info = read_plan_info(engines / "fp16.engine")
    fused = [layer for layer in info.layers if "mha" in layer.name]
    assert len(fused) == 6 * 2
    assert {layer.reads[0] for layer in fused} == {"fp16"}
    assert all(layer.nodes for layer in fused)


def test_the_parsers_verdict_on_each_attention_form(engines: Path, tmp_path: Path) -> None:
    fused = BuildOptions(precision="fp32", attention="fused", buckets=(8,))
    with pytest.raises(BuildError, match="not supported by a dedicated kernel"):
        build(MODEL, tmp_path / "fused.engine", fused)
    assert not list(tmp_path.iterdir()), "a failed build leaves nothing"

    plain = BuildOptions(precision="fp16", attention="plain", buckets=(8,))
    info = build(MODEL, tmp_path / "plain.engine", plain)
    assert info.attention == "plain"
    fused_bytes = read_plan_info(engines / "fp16.engine").scratch_bytes
    assert info.scratch_bytes[8] > fused_bytes[64] / 8, "more than the fused form's an image"


def test_a_workspace_that_is_too_small_is_said(tmp_path: Path) -> None:
    options = BuildOptions(attention="plain", buckets=(8,), workspace_bytes=8 << 20)
    with pytest.raises(BuildError, match=r"OutOfMemory.*allow more --workspace-mib"):
        build(MODEL, tmp_path / "x.engine", options)


def test_an_engine_of_another_precision_than_asked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TensorRT 11 does where fp16 is asked for by a flag: a float32 engine, silently."""
    from trt_build import build as module
    from trt_build import layers
    from trt_build.convert import convert

    monkeypatch.setattr(
        module, "convert", lambda model, _precision, **_: convert(model, "fp32", attention="plain")
    )
    expected = expected_types(convert(onnx.load(MODEL), "fp16", attention="plain"))
    monkeypatch.setattr(layers, "expected_types", lambda _: expected)
    with pytest.raises(BuildError, match=r"asked for fp16, but the engine differs: .* reads fp32"):
        build(MODEL, tmp_path / "x.engine", BuildOptions(precision="fp16", buckets=(2,)))
    assert not list(tmp_path.iterdir())


def test_an_engine_that_names_no_nodes_is_refused() -> None:
    asked = {"a": frozenset({"fp16"}), "b": frozenset({"fp16"})}
    (problem,) = disagreements(asked, [])
    assert "cannot be read back" in problem


def test_the_command_builds_with_progress(tmp_path: Path) -> None:
    output = tmp_path / "cli.engine"
    command = [
        *(sys.executable, "-m", "trt_build", "--onnx", MODEL, "--output", output),
        *("--precision", "fp16", "--buckets", "1,4"),
        *("--hardware-compatible", "--workspace-mib", "512"),
    ]
    result = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "building" in result.stdout
    assert "step 1 of" in result.stdout
    assert "scratch memory" in result.stdout
    sidecar = json.loads((tmp_path / "cli.engine.json").read_text())
    assert sidecar["key"]["buckets"] == [1, 4]
    assert sidecar["hardware_compatible"] is True
    assert sidecar["precisions"]["fp16"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--onnx", "nowhere.onnx"], "nowhere.onnx: No such file or directory"),
        (["--compute-capability", "9.9"], "has no SM99; it has SM120"),
        (["--precision", "int8", "--calibration", "nowhere.json"], "nowhere.json is missing"),
        (["--version-compatible"], "TensorRT for RTX has no version-compatible engines"),
        (["--parity", "--buckets", "1"], "no NVIDIA driver"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if message == "no NVIDIA driver" and has_gpu():
        pytest.skip("there is a GPU")
    output = tmp_path / "x.engine"
    code = main(["--onnx", str(MODEL), "--output", str(output), *arguments])
    assert code == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not output.exists(), "nothing is built for minutes before it is told"


def test_an_engine_for_another_gpu_has_a_key_of_its_own(tmp_path: Path) -> None:
    trt = find_tensorrt()
    if not trt.is_rtx:
        pytest.skip("only TensorRT for RTX builds for another GPU")
    options = BuildOptions(buckets=(2,), compute_capability="8.9")
    info = build(MODEL, tmp_path / "ada.engine", options)
    assert info.key.compute_capability == "8.9"
    assert info.key.digest() != plan_key(info.key.onnx_sha256, "fp16", (2,), trt).digest()


def test_a_file_that_is_no_network_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"not an ONNX file")
    code = main(["--onnx", str(bad), "--output", str(tmp_path / "x.engine")])
    assert code == 1


def test_ranges_belong_to_one_onnx_file(tmp_path: Path) -> None:
    other = tmp_path / "other.calibration.json"
    other.write_text(json.dumps({"onnx_sha256": "0" * 64, "ranges": {"x": 1.0}}))
    with pytest.raises(CalibrationError, match="belongs to another ONNX file"):
        read_ranges(MODEL, other)
    other.write_text("{")
    with pytest.raises(CalibrationError, match="holds no ranges"):
        read_ranges(MODEL, other)


def test_buckets_that_make_no_sense_are_refused() -> None:
    for buckets in [(), (0, 1), (4, 2), (1, 1)]:
        with pytest.raises(ValueError, match="must be positive and ascend"):
            BuildOptions(buckets=buckets)


def test_tensorrt_alone_cannot_build_for_another_gpu() -> None:
    from types import SimpleNamespace

    trt = find_tensorrt()
    with pytest.raises(TensorRTError, match="only TensorRT for RTX"):
        trt.target(SimpleNamespace(), "8.9")
