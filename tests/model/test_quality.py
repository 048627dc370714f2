"""The table of quality: made of held-out photos, true of others, and the shipped one belongs."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from model.data import find_pairs
from model.evaluate import WEIGHTS, evaluate, load_network
from model.quality import (
    BINS,
    HeldOut,
    along_outline,
    auc,
    calibration_error,
    isotonic,
    main,
    make_table,
    report,
    spearman,
)
from model.train import main as train
from model.truth import DataError
from photos.quality import QualityTable
from tests.support.lesions import write_pairs
from tests.support.tiny import changed_checkpoint, tiny_flags, write_isic2017

SHIPPED = WEIGHTS.with_suffix(".quality.json")


def _held(photos: int, seed: int = 0) -> HeldOut:
    """Photos whose Jaccard is the square of what is expected, with noise."""
    rng = np.random.default_rng(seed)
    expected = rng.uniform(0.3, 1, photos)
    figures = np.clip(expected**2 + rng.normal(0, 0.05, photos), 0, 1)
    border = [rng.uniform(0, 1, rng.integers(20, 4000)).astype(np.float32) for _ in range(photos)]
    return HeldOut(expected, figures, border)


def test_the_table_gives_what_held_out_masks_had() -> None:
    table = make_table(_held(600), "ab" * 32)
    other = _held(600, seed=1)
    score = np.array([table.likely(x) for x in other.expected])
    assert np.abs(score - other.expected**2).mean() < 0.02
    assert calibration_error(score, other.jaccard) < 0.02
    assert table.likely(0) == 0
    assert [table.generous, table.tight] == pytest.approx([0.1, 0.9], abs=0.01)


def test_a_long_outline_weighs_no_more_than_a_short_one() -> None:
    held = _held(100)
    for index in range(100):
        held.border[index] = np.full(*((9000, 0.5) if index % 5 else (3, 0.02)), np.float32)
    levels = make_table(held, "ab" * 32)
    assert (levels.generous, levels.tight) == (0.02, 0.5)


def test_too_few_photos_make_no_table() -> None:
    with pytest.raises(DataError, match=rf"5 photos make no table .* hold out {2 * BINS} or more"):
        make_table(_held(5), "ab" * 32)


def test_the_statistics_are_the_usual_ones() -> None:
    rng = np.random.default_rng(0)
    a, b, weights = rng.normal(size=50), rng.integers(0, 9, 50) / 8, rng.uniform(1, 5, 50)
    np.testing.assert_allclose(
        isotonic(b, weights), optimize.isotonic_regression(b, weights=weights).x
    )
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    positive = a + rng.normal(size=50) > 0
    expected = stats.mannwhitneyu(b[positive], b[~positive]).statistic
    assert auc(b, positive) == pytest.approx(expected / (positive.sum() * (~positive).sum()))
    assert math.isnan(auc(b, np.ones(50, bool)))
    score, truth = np.array([0.2, 0.4, 0.6, 0.8]), np.array([0.1, 0.3, 0.7, 0.9])
    assert calibration_error(score, truth, bins=2) == pytest.approx(0.1)


def test_what_lies_along_an_outline_is_between_both_sides() -> None:
    probability = np.tile(np.linspace(0, 1, 8, dtype=np.float32), (8, 1))
    truth = np.zeros((8, 8), np.bool_)
    truth[:, 4:] = True
    np.testing.assert_allclose(along_outline(probability, truth), [0.5] * 8, atol=1e-6)
    assert along_outline(probability, np.ones((8, 8), np.bool_)).size == 0, "the frame is none"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that each held out half of the photos."""
    folder = tmp_path_factory.mktemp("quality")
    write_isic2017(folder / "data", training=30, validation=2)
    for fold in (0, 1):
        flags = tiny_flags(epochs=1, augment="none", data__folds=2, data__fold=fold)
        where = ["--data", str(folder / "data"), "--cache", str(folder / "cache")]
        train([*where, "--out", str(folder / f"run-{fold}"), *flags])
    return folder


def test_a_table_is_made_of_what_the_runs_held_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = folder / "run-0" / "best.safetensors"
    where = ["--data", str(folder / "data"), "--cache", str(folder / "cache")]
    runs = ["--runs", str(folder / "run-0"), str(folder / "run-1")]
    main(["calibrate", *where, *runs, "--weights", str(weights)])
    table = QualityTable.parse(weights.with_suffix(".quality.json").read_bytes())
    assert table.photos == 30, "each by the run that held it out"
    assert table.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert "from 30 held-out masks" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", *where, "--runs", str(folder / "none"), "--weights", str(weights)])
    assert ended.value.code == 1 and "holds no run" in capsys.readouterr().err
    # The data has changed since: what the run was trained on is held out by its settings now.
    turned = changed_checkpoint(
        folder / "run-1", lambda state: state["config"]["data"].update(fold=0)
    )
    with turned, pytest.raises(SystemExit):
        main(["calibrate", *where, *runs, "--weights", str(weights)])
    assert "run-1 was trained on ISIC_" in capsys.readouterr().err


def test_a_report_says_how_well_good_masks_are_told_from_bad_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path, 8, 120, 90)
    pairs = ["--images", str(tmp_path), "--masks", str(tmp_path)]
    main(["report", *pairs, "--plot", str(tmp_path / "risk.svg")])
    said = capsys.readouterr().out
    for line in ("Spearman", "AUC", "calibration error", "surest 80 %", "| 50% |", "outline", "ms"):
        assert line in said
    assert "<svg" in (tmp_path / "risk.svg").read_text()
    evaluation = evaluate(find_pairs(tmp_path, tmp_path), load_network(WEIGHTS))
    assert (
        said.splitlines()[:8]
        == report(evaluation, QualityTable.parse(SHIPPED.read_bytes())).splitlines()[:8]
    )
    with pytest.raises(SystemExit) as ended:
        main(["report", *pairs, "--table", str(tmp_path / "none.json")])
    assert ended.value.code == 1 and "none.json" in capsys.readouterr().err


def test_the_shipped_table_belongs_to_the_shipped_weights() -> None:
    table = QualityTable.parse(SHIPPED.read_bytes())
    weights = WEIGHTS.with_suffix(".safetensors").read_bytes()
    assert table.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert table.weights_sha256 == load_network(WEIGHTS).metadata["weights_sha256"]


@pytest.mark.slow
def test_the_shipped_table_is_true_of_photos_that_it_was_not_made_of(data_dir: Path | None) -> None:
    if data_dir is None:
        pytest.skip("needs the ISIC 2017 validation set (SLSNET_DATA)")
    parts = ("Data", "Part1_GroundTruth")
    folders = [data_dir / "isic2017" / f"ISIC-2017_Validation_{part}" for part in parts]
    if not all(folder.is_dir() for folder in folders):
        pytest.skip("needs the ISIC 2017 validation set (SLSNET_DATA)")
    evaluation = evaluate(find_pairs(folders[0], folders[1]), load_network(WEIGHTS))
    said = report(evaluation, QualityTable.parse(SHIPPED.read_bytes()))
    figures = dict(line.split(" | ")[:2] for line in said.splitlines() if line.startswith("| "))
    assert float(figures["| Spearman with the true Jaccard"]) > 0.68
    assert float(figures["| AUC for a Jaccard below 0.65"]) > 0.88
    assert float(figures["| calibration error"]) < 0.06
    assert float(figures["| Jaccard of the surest 80 %"]) > 0.82
