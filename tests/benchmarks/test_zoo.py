"""The zoo's benchmark: what it measures, and its table and plots, from trainings of seconds."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks import zoo
from benchmarks.latency import machine
from benchmarks.zoo import macs, main
from benchmarks.zoo_report import Results, front, rows
from model.networks import new_network, save_network
from server.cores import available_cores
from tests.support import MODEL
from tests.support.lesions import encode_photo, lesion_photo
from tests.support.tiny import SETTINGS, write_isic2017

pytest.importorskip("model.zoo.vision", reason="needs requirements-zoo.txt")

# torch.onnx.export uses a function of torch's own that torch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def test_multiplications_are_those_of_the_layers() -> None:
    # 128 × 128 places, 3 × 3 of 3 channels into 8; then 8 into 1.
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))
    assert macs(network) == 128 * 128 * (9 * 3 * 8 + 8)


def test_the_front_has_what_nothing_is_better_than() -> None:
    points = [(5, 0.7), (1, 0.5), (3, 0.8), (3, 0.6), (9, 0.9), (10, 0.9), (2, 0.5)]
    assert front(points) == [(1, 0.5), (3, 0.8), (9, 0.9)]


@pytest.mark.slow
@pytest.mark.thorough
def test_a_network_is_trained_timed_served_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_isic2017(tmp_path / "data", training=8, validation=2)
    out = ["--out", str(tmp_path / "out"), "--networks", "enet"]
    settings = {key: value for key, value in SETTINGS.items() if key != "epochs"} | {"size": 128}
    tiny = [f"--set={key}={value}" for key, value in settings.items()]
    data = ["--data", str(tmp_path / "data"), "--cache", str(tmp_path / "cache")]
    training = ["train", *out, *data, "--epochs", "1", "--folds", "2", *tiny]
    main(training)
    weights = tmp_path / "out/runs/enet/seed-0/best.safetensors"
    before = weights.stat().st_mtime_ns
    main(training)
    assert weights.stat().st_mtime_ns == before

    # What was measured before is kept.
    costs_file = tmp_path / "out/costs.json"
    where = {"machine": machine().partition(", load")[0], "threads": available_cores()}
    costs_file.write_text(json.dumps({**where, "networks": {"lraspp": {}}}))
    # Without a folder it would draw photos of six megapixels, for half a minute.
    photos = ["--photos", str(tmp_path / "data/ISIC-2017_Validation_Data")]
    main(["costs", *out, *photos, "--rounds", "1", "--turns", "1"])
    costs = json.loads(costs_file.read_text())
    enet = costs["networks"]["enet"]
    assert enet["bytes"] == (tmp_path / "out/graphs/enet.onnx").stat().st_size
    assert min(enet["ms"].values()) > 0 and enet["photos_per_s"] > 0 and enet["memory_mb"] > 20

    # One that is not trained yet has its costs alone.
    costs["networks"]["lraspp"] |= enet | {"parameters": 3_218_138}
    costs_file.write_text(json.dumps(costs))
    main(["sides", *out, "--rounds", "1", "--sides", "64"])
    capsys.readouterr()
    main(["report", *out])
    table = (tmp_path / "out/table.md").read_text()
    assert capsys.readouterr().out == table + "\n"
    score = json.loads((weights.parent / "score.json").read_text())
    held_out = score["fold"]
    assert 0 < held_out["count"] < 8 and 0 <= held_out["jaccard"] <= 1
    _, networks, paper, sides = table.split("\n\n")
    first, second = networks.splitlines()[-2:]
    assert first.startswith(f"| `enet` | {score['jaccard']:.4f} ± ") and "epochs=1, " in table
    assert f" | {held_out['jaccard']:.4f} ± " in first and f" of {held_out['count']} | 1 |" in first
    assert second.startswith("| `lraspp` | – | – | – | 3.22 ")
    (of_paper,) = paper.splitlines()[2:]
    assert of_paper.startswith(f"| `enet` | 0.36 | 0.36 | 0.741 | {score['jaccard']:.3f} | – |")
    assert all(line.startswith("| `enet` | here, threads: ") for line in sides.splitlines()[2:])
    assert "<svg" in (tmp_path / "out/pareto.svg").read_text()


FACTS: dict[str, Any] = {
    "parameters": 1e6,
    "macs": 1e9,
    "bytes": 1e6,
    "memory_mb": 9,
    "ms": dict.fromkeys(("1x1", "1x8", "2x1", "2x8"), 5),
}
"""What `costs` says of a network that was not served."""


def measured(folder: Path, *names: str) -> Path:
    """The file of `costs`."""
    path = folder / "costs.json"
    networks = dict.fromkeys(names, FACTS)
    path.write_text(json.dumps({"machine": "one", "threads": 2, "networks": networks}))
    return path


def test_folds_are_one_set_of_photos_in_which_each_counts_once(tmp_path: Path) -> None:
    measured(tmp_path, "enet")
    for seed, (fold, count, value) in enumerate([(0, 30, 0.6), (1, 10, 0.8), (0, 30, 0.6)]):
        figures = {"jaccard": value, "jaccard_standard_error": 0.04, "threshold_jaccard": 0.5}
        score = figures | {"budget": "epochs=2", "fold": figures | {"fold": fold, "count": count}}
        folder = tmp_path / f"runs/enet/seed-{seed}"
        folder.mkdir(parents=True)
        (folder / "score.json").write_text(json.dumps(score))
    (row,) = rows(Results(tmp_path))[1]
    assert row.fold is not None
    assert row.fold == pytest.approx((0.65, 0.04 * math.hypot(0.75, 0.25), 40))


def test_costs_of_another_machine_are_not_mixed_with_those_of_this(tmp_path: Path) -> None:
    costs = {"machine": "another", "threads": 64, "networks": {}}
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    with pytest.raises(SystemExit, match=r"costs\.json was measured on another machine"):
        main(["costs", "--out", str(tmp_path), "--networks", "enet"])


def scored(folder: Path, name: str = "enet", **changes: Any) -> Path:
    """A finished training's figures."""
    figures = {"jaccard": 0.7, "jaccard_standard_error": 0.04, "threshold_jaccard": 0.5}
    path = folder / f"runs/{name}/seed-0/score.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(figures | {"budget": "epochs=2", "seed": 0} | changes))
    return path


