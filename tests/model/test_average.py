"""The mean of runs' weights: what it is, what it says of itself, and what has none."""

from pathlib import Path

import pytest
import torch

from model import average, train
from model.average import mean_network
from model.checkpoint import load_run
from model.config import GeneratorConfig
from model.generator import Generator, load_generator, load_metadata
from tests.support.tiny import (
    GENERATOR,
    changed_checkpoint,
    tiny_config,
    tiny_flags,
    write_isic2017,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, and finished runs: `a`, then `b` and `c` that start from its weights."""
    folder = tmp_path_factory.mktemp("average")
    write_isic2017(folder / "data", training=9, validation=2)
    run(folder, "a", *tiny_flags(epochs=1))
    for seed, name in ((1, "b"), (2, "c")):
        init = folder / "a" / "best.safetensors"
        run(folder, name, *tiny_flags(epochs=2, init=init, seed=seed, augment="settle"))
    return folder


def run(folder: Path, name: str, *flags: str) -> None:
    where = ["--data", str(folder / "data"), "--cache", str(folder / "cache")]
    train.main([*where, "--out", str(folder / name), *flags])


def mean(folder: Path, *names: str) -> Path:
    out = folder / f"{'-'.join(names)}.safetensors"
    where = ["--data", str(folder / "data"), "--cache", str(folder / "cache")]
    average.main([*where, "--runs", *(str(folder / name) for name in names), "--out", str(out)])
    return out


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *names: str) -> str:
    with pytest.raises(SystemExit) as ended:
        mean(folder, *names)
    assert ended.value.code == 2
    assert not (folder / f"{'-'.join(names)}.safetensors").exists()
    return capsys.readouterr().err


def test_the_mean_of_two_runs_is_written_with_its_scores(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = load_generator(mean(folder, "b", "c")).state_dict()
    parts = [load_run(folder / name, CPU).network.state_dict() for name in ("b", "c")]
    different = 0
    for name, value in found.items():
        expected = (parts[0][name].double() + parts[1][name].double()) / 2
        torch.testing.assert_close(value, expected.to(value.dtype))
        different += not torch.equal(parts[0][name], parts[1][name])
    assert different > 10
    said = load_metadata(folder / "b-c.safetensors")
    printed = capsys.readouterr().out
    assert f"validation_jaccard {said['validation_jaccard']}" in printed
    assert said["training_data"] == "9 images of isic2017" and said["threshold"] == "0.5"


def test_average_of_one_run_is_its_last_weights_with_its_score(folder: Path) -> None:
    run = load_run(folder / "b", CPU)
    for name, value in load_generator(mean(folder, "b")).state_dict().items():
        assert torch.equal(value, run.network.state_dict()[name])
    state = torch.load(folder / "b" / "last.pt", weights_only=True)
    last = state["progress"]["history"][-1]
    said = float(load_metadata(folder / "b.safetensors")["validation_jaccard"])
    assert said == pytest.approx(last["validation_jaccard"], abs=1e-4)
    assert run.config.epochs == last["epoch"] == 2


def test_runs_without_a_mean_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere holds no run of model.train" in refusal(folder, capsys, "b", "nowhere")
    run(folder, "folds", *tiny_flags(epochs=1, batch_size=2, data__folds=3))
    assert "folds has another input size or other folds" in refusal(folder, capsys, "b", "folds")
    with changed_checkpoint(folder / "c", lambda state: state.update(ids=state["ids"][1:])):
        assert "b was trained on other photos than" in refusal(folder, capsys, "c", "b")
    with changed_checkpoint(folder / "b", lambda state: state.update(ids=("ISIC_0000500",))):
        assert "b was trained on ISIC_0000500, which this da" in refusal(folder, capsys, "b", "b")
    with pytest.raises(SystemExit):
        mean(folder / "b" / "last.pt", "nothing")
    assert "error: " in capsys.readouterr().err
    wider = {"generator__widths": "[4,6,8,12]"}
    run(folder, "wide", *tiny_flags(epochs=1, **wider))
    assert "different architectures: they have no mean" in refusal(folder, capsys, "b", "wide")
    run(folder, "teacher", *tiny_flags(epochs=1, network="teacher"))
    assert "trained a teacher: only slsnet's weights are averaged" in refusal(
        folder, capsys, "teacher"
    )


def test_the_mean_of_two_networks_is_not_the_mean_of_their_answers() -> None:
    torch.manual_seed(0)
    config = GeneratorConfig(**GENERATOR)
    networks = [Generator(config).eval() for _ in range(2)]
    both = mean_network(networks)
    assert not both.training
    x = torch.rand(1, 3, tiny_config().size, tiny_config().size)
    with torch.inference_mode():
        answers = [network(x) for network in networks]
        assert (both(x) - (answers[0] + answers[1]) / 2).abs().max() > 1e-4
