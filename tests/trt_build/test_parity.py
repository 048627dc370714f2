"""The gate, the calibration before it, and the photos of both."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from common.onnx import onnx_runner
from engines.device import NoGpuError
from tests.support import MODEL
from tests.support.lesions import encode_photo, lesion_photo, write_pairs
from trt_build.calibrate import calibration_path, read_ranges
from trt_build.calibrate import main as calibrate
from trt_build.parity import GATES, Parity, compare, mask_iou, table
from trt_build.parity import main as parity
from trt_build.samples import REFERENCE, Sample, load_samples

Probability = NDArray[np.float32]


def _disc(radius: float, centre: float = 64) -> Probability:
    y, x = np.mgrid[:128, :128]
    distance = np.hypot(x - centre, y - 64)
    return np.asarray(1 / (1 + np.exp(distance - radius)), np.float32)


def _sample(name: str, truth: Probability | None = None) -> Sample:
    pixels = np.zeros((128, 128, 3), np.uint8)
    return Sample(name, pixels, 128, 128, None if truth is None else truth > 0.5)


def _compare(expected: Probability, found: Probability, truth: Probability | None) -> Parity:
    return compare(
        lambda batch: np.stack([expected] * len(batch)),
        lambda batch: np.stack([found] * len(batch)),
        [_sample("a", truth), _sample("b", truth)],
        name="candidate",
        precision="fp16",
        source="discs",
    )


def test_the_same_masks_pass() -> None:
    result = _compare(_disc(30), _disc(30), _disc(32))
    assert result.mask_iou_mean == result.mask_iou_min == 1
    assert result.max_difference == 0
    assert result.jaccard_reference == pytest.approx((30 / 32) ** 2, abs=0.02)
    assert result.failures() == []


@pytest.mark.parametrize(
    ("found", "truth", "failure"),
    [
        (_disc(29.8), None, "mean mask IoU"),
        (_disc(30, centre=65), None, "mean mask IoU"),
        (np.zeros((128, 128), np.float32), None, "mean mask IoU 0.0000 < 0.995"),
        (np.full((128, 128), np.nan, np.float32), None, "not finite"),
        (_disc(33), _disc(30), "Jaccard changes by -"),
        (_disc(30), None, None),
    ],
)
def test_masks_that_differ_fail(
    found: Probability, truth: Probability | None, failure: str | None
) -> None:
    failures = _compare(_disc(30), found, truth).failures()
    assert (failure is None) == (failures == [])
    if failure is not None:
        assert any(failure in text for text in failures)


def test_int8_may_differ_more_but_not_much_more() -> None:
    assert GATES["int8"].mask_iou < GATES["fp16"].mask_iou
    assert GATES["int8"].jaccard == 0.005
    assert {GATES[p].jaccard for p in ("fp16", "bf16")} == {0.002}


def test_empty_masks_agree() -> None:
    empty = np.zeros((4, 4), np.bool_)
    assert mask_iou(empty, empty) == 1
    assert mask_iou(empty, ~empty) == 0


def test_the_table_has_a_row_for_each_candidate() -> None:
    result = _compare(_disc(30), _disc(28), None)
    rows = table([result, result]).splitlines()
    assert len(rows) == 4
    assert "mean mask IoU" in rows[2]
    assert "–" in rows[2], "no Jaccard without truth"


def test_the_shipped_photos_are_there_with_their_truth() -> None:
    samples = load_samples(REFERENCE)
    assert len(samples) == 24
    for sample in samples:
        assert sample.truth is not None
        assert sample.truth.shape == (sample.height, sample.width)
        assert 0 < sample.truth.mean() < 1


def test_folders_in_the_isic_layout_are_read(tmp_path: Path) -> None:
    write_pairs(tmp_path, 4, 160, 120)
    Image.new("L", (160, 120)).save(tmp_path / "lesion_000_superpixels.png")
    masks = tmp_path / "masks"
    masks.mkdir()
    (tmp_path / "lesion_003_segmentation.png").rename(masks / "lesion_003_segmentation.png")

    samples = load_samples(tmp_path)
    assert [sample.name for sample in samples] == [f"lesion_00{i}" for i in range(4)]
    assert [sample.truth is None for sample in samples] == [False, False, False, True]
    assert load_samples(tmp_path, masks)[3].truth is not None
    assert [s.name for s in load_samples(tmp_path, limit=2)] == ["lesion_000", "lesion_002"]
    with pytest.raises(FileNotFoundError, match="holds no"):
        load_samples(masks / "nothing")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with ranges beside it, from the shipped photos."""
    onnx_path = tmp_path_factory.mktemp("model") / "slsnet.onnx"
    onnx_path.write_bytes(MODEL.read_bytes())
    calibrate(["--onnx", str(onnx_path), "--images", str(REFERENCE), "--limit", "8"])
    return onnx_path


