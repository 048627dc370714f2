"""What a run of training says: how far it is, in what precision, and what is wrong with `init`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model import data, loop, precision, progress, train
from model.config import ConfigError, DataConfig, TrainConfig
from model.precision import chosen_precision
from model.splits import prepare
from model.trainer import Trainer
from tests.support.tiny import pixel_set, tiny_config, write_isic2017


def trainer(out: Path, config: TrainConfig) -> Trainer:
    photos, chosen = pixel_set(8, config.size), {"validation": pixel_set(3, config.size, 700)}
    return Trainer(config, out, photos, chosen, "drawn lesions")


def test_steps_are_told_before_the_first_epoch_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "TELL_EVERY_S", 0.0)
    loop.run(trainer(tmp_path, tiny_config(epochs=1)))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("8 photos, 2 steps an epoch, on c")
    assert [line.split(" left ")[0] for line in lines[1:3]] == [
        "epoch 1/1 step 1/2",
        "epoch 1/1 step 2/2",
    ]
    assert lines[3].startswith("epoch 1/1 loss=")


@pytest.mark.parametrize("command", ["train", "distill", "ablate", "average", "compare", "export"])
def test_without_pytorch_it_is_told_what_to_install(command: str) -> None:
    # -S: without the installed packages
    ran = subprocess.run(
        [sys.executable, "-S", "-m", f"model.{command}", "--help"],
        cwd=Path(train.__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    assert ran.stderr.splitlines() == [
        "error: training needs torch, yaml, safetensors, kornia, which serving does without: "
        "pip install -r requirements-train.txt"
    ]


def test_decoding_is_told_from_the_first_photo_and_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "TELL_EVERY_S", 0.0)
    root = write_isic2017(tmp_path / "data", training=4, validation=2)
    prepare(tiny_config(), root, tmp_path / "cache")
    told = [line.split(" left ")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == [f"decoding photo {i}/{n}" for n in (4, 2) for i in range(1, n + 1)]
    # neither another fold nor another look decodes them again
    folds = DataConfig(folds=2, fold=1)
    prepare(tiny_config(data=folds), root, tmp_path / "cache")
    assert "decoding" not in capsys.readouterr().err


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_precision_is_what_the_processor_can(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
    chosen: str,
) -> None:
    for module in (precision, progress):
        monkeypatch.setattr(module, "has_bf16", lambda _: native)
    assert TrainConfig().precision == "auto"
    device = torch.device("cpu")
    assert chosen_precision(tiny_config(precision="auto"), device) == chosen
    assert chosen_precision(tiny_config(precision="bf16"), device) == "bf16"
    assert chosen_precision(tiny_config(precision="fp32"), device) == "fp32"
    run = trainer(tmp_path, tiny_config(precision="auto", epochs=1))
    with precision.autocast(run.config, device):
        assert torch.is_autocast_enabled("cpu") is native
    loop.run(run)
    assert np.isfinite(run.progress.best)
    assert f" in {chosen}" in capsys.readouterr().err.splitlines()[0]


def test_weights_of_another_network_are_refused_in_a_line(tmp_path: Path) -> None:
    file = tmp_path / "given.safetensors"
    save_file({f"other.{n}": torch.zeros(1) for n in range(400)}, file)
    with pytest.raises(ConfigError, match=r"400 unknown \(the first: other\.0\)") as refused:
        trainer(tmp_path, tiny_config(init=str(file)))
    assert len(str(refused.value)) < 400 + len(str(file))
