"""Evaluation: the figures of a folder pair, the files it writes, and what it refuses."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model.data import find_pairs
from model.evaluate import THRESHOLDS, WEIGHTS, Network, evaluate, load_network, main
from model.metrics import METRICS
from model.truth import DataError, read_truth
from photos.image import lesion_mask, read_photo, unpack_mask
from tests.support.lesions import drawn_photo, encode_photo, lesion_photo, write_pairs

KEYS = {"accuracy", "dice", "jaccard", "sensitivity", "specificity", "threshold_jaccard", "count"}


def darkness(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Stands in for a network: what is darker than most of the picture is lesion."""
    green = batch[..., 1].astype(np.float32)
    skin = np.percentile(green.reshape(len(batch), -1), 75, axis=1)[:, None, None]
    return np.asarray(1 / (1 + np.exp(-(skin - green - 40) / 8)), np.float32)


DARKNESS = Network(Path("darkness.onnx"), 128, {"version": "0"}, darkness)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos of two sizes with their masks, in one folder."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, 3, 300, 200)
    write_pairs(folder, 3, 240, 240, first_seed=3)
    return folder


@pytest.fixture(scope="module")
def report(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command line's report for `pairs`, with the shipped weights."""
    path = tmp_path_factory.mktemp("report") / "deeper" / "out.json"
    main(["--images", str(pairs), "--masks", str(pairs), "--report", str(path)])
    return path


def test_the_report_has_the_figures(report: Path) -> None:
    figures = json.loads(report.read_text())
    assert set(figures) >= KEYS
    assert figures["count"] == 6
    assert all(0 <= figures[name] <= 1 for name in METRICS)
    assert 0 <= figures["calibration_error"] <= 1
    assert figures["model"]["name"] == "slsnet"
    assert len(figures["jaccard_by_threshold"]) == len(THRESHOLDS)


def test_the_csv_averages_to_the_report(report: Path) -> None:
    figures = json.loads(report.read_text())
    with report.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"lesion_{n:03d}" for n in range(6)]
    for name in METRICS:
        mean = np.mean([float(row[name]) for row in rows])
        assert mean == pytest.approx(figures[name], abs=1e-8)
    assert (rows[0]["image_width"], rows[0]["image_height"]) == ("300", "200")
    assert float(rows[4]["lesion_share"]) == pytest.approx(lesion_photo(4, 240, 240).mask.mean())


