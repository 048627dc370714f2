"""The comparison of what a photo costs beside the network: both ways give the same mask."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks import path
from benchmarks.path import ARRIVALS, STEPS, compare
from photos.image import MODEL_SIZE
from trt_build.parity import mask_iou


def disc(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
    y, x = np.mgrid[:MODEL_SIZE, :MODEL_SIZE] / MODEL_SIZE - 0.5
    one = np.clip(1 - np.hypot(x, y * 1.3) - 0.2, 0, 1).astype(np.float32)
    return np.stack([one] * len(batch))


def jpeg(width: int, height: int) -> bytes:
    buffer = BytesIO()
    Image.effect_noise((width, height), 40).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def lesion(png: bytes) -> NDArray[np.bool_]:
    with Image.open(BytesIO(png), formats=("PNG",)) as image:
        return np.asarray(image.convert("L")) > 127


def test_both_ways_give_the_same_mask_and_the_ratio_is_of_their_sums() -> None:
    comparison = compare(jpeg(1500, 1000), disc, turns=1)
    ours, usual = lesion(comparison.png), lesion(comparison.usual_png)
    assert ours.shape == usual.shape == (1000, 1500)
    assert 0.1 < ours.mean() < 0.9
    assert mask_iou(ours, usual) > 0.999
    for steps in (comparison.ours, comparison.usual):
        assert tuple(steps) == STEPS
        assert min(steps.values()) > 0
    ratio = sum(comparison.usual.values()) / sum(comparison.ours.values())
    assert comparison.ratio == pytest.approx(ratio)


def test_the_table_has_both_ways_of_each_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for module in ("path", "latency"):
        monkeypatch.setattr(f"benchmarks.{module}.SIZES", ((300, 200), (90, 160)))
    (tmp_path / "a.jpg").write_bytes(jpeg(300, 200))
    path.main(["--images", str(tmp_path), "--turns", "1"])
    output = capsys.readouterr().out
    rows = [line for line in output.splitlines() if "×" in line and line.startswith("|")]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| 300×200", "here"],
        ["| 300×200", "usual"],
        ["| 90×160", "here"],
        ["| 90×160", "usual"],
    ]
    assert all(("**" in row) is ("usual" in row) for row in rows)
    assert "the largest in" in output
    queue = [line.split(" | ") for line in output.partition("| clients |")[2].splitlines()[2:]]
    assert [(row[0], row[1]) for row in queue] == [
        (f"| {clients}", str(photos)) for clients, photos in ARRIVALS
    ]
    assert all(float(row[2].removesuffix(" |")) > 0 for row in queue)


def test_a_folder_without_photos_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        path.main(["--images", str(tmp_path)])
    assert "holds no .jpg" in capsys.readouterr().err
