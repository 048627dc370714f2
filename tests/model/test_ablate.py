"""Ablations on a tiny budget: each run once, the table and the plot, and what is refused."""

import csv
from pathlib import Path

import pytest
from PIL import Image

from model import ablate
from model.ablate import GROUPS, MEASURES, PAPER, Row, chosen, main, markdown
from model.config import PRESETS, ConfigError, TrainConfig
from model.loop import train
from model.trainer import RunProgress, TrainingError
from tests.support.tiny import GENERATOR, tiny_flags, write_isic2017, write_pair


def flags(folder: Path, *presets: str, epochs: int = 1) -> list[str]:
    tiny = tiny_flags(augment="none")
    at = tiny.index("epochs=2")
    del tiny[at - 1 : at + 1]
    # the ablated switches are the presets' own
    assert not {"multiscale", "pam", "cam", "cam_form"} & GENERATOR.keys()
    where = ["--data", str(folder / "data"), "--cache", str(folder / "cache")]
    out = ["--out", str(folder / "out"), "--presets", *presets, "--epochs", str(epochs)]
    return [*where, *out, *tiny]


def test_runs_tables_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_isic2017(tmp_path / "data", training=4, validation=2)
    given = [*flags(tmp_path, "base", "cam-danet"), "--seeds", "0", "1"]
    main(given)
    out = tmp_path / "out"
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["preset"], r["seed"]) for r in rows} == {
        (preset, seed) for preset in ("base", "cam-danet") for seed in ("0", "1")
    }
    assert all(0 <= float(r[m]) <= 100 for r in rows for m in MEASURES)
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out.startswith(table)
    assert "Budget: 1 epochs over 4 images, 2 seeds a preset" in table
    assert "on 2 validation images (isic2017)" in table and "size=32" in table
    (base,) = [line for line in table.splitlines() if line.startswith("| base |")]
    values = [float(r["jaccard"]) for r in rows if r["preset"] == "base"]
    assert f"| 72.93 | {sum(values) / 2:.2f} ± " in base and base.endswith("| 0, 1 |")
    with Image.open(out / "plot.png") as picture:
        assert picture.size[0] > 600
    assert "multiscale: false" in (out / "base" / "seed-1" / "config.yaml").read_text()

    # finished runs are not repeated: their checkpoints stay as they are
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}
    assert len(before) == 4
    (out / "cam-danet" / "seed-1" / "last.pt").unlink()
    main(given)
    after = {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}
    assert [p for p in before if before[p] != after[p]] == [out / "cam-danet/seed-1/last.pt"]
    assert (out / "table.md").read_text() == table  # and the one that was lost is the same again

    with pytest.raises(SystemExit) as exit_:
        main([*flags(tmp_path, "base", epochs=2)])
    assert exit_.value.code == 2
    assert "was made with epochs=1, not 2" in capsys.readouterr().err


def test_a_diverged_run_is_told_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_isic2017(tmp_path / "data", training=4, validation=2)

    def failing(config: TrainConfig, *args: Path, resume: bool) -> RunProgress:
        if not config.generator.cam:
            raise TrainingError("the loss is not a number at step 3; try another rate")
        return train(config, *args, resume=resume)

    monkeypatch.setattr(ablate, "train", failing)
    with pytest.raises(SystemExit) as exit_:
        main(flags(tmp_path, "base", "no-multiscale"))
    assert exit_.value.code == 1
    table = (tmp_path / "out" / "table.md").read_text()
    assert "- base, seed 0: the loss is not a number at step 3\n" in table
    assert "| base | 72.93 | – |" in table and "| no-multiscale | 78.76 | –" not in table


def test_ablation_groups_are_the_tables_of_the_paper() -> None:
    assert chosen(["table4"]) == ["base", "base+pam", "base+cam", "no-multiscale", "paper"]
    assert chosen(["cam", "table5", "paper"]) == ["paper", "cam-danet", "input-64", "input-256"]
    for group in GROUPS.values():
        assert set(group) <= PRESETS.keys() and set(group) - PAPER.keys() <= {"cam-danet"}
    with pytest.raises(ConfigError, match="no preset or group 'table7'; there are: table4, "):
        chosen(["table7"])


def test_spread_is_over_seeds() -> None:
    row = Row("paper", {s: dict.fromkeys(MEASURES, v) for s, v in ((0, 70.0), (1, 74.0))})
    assert "| 81.98 | 72.00 ± 2.83 | 90.63 | 72.00 ± 2.83 |" in markdown([row], "")
    one = Row("best", {4: dict.fromkeys(MEASURES, 70.0)})
    assert "| best | – | 70.00 | – | 70.00 |" in markdown([one], "")


def test_without_a_test_set_there_is_nothing_to_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_isic2017(tmp_path / "data", training=4, validation=2)
    with pytest.raises(SystemExit):
        main([*flags(tmp_path, "base"), "--split", "test"])
    assert "there is no official test set in the data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--set", "seed=3"], "--set seed is the same for every run: use --seeds"),
        (["--set", "network=teacher"], "network=teacher is not served, and so not scored"),
        (["--out", __file__], "error: [Errno 17]"),
    ],
)
def test_flags_that_would_mislead_are_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], says: str
) -> None:
    write_isic2017(tmp_path / "data", training=4, validation=2)
    with pytest.raises(SystemExit) as exit_:
        main([*flags(tmp_path, "base"), *changes])
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err


def test_the_budget_names_the_set_that_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(8):
        write_pair(tmp_path / "data/images", tmp_path / "data/masks", f"lesion_{index}", index)
    monkeypatch.setattr(ablate, "run_one", lambda *_: None)
    main([*flags(tmp_path, "base"), "--set", "data.folds=2"])
    table = (tmp_path / "out" / "table.md").read_text()
    assert "by holdout Jaccard, on 4 holdout images (folder)" in table
