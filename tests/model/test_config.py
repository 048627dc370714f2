"""Presets, files and flags; and what a wrong key or value is answered with."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from model.config import (
    PRESETS,
    ConfigError,
    DataConfig,
    GeneratorConfig,
    TrainConfig,
    config_dict,
    load_config,
    parse_config,
    with_absolute_paths,
)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_file(name: str) -> None:
    text = yaml.safe_dump(config_dict(PRESETS[name]))
    again = parse_config(yaml.safe_load(text))
    assert again == PRESETS[name] and hash(again) == hash(PRESETS[name])


def test_papers_protocol() -> None:
    paper = PRESETS["paper"]
    assert (paper.optimizer, paper.betas, paper.learning_rate) == ("adam", (0.5, 0.999), 2e-4)
    assert (paper.batch_size, paper.size, paper.augment) == (8, 128, "paper")
    assert (paper.loss.adversarial, paper.loss.l1, paper.loss.jaccard) == (1, 0.1, 0.5)
    assert paper.loss.bce == 0 and paper.generator.decoder_dropout > 0  # z


def test_each_ablation_changes_only_what_its_name_says() -> None:
    def changes(name: str) -> dict[str, object]:
        paper, other = PRESETS["paper"], PRESETS[name]
        found: dict[str, object] = {}
        for part in ("generator", "loss"):
            for field in dataclasses.fields(getattr(paper, part)):
                value = getattr(getattr(other, part), field.name)
                if value != getattr(getattr(paper, part), field.name):
                    found[field.name] = value
        if other.size != paper.size:
            found["size"] = other.size
        same = {"generator": paper.generator, "loss": paper.loss, "size": paper.size}
        assert dataclasses.replace(other, **same) == paper  # type: ignore[arg-type]
        return found

    assert changes("base") == {"multiscale": False, "pam": False, "cam": False}
    assert changes("base+pam") == {"multiscale": False, "cam": False}
    assert changes("base+cam") == {"multiscale": False, "pam": False}
    assert changes("no-multiscale") == {"multiscale": False}
    assert changes("input-64") == {"size": 64} and changes("input-256") == {"size": 256}
    assert changes("loss-bce") == {"l1": 0, "jaccard": 0}
    assert changes("loss-bce+l1") == {"jaccard": 0}
    assert changes("loss-bce+jaccard") == {"l1": 0}
    assert changes("cam-danet") == {"cam_form": "danet"}


def test_file_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 7\nloss:\n  l1: 0.25\ngenerator: {widths: [8, 16, 32, 64]}\n")
    config = load_config("paper", file, {"epochs": 9, "loss.jaccard": 2, "learning_rate": "1e-3"})
    assert config.epochs == 9 and config.learning_rate == 1e-3
    assert (config.loss.adversarial, config.loss.l1, config.loss.jaccard) == (1, 0.25, 2)
    assert config.generator.widths == (8, 16, 32, 64) and config.generator.cam_form == "eq1"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("epoch", 3, "config key 'epoch' does not exist; did you mean epochs"),
        ("loss.jacard", 1, "config key 'loss.jacard' does not exist; did you mean loss.jaccard"),
        ("generator.jaccard", 1, r"'generator.jaccard' does not exist; did you mean loss.jaccard"),
        ("zzz", 1, "config key 'zzz' does not exist; keys: generator.multiscale, "),
        ("epochs", "many", "config key 'epochs'"),
        ("epochs", 0, "epochs must be at least 1, not 0"),
        ("size", 100, "size must be a multiple of 32, not 100"),
        ("optimizer", "sgd", "config key 'optimizer'.*'adam' or 'adamw'"),
        ("generator.widths", [16, 32], "config key 'generator.widths.2'"),
        ("generator.widths", [16, 16, 32, 64], "config key 'generator': widths must grow"),
        ("loss.teacher", 0.5, r"loss.teacher needs data.teachers, .*, or data.teacher, a file"),
        ("data", {"teacher": "x.npz", "teachers": ["runs/a"]}, "both give the target: choose one"),
        ("data", {"folds": 5, "fold": 5}, "config key 'data': fold 5 is none of 0 to 4"),
        ("loss", 3, "config key 'loss'"),
        ("loss", {"jaccard": 0, "bce": 0}, "config key 'loss': every term has weight 0"),
        ("data.folds", 1, "config key 'data': folds 1 would leave nothing to train on: set 2"),
        ("data.teachers", "runs/a", r"'data.teachers': .* brackets: data.teachers=\[a, b\]"),
        ("seed", 10**20, "config key 'seed': Input should be less than 4294967296"),
        ("learning_rate", "nan", "config key 'learning_rate': Input should be a finite number"),
        ("learning_rate", 0, "config key 'learning_rate': Input should be greater than 0"),
        ("clip_norm", "inf", "config key 'clip_norm': Input should be a finite number"),
        ("generator.dilations", [2, 0], "config key 'generator.dilations.1'"),
    ],
)
def test_wrong_keys_and_values_are_named(key: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(overrides={key: value})


@pytest.mark.parametrize(
    ("keys", "inside", "outside"),
    [
        ("seed early_stop data.folds data.fold", 0, -1),
        ("generator.encoder_blocks generator.decoder_blocks", 0, -1),
        ("weight_decay clip_norm loss.l1 loss.bce loss.endpoint", 0, -0.1),
        ("loss.adversarial loss.critic loss.jaccard", 0, -0.1),
        ("warmup pam_wake", 1, 1.1),
        ("ema_decay generator.decoder_dropout", 0, 1),
        ("betas generator.encoder_dropout", [0, 0.9], [0, 1]),
        ("discriminator.width", 1, 0),
        ("generator.widths", [1, 2, 3, 4], [0, 2, 3, 4]),
    ],
)
def test_values_have_bounds(keys: str, inside: object, outside: object) -> None:
    for key in keys.split():
        load_config(overrides={key: inside})
        with pytest.raises(ConfigError, match=f"config key '{key}"):
            load_config(overrides={key: outside})
    with pytest.raises(ConfigError, match=r"config key 'loss\.teacher'"):
        load_config(overrides={"loss.teacher": 1.1, "data.teacher": "x.npz"})


def test_wrong_presets_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no preset 'papre'; presets: best, .*paper, base"):
        load_config("papre")
    with pytest.raises(ConfigError, match=r"none\.yaml is not a readable YAML file"):
        load_config(file=tmp_path / "none.yaml")
    file = tmp_path / "bad.yaml"
    file.write_text("a: [1,")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not a readable YAML file"):
        load_config(file=file)
    for unreadable in (b"init: \xff", b"init: 2024-13-45"):
        file.write_bytes(unreadable)
        with pytest.raises(ConfigError, match=r"bad\.yaml is not a readable YAML file"):
            load_config(file=file)
    file.write_text("- 1")
    with pytest.raises(ConfigError, match="must hold keys and values"):
        load_config(file=file)


def test_paths_can_be_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_absolute_paths(TrainConfig()) == TrainConfig()
    given = TrainConfig(init="w", data=DataConfig(groups="g.csv", teachers=("runs/a", "/b")))
    found = with_absolute_paths(given)
    assert (found.init, found.data.groups) == (f"{tmp_path}/w", f"{tmp_path}/g.csv")
    assert found.data.teachers == (f"{tmp_path}/runs/a", "/b")
    one = with_absolute_paths(TrainConfig(data=DataConfig(teacher="t.npz")))
    assert one.data.teacher == f"{tmp_path}/t.npz"


def test_configurations_are_values() -> None:
    assert PRESETS["best"] == load_config() and hash(TrainConfig()) == hash(parse_config({}))
    assert GeneratorConfig(widths=[1, 2, 3, 4]) == GeneratorConfig(widths=(1, 2, 3, 4))  # type: ignore[arg-type]