@pytest.mark.parametrize(
    "flags", [["--epochs", "3"], ["--folds", "5"], ["--set", "size=32"]], ids=" ".join
)
def test_a_training_of_another_budget_is_not_taken_for_one_of_this(
    tmp_path: Path, flags: list[str]
) -> None:
    data = write_isic2017(tmp_path / "data", training=2, validation=1)
    scored(tmp_path / "out")
    asked = ["train", "--out", str(tmp_path / "out"), "--networks", "enet", "--data", str(data)]
    main(asked)
    with pytest.raises(SystemExit, match=r"seed-0/score\.json is of epochs=2: name another --out"):
        main([*asked, *flags])


def test_a_setting_with_an_argument_of_its_own_is_not_set_beside_it(tmp_path: Path) -> None:
    data = write_isic2017(tmp_path / "data", training=2, validation=1)
    asked = ["train", "--out", str(tmp_path / "out"), "--data", str(data)]
    with pytest.raises(SystemExit, match="--set epochs: use --epochs"):
        main([*asked, "--set", "epochs=3"])
    with pytest.raises(SystemExit, match="--set network: use --networks"):
        main([*asked, "--set", "network=unet"])
    assert not (tmp_path / "out").exists()


def test_costs_are_of_one_size_of_images_whatever_the_training_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Exported(Exception):
        pass

    def export(weights: Path, *_: Any, **__: Any) -> None:
        raise Exported(weights.relative_to(tmp_path))

    monkeypatch.setattr(zoo, "export", export)
    for seed, (side, used) in enumerate(
        [("32", "fresh/enet.safetensors"), ("128", "runs/enet/seed-1/best.safetensors")]
    ):
        weights = tmp_path / f"runs/enet/seed-{seed}/best.safetensors"
        weights.parent.mkdir(parents=True)
        save_network(new_network(zoo.configuration("enet")), weights, {"size": side})
        with pytest.raises(Exported, match=used):
            main(["costs", "--out", str(tmp_path), "--networks", "enet"])


def test_a_folder_without_photos_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "_exported", lambda *_: {})
    asked = ["costs", "--out", str(tmp_path), "--networks", "enet", "--photos", str(tmp_path)]
    with pytest.raises(SystemExit, match=f"error: {tmp_path} holds no photo"):
        main(asked)


def test_the_report_names_what_it_cannot_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(reason: str) -> None:
        with pytest.raises(SystemExit, match=reason):
            main(["report", "--out", str(tmp_path)])

    refused(r"costs\.json does not exist: measure it first")
    costs = tmp_path / "costs.json"
    costs.write_text('{"networks": {')
    refused(r"costs\.json cannot be read, remove it and measure anew: Expecting")
    costs.write_text('{"machine": "one"}')
    refused(r"costs\.json lacks 'networks'")
    costs.write_text("[]")
    refused(r"costs\.json lacks its figures")

    costs.write_text('{"networks": {"enet": {"parameters": 1}}}')
    refused(r"costs\.json lacks 'macs' of enet: measure it anew")
    measured(tmp_path, "enet")
    score = scored(tmp_path)
    scored(tmp_path, "unet")
    main(["report", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert re.search(r"^\| `enet` \| 0\.7000 .* \| – \|$", said, re.MULTILINE), "not served"
    assert "Trained, and left out until `costs` measures them: unet." in said
    score.write_text('{"jaccard": 0.7}')
    refused(r"enet/seed-0/score\.json lacks 'jaccard_standard_error'")


def test_trainings_of_several_budgets_are_not_in_one_table(tmp_path: Path) -> None:
    measured(tmp_path, "enet", "unet")
    scored(tmp_path)
    scored(tmp_path, "unet", budget="epochs=2, size=32")
    with pytest.raises(ValueError, match="several budgets: epochs=2; epochs=2, size=32"):
        rows(Results(tmp_path))


@pytest.mark.thorough
def test_a_network_that_is_too_slow_to_be_served_keeps_its_other_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any) -> Any:
        raise RuntimeError("the request waited longer than its deadline")

    def exported(results: Results, name: str) -> dict[str, Any]:
        results.graph(name).parent.mkdir()
        shutil.copy(MODEL, results.graph(name))
        return {key: FACTS[key] for key in ("parameters", "macs", "bytes")}

    monkeypatch.setattr(zoo, "send", refused)
    monkeypatch.setattr(zoo, "_exported", exported)
    (tmp_path / "photo.jpg").write_bytes(encode_photo(lesion_photo(3, 300, 200).pixels))
    flags = ["--photos", str(tmp_path), "--rounds", "1", "--turns", "1"]
    main(["costs", "--out", str(tmp_path), "--networks", "enet", *flags])
    assert "enet: the request waited longer" in capsys.readouterr().err
    facts = json.loads((tmp_path / "costs.json").read_text())["networks"]["enet"]
    assert facts["photos_per_s"] is None and min(facts["ms"].values()) > 0
