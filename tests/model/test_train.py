"""Whole runs in small: what they leave behind, and that a kill or another process changes nothing.

Given a few drawn lesions and a network of some thousand parameters, a run takes seconds.
"""

import csv
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from torch import Tensor

from model import checkpoint, loop
from model.config import (
    PRESETS,
    ConfigError,
    DataConfig,
    LossConfig,
    TrainConfig,
    load_config,
    parse_config,
)
from model.generator import Generator, load_generator, load_metadata, save_generator
from model.splits import prepare
from model.teacher import Teacher
from model.train import main
from model.trainer import Trainer, TrainingError
from model.zoo.network import ZooNetwork
from tests.support import ROOT
from tests.support.launch import free_port
from tests.support.tiny import (
    GENERATOR,
    changed_checkpoint,
    pixel_set,
    tiny_config,
    tiny_flags,
    write_isic2017,
)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_isic2017(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _undeterministic() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def trainer(out: Path, config: TrainConfig, images: int = 8, **selections: int) -> Trainer:
    out.mkdir(parents=True, exist_ok=True)
    chosen = selections or {"validation": 3}
    return Trainer(
        config,
        out,
        pixel_set(images, config.size),
        {name: pixel_set(n, config.size, 700) for name, n in chosen.items()},
        "drawn lesions",
    )


def history(out: Path) -> list[dict[str, float]]:
    with (out / "history.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def figures(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """All but what the clock says."""
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


def state(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(out / "last.pt", weights_only=True)
    return found


def same_state(one: Path, other: Path) -> None:
    """Bit for bit: weights, averages, moments, history, and the best weights."""
    a, b = state(one), state(other)
    for part in ("network", "average", "discriminator"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
    for part in ("optimizer", "discriminator_optimizer"):
        flat_a, flat_b = _tensors(a[part]), _tensors(b[part])
        assert all(torch.equal(x, y) for x, y in zip(flat_a, flat_b, strict=True)), part
    assert figures(a["progress"].pop("history")) == figures(b["progress"].pop("history"))
    assert a["progress"] == b["progress"]
    assert figures(history(one)) == figures(history(other))
    best_a, best_b = (load_file(p / "best.safetensors") for p in (one, other))
    assert all(torch.equal(best_a[k], best_b[k]) for k in best_a)


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [t for v in values for t in _tensors(v)] if isinstance(values, list) else []


def events(out: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(out), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


# One command


def test_a_run_from_the_command_line(
    data: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "a"
    flags = ["--data", str(data), "--cache", str(cache), "--out", str(out)]
    main([*flags, *tiny_flags(epochs=3, seed=5)])

    printed = capsys.readouterr()
    assert "best selection Jaccard 0." in printed.out
    assert "epoch 3/3 loss=" in printed.err and "validation_jaccard=" in printed.err
    assert "images/s left 0:00" in printed.err
    saved = parse_config(yaml.safe_load((out / "config.yaml").read_text()))
    assert (saved.epochs, saved.seed, saved.generator.widths) == (3, 5, (4, 6, 8, 10))
    rows = history(out)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert {"loss", "bce", "jaccard_loss", "learning_rate", "selection"} <= rows[0].keys()
    assert rows[-1]["loss"] < rows[0]["loss"]
    metadata = load_metadata(out / "best.safetensors")
    best = max(rows, key=lambda row: row["selection"])
    assert metadata["validation_jaccard"] == f"{best['validation_jaccard']:.4f}"
    assert metadata["training_data"] == "10 images of isic2017"
    assert load_generator(out / "best.safetensors").config == saved.generator
    assert not list(out.glob(".*")), "temporary files were left"

    # finished: nothing is left to do, and nothing is overwritten by accident
    before = (out / "last.pt").read_bytes()
    main([*flags, "--resume"])
    assert (out / "last.pt").read_bytes() == before
    refused(capsys, [*flags, *tiny_flags()], "holds a run: pass --resume, or another --out")
    for changed in (["--set", "epochs=9"], ["--preset", "best"]):
        says = "leave --preset, --config, --set and --network out"
        refused(capsys, [*flags, "--resume", *changed], says)
    # another architecture than the checkpoint's
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace("- 10\n", "- 12\n"))
    says = "was made with generator.widths=[4, 6, 8, 10], not [4, 6, 8, 12]: resume with the run's"
    refused(capsys, [*flags, "--resume"], says)
    for damage in (b"\xff", b"init: 2024-13-45", b"- 1", b"epoch: 1"):
        (out / "config.yaml").write_bytes(damage)
        refused(capsys, [*flags, "--resume"], "config.yaml")


def test_tensorboard_has_scalars_and_pictures(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_config(epochs=2))
    loop.run(run)
    found = events(tmp_path)
    tags = found.Tags()["scalars"]
    assert {
        "train/loss",
        "train/bce",
        "train/jaccard_loss",
        "train/learning_rate",
        "train/images_per_s",
        "metric/validation_jaccard",
        "metric/validation_threshold_jaccard",
        "metric/selection",
    } <= set(tags)
    losses = found.Scalars("train/loss")
    assert [e.step for e in losses] == [1, 2]
    assert losses[1].value == pytest.approx(run.progress.history[1]["loss"])
    grid = found.Images("image, truth, prediction")[-1]
    assert (grid.width, grid.height) == (3 * 32, 3 * 32)  # three images; image, truth, prediction


# Bad input: named, with the fix, before the first epoch, and without a traceback


def refused(capsys: pytest.CaptureFixture[str], flags: list[str], says: str) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(flags)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    # How far decoding was may be told before.
    assert "\nerror: " in f"\n{error}" and says in error
    assert "Traceback" not in error and "epoch 1/" not in error


def spoil(data: Path, case: str) -> str:
    """Spoil one file; returns what the error must say."""
    images, masks = data / "ISIC-2017_Training_Data", data / "ISIC-2017_Training_Part1_GroundTruth"
    image, mask = images / "ISIC_0000003.jpg", masks / "ISIC_0000003_segmentation.png"
    match case:
        case "missing mask":
            mask.unlink()
            return "ISIC_0000003.jpg has no mask: expected"
        case "unreadable image":
            image.write_bytes(b"\xff\xd8\xff")
            return "ISIC_0000003.jpg cannot be used"
        case "mask of another size":
            Image.new("1", (8, 8)).save(mask)
            return "ISIC_0000003_segmentation.png is 8×8, its image 40×40: resize the mask"
        case "empty mask":
            Image.new("1", (40, 40)).save(mask)
            return "ISIC_0000003_segmentation.png is empty"
        case "all-lesion mask":
            Image.new("1", (40, 40), 1).save(mask)
            return "ISIC_0000003_segmentation.png is all lesion"
        case "id in two splits":
            for folder, name in (("Data", image.name), ("Part1_GroundTruth", mask.name)):
                source = data / f"ISIC-2017_Training_{folder}" / name
                (data / f"ISIC-2017_Validation_{folder}" / name).write_bytes(source.read_bytes())
            return "ISIC_0000003 is in both isic2017's training set and isic2017's validation set"
        case _:
            for held_out in data.glob("ISIC-2017_Validation*"):
                shutil.rmtree(held_out)
            return "no validation set beside the training images: hold out a tenth with --set data"


@pytest.mark.parametrize(
    "case",
    [
        "missing mask",
        "unreadable image",
        "mask of another size",
        "empty mask",
        "all-lesion mask",
        "id in two splits",
        "no validation set",
    ],
)
def test_bad_data_stops_before_the_first_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    says = spoil(write_isic2017(tmp_path / "data", 6, 2), case)
    out, cache = tmp_path / "out", tmp_path / "cache"
    flags = ["--data", str(tmp_path / "data"), "--cache", str(cache), "--out", str(out)]
    refused(capsys, [*flags, *tiny_flags()], says)
    assert not out.exists()


def test_uniform_masks_can_be_allowed(tmp_path: Path) -> None:
    data, out = write_isic2017(tmp_path / "data", 4, 2), tmp_path / "out"
    spoil(data, "empty mask")
    flags = ["--data", str(data), "--cache", str(tmp_path / "cache"), "--out", str(out)]
    main([*flags, *tiny_flags(epochs=1, data__allow_uniform_masks=True)])
    assert history(out)[0]["loss"] > 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--set", "epoch=3"], "config key 'epoch' does not exist; did you mean epochs?"),
        (["--set", "generator.camform=eq1"], "did you mean generator.cam_form"),
        (["--set", "epochs"], "--set takes KEY=VALUE, not 'epochs'"),
        (["--set", "epochs=[1"], "--set epochs=[1: the value is not readable"),
        (["--set", "seed=2024-13-45"], "--set seed=2024-13-45: the value is not readable"),
        (
            [*tiny_flags(), "--set", "data.folds=99", "--set", "data.fold=98"],
            "fold 98 of 99 holds none of the 10 training photos",
        ),
        ([*tiny_flags(), "--cache", str(ROOT / "LICENSE")], "LICENSE"),
        ([*tiny_flags(), "--out", str(ROOT / "LICENSE")], "LICENSE"),
        (["--preset", "bets"], "no preset 'bets'; presets: best"),
        (["--config", "nowhere.yaml"], "nowhere.yaml is not a readable YAML file"),
        (["--resume"], "config.yaml does not exist; start the run without --resume"),
        (["--data", "nowhere"], "nowhere is not a folder"),
        ([*tiny_flags(), "--set", "batch_size=64"], "batch_size 64 is larger than the training se"),
        (
            [*tiny_flags(), "--set", "init=no.safetensors"],
            "no.safetensors holds no readable weights",
        ),
        (
            [*tiny_flags(), "--set", "data.teacher=no.npz", "--set", "loss.teacher=0.5"],
            "no.npz was not written by model.distill",
        ),
    ],
)
def test_bad_flags_name_the_fix(
    data: Path,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    says: str,
) -> None:
    out = tmp_path / "out"
    given = ["--data", str(data), "--cache", str(cache), "--out", str(out)]
    refused(capsys, [*given, *flags], says)


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    config = tiny_config(epochs=1)
    checkpoint.save(trainer(tmp_path, config))

    other = dataclasses.replace(config.generator, multiscale=False)
    with pytest.raises(ConfigError, match=r"made with generator\.multiscale=True, not False: res"):
        checkpoint.load(trainer(tmp_path, dataclasses.replace(config, generator=other)))
    # the same table, by another path
    table = {"groups": "g.csv"}
    with changed_checkpoint(tmp_path, lambda state: state["config"]["data"].update(table)):
        found = dataclasses.replace(config, data=DataConfig(groups=str(Path("g.csv").absolute())))
        checkpoint.load(trainer(tmp_path, found))
    # an option that has been deleted since
    run = trainer(tmp_path, config)
    run.config = dataclasses.replace(config, network="unet")
    options = {"network": "unet", "options": {"width": 8}}
    wider = changed_checkpoint(tmp_path, lambda state: state["config"].update(options))
    with wider, pytest.raises(ConfigError, match=r"made with options\.width=8, not None: resume"):
        checkpoint.load(run)
    with pytest.raises(ConfigError, match="made from another training set: pass the same --data"):
        checkpoint.load(trainer(tmp_path, config, images=9))
    # a file whose weights are not those of the architecture that it names
    saved = state(tmp_path)
    saved["network"]["head.weight"] = torch.zeros(9, 1, 3, 3)
    torch.save(saved, tmp_path / "last.pt")
    with pytest.raises(ConfigError, match=r"last\.pt holds another architecture"):
        checkpoint.load(trainer(tmp_path, config))
    (tmp_path / "last.pt").write_bytes(b"torn")
    with pytest.raises(TrainingError, match=r"last\.pt is not a readable checkpoint"):
        checkpoint.load(trainer(tmp_path, config))
    (tmp_path / "last.pt").unlink()
    with pytest.raises(TrainingError, match=r"nothing to resume: .*last\.pt does not exist"):
        checkpoint.load(trainer(tmp_path, config))


@pytest.mark.parametrize(
    ("section", "key"), [("data", "group_column"), ("generator", "pam_pool"), (None, "early_stop")]
)
def test_a_run_that_did_not_know_a_key_yet_is_resumed_with_its_default(
    tmp_path: Path, section: str | None, key: str
) -> None:
    config = tiny_config(epochs=2)
    run = trainer(tmp_path, config)
    run.progress.epoch = 1
    checkpoint.save(run)
    saved = state(tmp_path)
    del (saved["config"][section] if section else saved["config"])[key]
    torch.save(saved, tmp_path / "last.pt")
    resumed = trainer(tmp_path, config)
    checkpoint.load(resumed)
    assert resumed.progress.epoch == 1
    patient = dataclasses.replace(config, early_stop=3)
    with pytest.raises(ConfigError, match="made with early_stop=0, not 3: resume"):
        checkpoint.load(trainer(tmp_path, patient))


# Resuming and sharing out


def test_two_processes_do_not_train_in_one_folder(data: Path, cache: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("run").mkdir()
    with (
        checkpoint.alone(tmp_path / "run"),
        pytest.raises(ConfigError, match=r"another process trains in .*run: wait"),
    ):
        loop.train(tiny_config(epochs=1), data, tmp_path / "run", cache)
    assert not any((tmp_path / "run").glob("*.pt"))
    assert loop.train(tiny_config(epochs=1), data, tmp_path / "run", cache).epoch == 1


def test_a_run_that_another_process_began_meanwhile_is_left_alone(
    data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, last = tiny_config(epochs=1), tmp_path / "run" / "last.pt"

    def prepare_slowly(*args: Any) -> Any:
        last.parent.mkdir()
        last.write_bytes(b"of another process")
        return prepare(*args)

    monkeypatch.setattr(loop, "prepare", prepare_slowly)
    with pytest.raises(ConfigError, match=r"run holds a run: pass --resume, or another --out"):
        loop.train(config, data, last.parent, cache)
    assert [path.name for path in last.parent.iterdir()] == ["last.pt"]
    assert last.read_bytes() == b"of another process"


def test_a_checkpoint_needs_no_weights_to_start_from(
    data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(epochs=2)
    save_generator(Generator(config.generator), tmp_path / "given.safetensors")
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(config, init="given.safetensors")
    monkeypatch.setattr(loop, "run", lambda run: run.progress)
    loop.train(config, data, tmp_path / "out", cache)
    monkeypatch.undo()
    (tmp_path / "given.safetensors").unlink()
    saved = load_config(file=tmp_path / "out" / "config.yaml")
    assert saved.init == str(tmp_path / "given.safetensors")
    assert loop.train(saved, data, tmp_path / "out", cache, resume=True).epoch == 2

    def start(_: ZooNetwork) -> None:
        raise AssertionError("weights of a package are read")

    monkeypatch.setattr(ZooNetwork, "start", start)
    photos, config = pixel_set(4), tiny_config(network="enet")
    Trainer(config, tmp_path, photos, {"validation": photos}, fresh=False)


def command(data: Path, cache: Path, out: Path, *flags: str) -> list[str]:
    where = ["--data", str(data), "--cache", str(cache), "--out", str(out)]
    return ["-m", "model.train", *where, *flags]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


# It stands still after this epoch, for a test that comes late to kill it.
HELD = """
import sys, time
from model.progress import RunLog
from model.train import main

last = int(sys.argv.pop(1))
tell = RunLog.epoch

def tell_and_wait(self, row):
    tell(self, row)
    if row["epoch"] == last:
        time.sleep(600)

RunLog.epoch = tell_and_wait
main()
"""


@pytest.mark.slow
def test_killed_runs_go_on_bit_for_bit(data: Path, cache: Path, tmp_path: Path) -> None:
    """Everything that has state is on: dropout, averaging, adversary, warm-up, sleeping PAMs."""
    flags = tiny_flags(
        epochs=8,
        loss__adversarial=0.1,
        generator__encoder_dropout=[0.2, 0.2],
        augment="strong",
        validate_every=2,
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(command(data, cache, whole, *flags)[2:])

    moments, kills = random.Random(0), 0
    for attempt in range(20):
        resume = ["--resume"] if attempt else flags
        _, module, *arguments = command(data, cache, killed, *resume)
        how = ["-m", module] if kills == 2 else ["-c", HELD, str(4 + 2 * kills)]
        process = subprocess.Popen(
            [sys.executable, *how, *arguments],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        if kills < 2:
            for line in process.stderr:  # killed at any moment of the epochs after this one
                if line.startswith("epoch "):
                    time.sleep(moments.uniform(0, 0.3))
                    process.send_signal(signal.SIGKILL)
                    break
        error = process.stderr.read()
        process.stderr.close()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, error
        kills += 1
    assert kills == 2
    same_state(whole, killed)
    logged = events(killed).Scalars("train/loss")
    assert [e.step for e in logged] == list(range(1, 9))  # none is lost, none is there twice


def test_what_a_kill_left_is_put_right(data: Path, cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(command(data, cache, run, *tiny_flags(epochs=2))[2:])
    table = (run / "history.csv").read_text()
    # As if it had come between the checkpoint and the table, and while files were written.
    (run / "history.csv").write_text("".join(table.splitlines(keepends=True)[:2]))
    for name in (".last.pt.0123abcd.pt", ".history.csv.0123abcd.csv"):
        (run / name).touch()
    (run / ".last.pt.mine.pt").touch()
    main(command(data, cache, run, "--resume")[2:])
    assert (run / "history.csv").read_text() == table
    assert [path.name for path in run.glob(".*")] == [".last.pt.mine.pt"]
    # Where nothing is amiss nothing is written, so that it may lie where nobody can write.
    written = (run / "history.csv").stat().st_ino
    main(command(data, cache, run, "--resume")[2:])
    assert (run / "history.csv").stat().st_ino == written


@pytest.mark.thorough
def test_two_processes_follow_one_processs_curve(data: Path, cache: Path, tmp_path: Path) -> None:
    flags = tiny_flags(epochs=4, loss__adversarial=0.1, loss__l1=0.5, augment="strong")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    main(command(data, cache, alone, *flags)[2:])
    # Without `--master-addr` it looks up `localhost`, which a minimal system does not know.
    address = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    launcher = ["-m", "torch.distributed.run", *address, "--nproc-per-node", "2"]
    finished = subprocess.run(
        [sys.executable, *launcher, *command(data, cache, shared, *flags)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("best selection Jaccard") == 1  # one process speaks for all
    for one, two in zip(history(alone), history(shared), strict=True):
        assert one.keys() == two.keys()
        for name in ("loss", "bce", "l1", "jaccard_loss", "discriminator", "adversarial"):
            assert two[name] == pytest.approx(one[name], rel=2e-3), (one["epoch"], name)
    a, b = state(alone)["network"], state(shared)["network"]
    # running statistics too: BN sees the global batch
    for name in ("down2.norm.running_mean", "down2.norm.running_var", "head.weight"):
        torch.testing.assert_close(a[name], b[name], rtol=5e-3, atol=5e-3)


def test_batches_must_divide_by_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="batch_size 4 does not divide by 3 processes"):
        trainer(tmp_path, tiny_config())


# What ends a run early


@pytest.mark.parametrize(
    ("rate", "batch_size", "step"),
    [
        ("1e30", 4, 1),  # the loss after the first update
        ("1e39", 8, 0),  # one step an epoch: its loss is a number still, its weights are none
    ],
)
def test_nan_stops_with_step_and_config_named(
    data: Path,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rate: str,
    batch_size: int,
    step: int,
) -> None:
    flags = tiny_flags(learning_rate=rate, batch_size=batch_size)
    with pytest.raises(SystemExit) as exit_:
        main(command(data, cache, tmp_path, *flags)[2:])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert f"the loss is not a number at step {step} (epoch 1)" in error
    assert str(tmp_path / "last.pt") in error and str(tmp_path / "config.yaml") in error
    assert "learning_rate" in error
    kept = state(tmp_path)
    assert kept["progress"]["epoch"] == 0
    assert all(t.isfinite().all() for t in _tensors(kept["network"]))


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, tiny_config())
    checkpoint.save(run)
    before = (tmp_path / "last.pt").read_bytes()

    def full(_: object, path: Path) -> None:
        path.write_bytes(before[:100])
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos\nframe #0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"last\.pt cannot be written and stays as it was: \["):
        checkpoint.save(run)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_run_ends_at_early_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(epochs=9, early_stop=2)
    scores = iter([0.5, 0.6, 0.55, 0.6, 0.9])
    run = trainer(tmp_path, config)
    monkeypatch.setattr(loop, "validate", lambda _: {"selection": next(scores)})
    progress = loop.run(run)
    assert (progress.epoch, progress.best_epoch, progress.best) == (4, 2, 0.6)
    again = trainer(tmp_path, config)
    checkpoint.load(again)
    assert loop.run(again).epoch == 4


def test_validation_can_be_rarer(tmp_path: Path) -> None:
    loop.run(trainer(tmp_path, tiny_config(epochs=5, validate_every=2)))
    assert [row["epoch"] for row in history(tmp_path) if "selection" in row] == [2, 4, 5]


# The steps themselves


def step_through(run: Trainer, steps: int) -> list[dict[str, Tensor]]:
    run.network.train()
    terms = []
    for _ in range(steps):
        terms.append(run.step(torch.arange(run.config.batch_size)))
        run.progress.step += 1
    return terms


def test_the_averaged_weights_are_the_exponential_average(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_config(ema_decay=0.3, epochs=9))
    expected = {k: v.clone() for k, v in run.network.state_dict().items()}
    for step in range(5):
        step_through(run, 1)
        decay = min(0.3, (1 + step) / (10 + step))
        for name, value in run.network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in run.average.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name])
    assert not run.average.training


def test_without_averaging_the_weights_themselves_are_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_config(ema_decay=0.0))
    step_through(run, 2)
    for name, value in run.network.state_dict().items():
        assert torch.equal(value, run.average.state_dict()[name]) or "tracked" in name


def test_gradients_are_clipped(tmp_path: Path) -> None:
    def norm(clip: float) -> float:
        run = trainer(tmp_path, tiny_config(clip_norm=clip))
        step_through(run, 1)
        gradients = [p.grad for p in run.network.parameters() if p.grad is not None]
        return float(torch.stack([g.norm() for g in gradients]).norm())

    free = norm(0)
    assert free > 0.02
    assert norm(0.01) == pytest.approx(0.01, rel=1e-3)
    assert norm(10 * free) == pytest.approx(free, rel=1e-3)


def test_same_seed_same_run_other_seed_other_run(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> dict[str, Tensor]:
        config = tiny_config(deterministic=True, seed=seed, epochs=1, augment="strong")
        run = trainer(tmp_path / name, config)
        assert torch.are_deterministic_algorithms_enabled()
        loop.run(run)
        return dict(run.network.state_dict())

    a, b, c = weights("a", 1), weights("b", 1), weights("c", 2)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_half_resolution_attention_wakes_up_and_learns(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_config(epochs=4, pam_wake=0.5))  # 8 steps, 4 of them asleep
    assert isinstance(run.network, Generator)
    attention = run.network.half_resolution_attention()[0]
    modes, etas = [], []
    for _ in range(8):
        step_through(run, 1)
        modes.append(attention.mode)
        etas.append(float(attention.eta.detach()))
    assert modes == ["asleep"] * 4 + ["fused"] * 4
    assert etas[:4] == [0] * 4 and etas[-1] != 0
    deep = run.network.bridge_pam
    assert deep is not None and deep.mode == "fused"  # cheap at its size: never asleep


def test_rate_warms_up_and_ends_at_a_hundredth(tmp_path: Path) -> None:
    config = tiny_config(epochs=50, warmup=0.1, learning_rate=1.0)
    run = trainer(tmp_path, config)  # 100 steps
    rates = [run.rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[55] == pytest.approx(0.01 + 0.99 / 2)
    assert rates[100] == pytest.approx(0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    constant = trainer(tmp_path, dataclasses.replace(config, schedule="constant"))
    assert {constant.rate(step) for step in range(100)} == {1.0}


def test_bf16_stays_near_fp32(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        run = trainer(tmp_path, tiny_config(precision=precision, pam_wake=0.0))
        losses[precision] = [float(t["loss"]) for t in step_through(run, 3)]
        assert all(p.dtype == torch.float32 for p in run.network.parameters())
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_a_step(tmp_path: Path, name: str) -> None:
    preset = PRESETS[name]
    config = dataclasses.replace(
        preset,
        size=32,
        batch_size=2,
        epochs=1,
        generator=dataclasses.replace(preset.generator, **GENERATOR),
        discriminator=dataclasses.replace(preset.discriminator, width=4),
    )
    run = trainer(tmp_path, config, images=4)
    before = {k: v.clone() for k, v in run.network.named_parameters()}
    (terms,) = step_through(run, 1)
    assert all(value.isfinite() for value in terms.values())
    weights = {
        "adversarial": config.loss.adversarial,
        "l1": config.loss.l1,
        "jaccard_loss": config.loss.jaccard,
        "bce": config.loss.bce,
    }
    assert terms.keys() - {"loss", "discriminator"} == {k for k, v in weights.items() if v}
    expected = sum(weights[k] * float(v) for k, v in terms.items() if k in weights)
    assert float(terms["loss"]) == pytest.approx(expected, rel=1e-5)
    moved = [k for k, v in run.network.named_parameters() if not torch.equal(v, before[k])]
    assert "head.weight" in moved


def test_the_adversary_learns_in_turn(tmp_path: Path) -> None:
    """Section 4's alternation: D from masks of both kinds, then G from D's verdict alone."""
    loss = LossConfig(adversarial=1.0, jaccard=0.0, bce=0.0)
    config = tiny_config(loss=loss, learning_rate=1e-2, schedule="constant", clip_norm=0.0)
    run = trainer(tmp_path, config)
    generator = {k: v.clone() for k, v in run.network.named_parameters()}
    discriminator = {k: v.clone() for k, v in run.discriminator.named_parameters()}
    terms = step_through(run, 12)
    assert any(not torch.equal(v, generator[k]) for k, v in run.network.named_parameters())
    assert any(
        not torch.equal(v, discriminator[k]) for k, v in run.discriminator.named_parameters()
    )
    assert float(terms[-1]["discriminator"]) < float(terms[0]["discriminator"])
    assert all(p.requires_grad for p in run.discriminator.parameters())


def test_teachers_train_too(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_config(network="teacher", batch_size=2), images=2)
    assert isinstance(run.network, Teacher)
    first, *_, last = step_through(run, 4)
    assert float(last["loss"]) < float(first["loss"])


def test_validation_is_the_mean_over_images(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_config(epochs=4), validation=3, holdout=5)
    loop.run(run)
    row, scores = loop.validate(run), {}
    for name, pixels in run.selections.items():
        with torch.inference_mode():
            found = run.average(torch.from_numpy(pixels.images).float() / 255) > 0
        truth = torch.from_numpy(pixels.masks) > 127
        scores[name] = [
            float((f & t).sum() / (f | t).sum()) for f, t in zip(found, truth, strict=True)
        ]
        assert row[f"{name}_jaccard"] == pytest.approx(sum(scores[name]) / len(scores[name]))
        counted = [s if s >= 0.65 else 0 for s in scores[name]]
        assert row[f"{name}_threshold_jaccard"] == pytest.approx(sum(counted) / len(counted))
    pooled = scores["validation"] + scores["holdout"]
    assert row["selection"] == pytest.approx(sum(pooled) / 8)


def test_folds_are_held_out_beside_validation(data: Path, cache: Path, tmp_path: Path) -> None:
    flags = tiny_flags(epochs=1, data__folds=3, data__fold=1, batch_size=2)
    main(command(data, cache, tmp_path, *flags)[2:])
    assert {"validation_jaccard", "holdout_jaccard"} <= history(tmp_path)[0].keys()
    assert 2 <= len(state(tmp_path)["ids"]) < 10


def test_fine_tuning_starts_from_the_given_weights(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = tiny_config()
    given = Generator(config.generator)
    file = tmp_path / "given.safetensors"
    save_generator(given, file)
    run = trainer(tmp_path, dataclasses.replace(config, init=str(file)))
    for network in (run.network, run.average):
        assert all(torch.equal(v, given.state_dict()[k]) for k, v in network.state_dict().items())
    save_file({"other": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match=r"init: .*given\.safetensors does not fit this network"):
        trainer(tmp_path, dataclasses.replace(config, init=str(file)))


def test_sides_that_do_not_divide_256(data: Path, cache: Path, tmp_path: Path) -> None:
    config = tiny_config(size=96)
    pixels, selections, origin = prepare(config, data, cache)
    assert pixels.images.shape[1:] == (3, 288, 288) and origin == "10 images of isic2017"
    run = Trainer(config, tmp_path, pixels, selections, origin)
    assert step_through(run, 1)[0]["loss"].isfinite()
    assert loop.validate(run)["selection"] >= 0
