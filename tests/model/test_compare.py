"""Recipes beside each other on held-out photos: paired figures, and whether attention is used."""

from pathlib import Path

import pytest
import torch

from model.compare import Recipe, difference, main, markdown, score
from model.config import ConfigError
from model.data import find_samples
from model.train import main as train
from tests.support.tiny import changed_checkpoint, tiny_flags, write_isic2017


def _run(folder: Path, name: str, fold: int, **changes: object) -> Path:
    out = folder / f"{name}-{fold}"
    flags = tiny_flags(epochs=1, augment="none", data__folds=2, data__fold=fold, **changes)
    where = ["--data", str(folder / "data"), "--cache", str(folder / "cache")]
    train([*where, "--out", str(out), *flags])
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    write_isic2017(folder / "data", training=8, validation=3)
    for fold in (0, 1):
        _run(folder, "exact", fold, pam_wake=0)
        _run(folder, "none", fold, pam_wake=1)
    return folder


def test_every_photo_is_scored_once_by_the_run_that_held_it_out(folder: Path) -> None:
    samples = find_samples(folder / "data")
    recipe = score("exact", [folder / "exact-0", folder / "exact-1"], samples, folder / "cache")
    held = recipe.scores["holdout"]
    assert set(held) == {s.id for s in samples if s.split == "training"}
    assert {len(values) for values in held.values()} == {1}
    # both runs scored the validation set
    assert {len(values) for values in recipe.scores["validation"].values()} == {2}


def test_attention_weights_are_listed_and_can_be_left_out(folder: Path) -> None:
    samples = find_samples(folder / "data")
    awake = score("exact", [folder / "exact-0"], samples, folder / "cache")
    assert len(awake.eta) == 2 and all(awake.eta)
    asleep = score("none", [folder / "none-0"], samples, folder / "cache")
    assert asleep.eta == [] and asleep.without == asleep.scores

    # a network that leans on its attention loses by its absence
    path = folder / "exact-0" / "last.pt"
    state = torch.load(path, weights_only=True)
    for key in state["average"]:
        if key.endswith("pam.eta"):
            state["average"][key] += 50
    torch.save(state, folder / "exact-0" / "last.pt")
    leaning = score("exact", [folder / "exact-0"], samples, folder / "cache")
    assert leaning.scores["holdout"] != leaning.without["holdout"]


def test_the_table_is_paired_by_photo(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = Recipe("a", {"holdout": {"x": [0.5, 0.7], "y": [0.4], "z": [0.9]}}, {}, [])
    b = Recipe("b", {"holdout": {"x": [0.7], "y": [0.6]}}, {"holdout": {"x": [0.6], "y": [0.5]}})
    b.eta = [0.25]
    assert difference(b.scores["holdout"], a.scores["holdout"]) == pytest.approx([0.1, 0.2])
    table = markdown([a, b]).splitlines()
    assert "| a | 3 | 0.6333 ± 0.1453 | – | – | – |" in table
    assert "| b | 2 | 0.6500 ± 0.0500 | +0.1500 ± 0.0500 | +0.250 | -0.1000 ± 0.0000 |" in table

    where = ["--data", str(folder / "data"), "--cache", str(folder / "cache")]
    recipes = [
        "--recipe",
        "none",
        str(folder / "none-1"),
        "--recipe",
        "same",
        str(folder / "none-1"),
    ]
    main([*where, *recipes])
    out = capsys.readouterr().out
    assert "**holdout**" in out and "**validation**" in out
    assert out.count("+0.0000 ± 0.0000") == 2


def test_incomparable_runs_are_refused_by_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = find_samples(folder / "data")
    with pytest.raises(ConfigError, match="holds no run"):
        score("x", [folder / "nothing"], samples, folder / "cache")
    # The data has changed since: what the run was trained on is held out by its settings now.
    turned = changed_checkpoint(
        folder / "none-1", lambda state: state["config"]["data"].update(fold=0)
    )
    with turned, pytest.raises(ConfigError, match=r"none-1 was trained on ISIC_.*data holds out"):
        score("x", [folder / "none-1"], samples, folder / "cache")
    whole = folder / "whole"
    where = ["--data", str(folder / "data"), "--cache", str(folder / "cache")]
    train([*where, "--out", str(whole), *tiny_flags(epochs=1, augment="none")])
    with pytest.raises(ConfigError, match=r"held out a fold: set data\.folds"):
        score("x", [whole], samples, folder / "cache")
    with pytest.raises(SystemExit) as exit_:
        main([*where, "--recipe", "x"])
    assert exit_.value.code == 2
    assert "names no run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*where, "--cache", str(folder / "whole" / "last.pt"), "--recipe", "x", str(whole)])
    assert "error: " in capsys.readouterr().err