def test_cleaned_figures_leave_other_regions_out(pairs: Path) -> None:
    samples = find_pairs(pairs, pairs)

    def with_a_patch(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        found = darkness(batch)
        found[:, :4, :4] = 0.9
        return found

    patched = Network(Path("patched.onnx"), 128, {"version": "0"}, with_a_patch)
    raw, cleaned = evaluate(samples, patched), evaluate(samples, patched, clean=True)
    unpatched = evaluate(samples, DARKNESS, clean=True)
    assert raw.report()["jaccard"] < cleaned.report()["jaccard"]
    assert cleaned.report()["jaccard"] == unpatched.report()["jaccard"]
    assert not cleaned.cases[0].probability[:4, :4].any()
    assert cleaned.calibration.error() == raw.calibration.error(), "of what the network says"


@pytest.mark.filterwarnings("ignore")  # not this project's
def test_agreement_with_the_official_scorer(pairs: Path, report: Path, tmp_path: Path) -> None:
    segmentation = pytest.importorskip(
        "isic_challenge_scoring.segmentation", reason="needs requirements-scorer.txt"
    )
    network = load_network(WEIGHTS)
    truths, predictions = tmp_path / "truths", tmp_path / "predictions"
    truths.mkdir()
    predictions.mkdir()
    for index, sample in enumerate(find_pairs(pairs, pairs)):
        name = f"ISIC_{index:07d}_segmentation.png"
        (truths / name).write_bytes(sample.mask.read_bytes())
        photo = read_photo(sample.image.read_bytes())
        probability = network.predict(photo.pixels[None])[0]
        packed = lesion_mask(probability, photo.width, photo.height)
        mask = Image.fromarray(unpack_mask(packed, photo.width))
        mask.save(predictions / name)
    official = segmentation.SegmentationScore.from_dir(truths, predictions).macro_average
    figures = json.loads(report.read_text())
    # Batched and single images may differ in the last bit of a probability.
    assert {name: figures[name] for name in METRICS} == pytest.approx(official.to_dict(), abs=1e-6)


def test_a_plain_heuristic_scores_as_if_by_hand(pairs: Path) -> None:
    evaluation = evaluate(find_pairs(pairs, pairs), DARKNESS)
    expected = []
    for n in range(6):
        size = (300, 200) if n < 3 else (240, 240)
        truth = lesion_photo(n, *size).mask
        pixels = read_photo((pairs / f"lesion_{n:03d}.jpg").read_bytes()).pixels
        mask = unpack_mask(lesion_mask(darkness(pixels[None])[0], *size), size[0])
        expected.append((mask & truth).sum() / (mask | truth).sum())
    figures = evaluation.report()
    assert figures["jaccard"] == pytest.approx(np.mean(expected))
    assert figures["jaccard_standard_error"] == pytest.approx(np.std(expected, ddof=1) / 6**0.5)
    assert figures["jaccard"] > 0.3
    assert evaluation.sweep[0.5] == pytest.approx(figures["jaccard"])


def test_the_threshold_moves_the_masks(pairs: Path) -> None:
    samples = find_pairs(pairs, pairs)
    strict, lax = evaluate(samples, DARKNESS, 0.9).report(), evaluate(samples, DARKNESS, 0.1)
    assert strict["sensitivity"] < lax.report()["sensitivity"]
    assert strict["jaccard"] == pytest.approx(lax.sweep[0.9])


def test_masks_of_another_size_are_scored_at_their_size(tmp_path: Path) -> None:
    photo = lesion_photo(1, 400, 300)
    (tmp_path / "a.png").write_bytes(encode_photo(photo.pixels, "PNG"))
    Image.fromarray(photo.mask).resize((160, 160)).save(tmp_path / "a_segmentation.png")
    evaluation = evaluate(find_pairs(tmp_path, tmp_path), DARKNESS)
    case = evaluation.cases[0]
    assert (case.image_size, case.mask_size) == ((400, 300), (160, 160))
    assert sum(getattr(evaluation.confusion, k)[0] for k in ("tp", "fp", "fn", "tn")) == 160 * 160


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_images_of_any_format(tmp_path: Path, suffix: str) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    photo = lesion_photo(2, 200, 150)
    name = {"tif": "TIFF"}.get(suffix, suffix.upper())
    (images / f"a.{suffix}").write_bytes(encode_photo(photo.pixels, name))
    Image.fromarray(photo.mask).save(masks / "a_segmentation.png")
    assert evaluate(find_pairs(images, masks), DARKNESS).report()["count"] == 1


@pytest.mark.parametrize("lesion", [False, True])
def test_empty_and_full_masks_are_scored(tmp_path: Path, lesion: bool) -> None:
    (tmp_path / "a.png").write_bytes(drawn_photo(2, 200, 150, "PNG"))
    Image.fromarray(np.full((150, 200), lesion)).save(tmp_path / "a_segmentation.png")
    figures = evaluate(find_pairs(tmp_path, tmp_path), DARKNESS).report()
    assert figures["specificity" if lesion else "sensitivity"] == 1


def grey_mask(values: NDArray[np.uint8]) -> Callable[[Path], None]:
    return lambda folder: Image.fromarray(values).save(folder / "lesion_001_segmentation.png")


@pytest.mark.parametrize(
    ("damage", "names", "fix"),
    [
        (
            lambda folder: (folder / "lesion_001_segmentation.png").unlink(),
            "lesion_001.jpg",
            "add the mask",
        ),
        (
            lambda folder: (folder / "lesion_001.jpg").write_bytes(b"no picture"),
            "lesion_001.jpg",
            "send JPEG",
        ),
        (
            lambda folder: (folder / "lesion_001_segmentation.png").write_bytes(b"no picture"),
            "lesion_001_segmentation.png",
            "replace it",
        ),
        (
            grey_mask(np.full((100, 100), 100, np.uint8)),
            "lesion_001_segmentation.png",
            "store lesion as 255",
        ),
        (
            grey_mask(np.eye(100, dtype=np.uint8)),
            "lesion_001_segmentation.png",
            "store lesion as 255",
        ),
        (
            grey_mask(np.tile(np.arange(250, dtype=np.uint8), (100, 1))),
            "lesion_001_segmentation.png",
            "not black and white",
        ),
        (
            grey_mask(np.eye(150, 100, dtype=np.uint8) * 255),
            "lesion_001_segmentation.png",
            "turn the mask",
        ),
    ],
)
def test_unusable_files_are_named_before_the_network_runs(
    tmp_path: Path, damage: Callable[[Path], None], names: str, fix: str
) -> None:
    write_pairs(tmp_path, 3, 150, 100)
    damage(tmp_path)

    def never(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        raise AssertionError("the network ran")

    with pytest.raises(DataError, match=fix) as refused:
        evaluate(find_pairs(tmp_path, tmp_path), Network(Path("n.onnx"), 128, {}, never))
    assert names in str(refused.value)


def test_grey_at_the_border_of_a_resized_mask_is_accepted(tmp_path: Path) -> None:
    mask = Image.fromarray(lesion_photo(5, 600, 450).mask).convert("L")
    mask.resize((301, 227), Image.Resampling.BICUBIC).save(tmp_path / "mask.png")
    assert read_truth(tmp_path / "mask.png").mean() == pytest.approx(
        np.asarray(mask).mean() / 255, abs=0.005
    )


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--model", "absent.onnx"], 1, "absent.onnx does not exist"),
        (["--model", __file__], 1, "neither .onnx nor .safetensors"),
        (["--images", "absent"], 1, "absent is not a folder"),
        (["--threshold", "2"], 2, "not within 0 and 1"),
        (["--size", "100"], 2, "multiple of 8"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    pairs: Path,
    arguments: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--images", str(pairs), "--masks", str(pairs), *arguments])
    assert left.value.code == status
    captured = capsys.readouterr().err
    assert message in captured
    assert "Traceback" not in captured


def test_all_outputs_at_once(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    outputs = ["--report", str(tmp_path / "r.json"), "--csv", str(tmp_path / "per-image.csv")]
    gallery = ["--gallery", str(tmp_path / "gallery")]
    main(["--images", str(pairs), "--masks", str(pairs), *outputs, *gallery])
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "per-image.csv", "gallery"}
    assert (tmp_path / "gallery/index.html").is_file()
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed["count"] == "6"
    assert float(printed["jaccard"]) == pytest.approx(
        json.loads((tmp_path / "r.json").read_text())["jaccard"], abs=1e-4
    )


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.safetensors"):
        (tmp_path / name).write_bytes(b"not a model")
        with pytest.raises(ValueError, match=f"{name} is not a readable"):
            load_network(tmp_path / name)


def test_safetensors_and_onnx_are_one_network(pairs: Path) -> None:
    pytest.importorskip("torch")
    batch = np.stack(
        [read_photo(s.image.read_bytes()).pixels for s in find_pairs(pairs, pairs)[:2]]
    )
    onnx, weights = load_network(WEIGHTS), load_network(WEIGHTS.with_suffix(".safetensors"))
    # The graph's attention is pooled, that of the weights exact.
    assert np.abs(onnx.predict(batch) - weights.predict(batch)).max() < 0.05


def test_progress_is_told_on_stderr(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(find_pairs(pairs, pairs), DARKNESS, progress=True)
    captured = capsys.readouterr()
    assert "evaluated 6 of 6" in captured.err
    assert captured.out == ""


def test_a_cameras_resolution_reaches_the_network_alone(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[NDArray[np.uint8]] = []

    def look(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        seen.append(batch)
        return darkness(batch)

    watched = Network(Path("watched.onnx"), 128, {"version": "0"}, look)
    samples = find_pairs(pairs, pairs)
    whole, coarse, _ = (
        evaluate(samples, watched, camera=camera) for camera in (None, (40, 30), (4000, 4000))
    )
    sizes = {case.image_size for case in coarse.cases}
    assert sizes == {case.image_size for case in whole.cases} == {(300, 200), (240, 240)}
    # 40x27 and 30x30 pixels fill the network's 128x128 in steps.
    steps = [np.count_nonzero(np.diff(batch[0, 64].astype(int), axis=0).any(-1)) for batch in seen]
    assert steps[1] < steps[0] / 2
    assert abs(seen[2].astype(int) - seen[0]).mean() < 1.5
    assert coarse.report()["jaccard"] == pytest.approx(whole.report()["jaccard"], abs=0.1)
    flags = ["--images", str(pairs), "--masks", str(pairs)]
    for wrong in ("160", "0x120", "160x120x3"):
        with pytest.raises(SystemExit):
            main([*flags, "--camera", wrong])
        assert "160x120" in capsys.readouterr().err
    main([*flags, "--camera", "160x120"])
    assert "jaccard" in capsys.readouterr().out
