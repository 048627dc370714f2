"""Soft targets come from runs that did not see the image, and are learnt from.

They are computed once (`model.distill`), or at every step for the view that the student gets
(`model.teachers`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import distill, loop, train
from model.checkpoint import load_run, split_again
from model.config import ConfigError, DataConfig, LossConfig
from model.data import find_samples, load_pixels, select
from model.distill import distil, predict
from model.generator import Generator
from model.progress import RunLog
from model.splits import STORED_SIZE, prepare
from model.teachers import Teachers, attach, read_targets, read_teachers
from model.trainer import Trainer
from tests.support.tiny import changed_checkpoint, tiny_config, tiny_flags, write_isic2017


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, and two finished runs `t0` and `t1` that held out one fold each."""
    folder = tmp_path_factory.mktemp("distil")
    write_isic2017(folder / "data", training=9, validation=2)
    for fold in (0, 1):
        flags = tiny_flags(epochs=1, batch_size=2, data__folds=2, data__fold=fold, seed=fold)
        run(folder, f"t{fold}", *flags)
    return folder


def run(folder: Path, name: str, *flags: str) -> None:
    where = ["--data", str(folder / "data"), "--cache", str(folder / "cache")]
    train.main([*where, "--out", str(folder / name), *flags])


def test_targets_are_held_out_predictions_and_are_learnt_from(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "targets"  # numpy would add a suffix
    runs = [folder / "t0", folder / "t1"]
    where = ["--data", str(folder / "data"), "--cache", str(folder / "cache")]
    distill.main([*where, "--runs", *map(str, runs), "--out", str(out)])
    printed = capsys.readouterr().err
    with pytest.raises(SystemExit):
        distill.main([*where, "--runs", *map(str, runs), "--out", str(out / "below-a-file")])
    assert "error: [Errno" in capsys.readouterr().err
    assert "held-out images, Jaccard 0." in printed and "ensemble, held out: Jaccard 0." in printed

    samples = find_samples(folder / "data")
    training = select(samples, "training")
    with np.load(out) as stored:
        assert stored["ids"].tolist() == [s.id for s in training]
        assert stored["seen"].tolist() == stored["ids"].tolist()
        found = stored["probability"]
    assert found.shape == (9, 128, 128) and found.dtype == np.uint8
    pixels = load_pixels(training, STORED_SIZE)
    judged: list[str] = []
    for folder_of_run in runs:
        judge = load_run(folder_of_run, torch.device("cpu"))
        kept, held = split_again(judge, samples, folder / "cache")
        assert judge.ids == {s.id for s in kept}
        judged += [s.id for s in held["holdout"]]
        rows = [pixels.ids.index(s.id) for s in held["holdout"]]
        assert not {s.id for s in kept} & {s.id for s in held["holdout"]}
        images = torch.from_numpy(pixels.images[rows])
        expected = predict(judge.network, images, 32, 128).numpy() * 255
        # by way of 256 pixels and bytes
        assert np.abs(found[rows] - expected).max() < 2
    assert sorted(judged) == sorted(pixels.ids)

    flags = tiny_flags(epochs=1, data__teacher=out, loss__teacher=0.5)
    run(folder, "student", *flags)
    assert (folder / "student" / "best.safetensors").is_file()
    # the teachers have seen what such a student holds out
    with pytest.raises(SystemExit):
        run(folder, "other", *flags, "--set", "data.folds=2")
    assert "targets was trained on ISIC_" in (error := capsys.readouterr().err)
    assert "which this run holds out: leave data.folds out" in error
    # an image that the teacher has not judged
    with np.load(out) as stored:
        parts = {"ids": stored["ids"][1:], "probability": stored["probability"][1:]}
    with out.open("wb") as file:
        np.savez(file, **parts)
    with pytest.raises(SystemExit):
        run(folder, "other", *flags)
    assert "lacks ISIC_0000000; run model.distill on this data" in capsys.readouterr().err
    run(folder, "student", "--resume")  # finished: its teacher is not needed any more


@pytest.mark.parametrize("content", [b"", b"torn", b"PK\x03\x04torn", None])
def test_other_files_hold_no_targets(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "other.npz"
    if content is None:
        with file.open("wb") as opened:
            np.save(opened, np.zeros(3))
    else:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"other\.npz was not written by model\.distill"):
        read_targets(file, (), (), 8)


def test_the_target_is_a_mixture_of_mask_and_teacher(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no augmentation a batch's target is (1 − share) · mask + share · teacher."""
    file = folder / "flat.npz"
    ids = [s.id for s in select(find_samples(folder / "data"), "training")]
    np.savez(file, ids=np.array(ids), probability=np.full((len(ids), 128, 128), 51, np.uint8))
    config = tiny_config(
        augment="none",
        loss=LossConfig(teacher=0.25),
        data=DataConfig(teacher=str(file)),
        batch_size=9,
    )
    pixels, selections, _ = prepare(config, folder / "data", folder / "cache")
    trainer = Trainer(config, folder, pixels, selections)
    attach(trainer)
    seen: dict[str, torch.Tensor] = {}

    def update(
        x: torch.Tensor, truth: torch.Tensor, target: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        seen.update(truth=truth, target=target)
        return {}

    monkeypatch.setattr(trainer, "update", update)
    trainer.step(torch.arange(9))
    torch.testing.assert_close(seen["target"], 0.75 * seen["truth"] + 0.25 * 0.2)
    # another file of that name
    np.savez(file, ids=np.array(ids), probability=np.full((len(ids), 128, 128), 52, np.uint8))
    with pytest.raises(ConfigError, match=r"data\.teacher: .*flat\.npz has changed since this run"):
        attach(trainer)
    trainer.taught_by = None  # a run that did not keep it
    attach(trainer)


def test_predictions_average_the_squares_symmetries() -> None:
    torch.manual_seed(0)
    network = Generator(tiny_config().generator).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    found = predict(network, images, 32, 32)
    assert found.shape == (2, 32, 32)
    for turns in (1, 2, 3):
        turned = predict(network, torch.rot90(images, turns, (2, 3)), 32, 32)
        torch.testing.assert_close(turned, torch.rot90(found, turns, (1, 2)))
    torch.testing.assert_close(predict(network, images.flip(3), 32, 32), found.flip(2))


def test_runs_that_cannot_judge_are_named(folder: Path) -> None:
    def refused(*runs: str) -> pytest.ExceptionInfo[ConfigError]:
        paths = [folder / name for name in runs]
        with pytest.raises(ConfigError) as error:
            distil(folder / "data", paths, folder / "none.npz", folder / "cache")
        assert not (folder / "none.npz").exists()
        return error

    refused("t0").match("ISIC_.* was held out by no run: train every fold")
    refused("nowhere").match("nowhere holds no run of model.train")
    run(folder, "whole", *tiny_flags(epochs=1))
    refused("whole").match("whole held nothing out: train it with data.folds")
    with changed_checkpoint(folder / "t1", lambda state: state["progress"].update(epoch=0)):
        refused("t0", "t1").match("t1 is not finished: resume it first")
    # The data has changed since: what t1 was trained on is held out by its settings now.
    with changed_checkpoint(folder / "t1", lambda state: state["config"]["data"].update(fold=0)):
        refused("t1").match("t1 was trained on ISIC_.*, which this data holds out: the data or dat")
    last = folder / "t1" / "last.pt"
    complete = last.read_bytes()
    last.write_bytes(complete[: len(complete) // 2])
    refused("t0", "t1").match("t1 holds no readable run of model.train: .*")
    others: list[object] = [[1], torch.zeros(2), 7, {"progress": {}}]
    for other in others:
        torch.save(other, last)
        refused("t1").match("t1 holds no readable run of model.train: .*")
    last.write_bytes(complete)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state["progress"].update(other=1), "no readable run.*other"),
        (lambda state: state["progress"].pop("epoch"), "no readable run.*its progress lacks epoch"),
        (lambda state: state.pop("ids"), "no readable run.*it lacks 'ids'"),
        (lambda state: state["config"].update(other=1), "no readable run.*key 'other' does not ex"),
        (lambda state: state["config"].update(network="teacher"), "weights do not fit its config"),
        (lambda state: state["average"]["head.weight"].fill_(np.nan), "weights are not finite"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_its_folder(
    folder: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    damaged = changed_checkpoint(folder / "t1", change)
    with damaged, pytest.raises(ConfigError, match=f"t1.*{says}"):
        load_run(folder / "t1", torch.device("cpu"))


def test_a_run_is_what_its_checkpoint_says(folder: Path) -> None:
    settings = folder / "t1" / "config.yaml"
    text = settings.read_text()
    settings.write_text(text.replace("fold: 1", "fold: 0"))
    assert load_run(folder / "t1", torch.device("cpu")).config.data.fold == 1
    settings.write_text(text)


def test_masks_are_as_uniform_as_a_run_took_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def decode(*args: Any) -> None:
        taken.append(args[-1])
        raise ConfigError("enough")

    monkeypatch.setattr(distill, "load_pixels", decode)
    runs = [folder / "t0", folder / "t1"]
    with pytest.raises(ConfigError, match="enough"):
        distil(folder / "data", runs, folder / "none.npz", folder / "cache")
    uniform = {"allow_uniform_masks": True}
    allowed = changed_checkpoint(runs[1], lambda state: state["config"]["data"].update(uniform))
    with allowed, pytest.raises(ConfigError, match="enough"):
        distil(folder / "data", runs, folder / "none.npz", folder / "cache")
    assert taken == [False, True]


# Teachers that are asked at every step


def teachers(folder: Path, ids: tuple[str, ...], *runs: str) -> Teachers:
    paths = [str(folder / name) for name in runs]
    return read_teachers(paths, ids, (), torch.device("cpu"))


def test_a_view_is_judged_by_the_teacher_that_held_its_image_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target is (1 − share) · mask + share · teacher, of the very view that is learnt from."""
    config = tiny_config(
        loss=LossConfig(teacher=0.25),
        data=DataConfig(teachers=(str(folder / "t0"), str(folder / "t1"))),
        batch_size=9,
    )
    pixels, selections, _ = prepare(config, folder / "data", folder / "cache")
    trainer = Trainer(config, folder, pixels, selections)
    trainer.teach = teachers(folder, pixels.ids, "t0", "t1")
    seen: list[torch.Tensor] = []

    def update(*given: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.extend(given)
        return {}

    monkeypatch.setattr(trainer, "update", update)
    shuffled = torch.tensor([4, 2, 8, 0, 1, 7, 3, 6, 5])
    trainer.step(shuffled)
    views, truth, target = seen
    samples = find_samples(folder / "data")
    judged = 0
    for name in ("t0", "t1"):
        teacher = load_run(folder / name, torch.device("cpu"))
        held = {s.id for s in split_again(teacher, samples, folder / "cache")[1]["holdout"]}
        rows = [i for i, image in enumerate(shuffled) if pixels.ids[image] in held]
        with torch.no_grad():
            told = teacher.network(views[rows]).sigmoid()
        torch.testing.assert_close(target[rows], 0.75 * truth[rows] + 0.25 * told)
        judged += len(rows)
    assert judged == 9


def test_an_image_that_no_teacher_held_out_is_judged_by_all(folder: Path) -> None:
    pixels = prepare(tiny_config(), folder / "data", folder / "cache")[0]
    alone = teachers(folder, pixels.ids, "t0")
    assert alone.judges.all()
    both = teachers(folder, pixels.ids, "t0", "t0")
    views = torch.rand(9, 3, 64, 64)  # twice the side that the teacher knows
    found = both(views, torch.arange(9))
    assert found.shape == (9, 1, 64, 64)
    torch.testing.assert_close(found, alone(views, torch.arange(9)))


def test_teachers_are_asked_by_what_they_were_trained_on(folder: Path) -> None:
    """Whatever their settings say of data that has moved, or of folds."""
    t0 = load_run(folder / "t0", torch.device("cpu"))
    ids = sorted(t0.ids | {"another"})
    elsewhere = {"folds": 0, "groups": "/nowhere.csv", "allow_uniform_masks": True}
    with changed_checkpoint(folder / "t0", lambda state: state["config"]["data"].update(elsewhere)):
        both = teachers(folder, tuple(ids), "t0", "t1")
    knows = [name in t0.ids for name in ids]
    assert both.judges[0].tolist() == [not known for known in knows]


def test_a_run_with_teachers_goes_on_to_the_same_bits(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fold = {"data__folds": 2, "data__fold": 0}
    monkeypatch.chdir(folder)
    flags = tiny_flags(loss__teacher=0.5, data__teachers="[t0]", **fold)
    run(folder, "at-once", *flags)
    whole_epoch = loop._epoch

    def killed(trainer: Trainer, log: RunLog | None) -> dict[str, float]:
        if trainer.progress.epoch:
            raise KeyboardInterrupt
        return whole_epoch(trainer, log)

    monkeypatch.setattr(loop, "_epoch", killed)
    with pytest.raises(SystemExit) as ended:
        run(folder, "in-two", *flags)
    assert ended.value.code == 130
    assert "interrupted; --resume goes on with the run\n" in capsys.readouterr().err
    monkeypatch.setattr(loop, "_epoch", whole_epoch)
    other = changed_checkpoint(folder / "t0", lambda state: state["average"]["head.bias"].add_(1))
    capsys.readouterr()
    with other, pytest.raises(SystemExit):
        run(folder, "in-two", "--resume")
    assert "t0/last.pt has changed since this run began: put the" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)  # its teachers were named from elsewhere
    run(folder, "in-two", "--resume")
    with changed_checkpoint(folder / "t0", lambda state: state.clear()):
        run(folder, "in-two", "--resume")  # finished: its teachers are not needed any more
    run(folder, "alone", *tiny_flags(**fold))

    def weights(name: str) -> dict[str, torch.Tensor]:
        return load_run(folder / name, torch.device("cpu")).network.state_dict()

    taught, alone = weights("at-once"), weights("alone")
    torch.testing.assert_close(weights("in-two"), taught, rtol=0, atol=0)
    assert any(not torch.equal(value, alone[name]) for name, value in taught.items())


def test_teachers_that_cannot_teach_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*flags: str) -> str:
        with pytest.raises(SystemExit):
            run(folder, "none", *tiny_flags(epochs=1), "--set", "loss.teacher=0.5", *flags)
        return capsys.readouterr().err

    t0, nowhere = (f"data.teachers=[{folder / name}]" for name in ("t0", "nowhere"))
    assert "nowhere holds no run of model.train" in refused("--set", nowhere)
    # t0 held out fold 0, and was trained on fold 1
    leaking = refused("--set", t0, "--set", "data.folds=2", "--set", "data.fold=1")
    assert "t0 was trained on ISIC_" in leaking and "which this run holds out" in leaking
    both = refused("--set", t0, "--set", "data.teacher=x.npz")
    assert "data.teacher and data.teachers both give the target" in both
