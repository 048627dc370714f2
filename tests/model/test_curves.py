"""Learning curves of real and of broken histories."""

from pathlib import Path

import pytest

from model.curves import main, read_history

TWO_EPOCHS = "epoch,loss,validation_jaccard,selection\n1,1.5,,\n2,1.25,0.5,0.5\n"


def test_curves_are_drawn_and_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    history = tmp_path / "run" / "history.csv"
    history.write_text(TWO_EPOCHS)
    assert read_history(history)["validation_jaccard"] == ([2.0], [0.5])
    assert read_history(history)["loss"] == ([1.0, 2.0], [1.5, 1.25])
    pictures = []
    for name in ("a.svg", "b.svg"):
        main([str(history), "--out", str(tmp_path / name)])
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1] and b"<svg" in pictures[0]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", TWO_EPOCHS.replace("1.5", "x")])
def test_other_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file = tmp_path / "other.csv"
    file.write_text(text)
    with pytest.raises(SystemExit) as exit_:
        main([str(file), "--out", str(tmp_path / "c.png")])
    assert exit_.value.code == 2
    assert "other.csv is not a history.csv of model.train" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["curves.txt", "nowhere/curves.svg"])
def test_a_picture_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "history.csv").write_text(TWO_EPOCHS)
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path / "history.csv"), "--out", str(tmp_path / name)])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