def test_ranges_cover_every_convolution(calibrated: Path) -> None:
    ranges = read_ranges(calibrated)
    model = onnx.load(calibrated)
    inputs = {node.input[0] for node in model.graph.node if node.op_type == "Conv"}
    assert ranges.keys() == inputs
    assert all(0 < value < 1e4 for value in ranges.values())
    assert json.loads(calibration_path(calibrated).read_text())["images"] == 8


@pytest.mark.slow
def test_the_shipped_model_passes_the_gate_in_every_precision(
    calibrated: Path, tmp_path: Path, data_dir: Path | None, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "parity.json"
    arguments = ["--onnx", str(calibrated), "--simulate", "fp16", "bf16", "int8"]
    if data_dir is not None:
        folder = data_dir / "isic2017"
        arguments += ["--images", str(folder / "ISIC-2017_Validation_Data")]
        arguments += ["--masks", str(folder / "ISIC-2017_Validation_Part1_GroundTruth")]
        ranges = tmp_path / "ranges.json"
        training = folder / "ISIC-2017_Training_Data"
        calibrate(
            [
                *("--onnx", str(calibrated), "--images", str(training)),
                *("--limit", "16", "--output", str(ranges)),
            ]
        )
        calibration_path(calibrated).write_bytes(ranges.read_bytes())
    code = parity([*arguments, "--limit", "6", "--json", str(results)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert printed.count("passed") == 3
    fp16, bf16, _ = json.loads(results.read_text())
    assert fp16["mean_difference"] < bf16["mean_difference"]


def test_photos_that_are_decoded_whole_have_the_same_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, orientation in enumerate((1, 6)):
        photo = encode_photo(lesion_photo(seed, 1100, 900).pixels, orientation=orientation)
        (tmp_path / f"{seed}.jpg").write_bytes(photo)
    command = ["--onnx", str(MODEL), "--decode", "whole", "--images", str(tmp_path)]
    assert parity(command) == 0
    said = capsys.readouterr().out
    levels = re.search(r"decoded whole: pixels ([\d.]+) levels off", said)
    assert levels and 0 < float(levels[1]) < 2.5 and "passed" in said


@pytest.mark.parametrize("name", ["fp16", "fp16-sums"])
def test_a_candidate_that_fails_makes_the_command_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    from trt_build import parity as module

    exact = onnx_runner(MODEL)
    monkeypatch.setattr(module, "simulated_runner", lambda *_, **__: lambda batch: 1 - exact(batch))
    code = parity(["--onnx", str(MODEL), "--simulate", name, "--limit", "2"])
    assert code == 1
    table = capsys.readouterr().out
    assert f"| {name}, simulated on CPU |" in table
    assert "mean mask IoU" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--onnx", "nowhere.onnx", "--simulate", "fp16"], "nowhere.onnx"),
        (["--onnx", str(MODEL), "--engine", "nowhere.engine"], "nowhere.engine.json is missing"),
        (["--onnx", str(MODEL), "--simulate", "fp16", "--images", "nowhere"], "holds no"),
    ],
)
def test_the_command_says_what_cannot_be_compared(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert parity(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")


def test_without_a_gpu_nothing_is_simulated_before_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trt_build import parity as module

    def absent(*_: object) -> None:
        raise NoGpuError("no driver")

    monkeypatch.setattr(module, "gate_engine", absent)
    monkeypatch.setattr(module, "simulated_runner", lambda *_, **__: pytest.fail("begun"))
    arguments = ["--onnx", str(MODEL), "--engine", str(tmp_path / "e"), "--simulate", "fp16"]
    assert parity(arguments) == 2
    assert capsys.readouterr().err == "error: no driver\n"


def test_the_shipped_ranges_belong_to_the_shipped_model() -> None:
    """After new weights: python -m trt_build.calibrate --onnx … --images …"""
    assert len(read_ranges(MODEL)) > 60
