"""Networks of the zoo: each is what its paper says, learns, and keeps the contract of SLSNet.

Widths are small where the published network takes long. Parameters are counted at full width.
"""

import json
import math
import re
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import model.ablate
import model.evaluate
import model.export
import model.train
import trt_build.__main__
from common.onnx import onnx_runner
from common.stamp import check_digest, unstamped
from engines.tensorrt_api import find_tensorrt
from model import zoo
from model.config import ConfigError, LossConfig, load_config
from model.export import export
from model.generator import load_metadata
from model.networks import new_network, read_network, save_network
from model.trainer import Trainer
from model.zoo.segan import Critic
from server.http.app import create_app
from server.settings import Settings
from tests.support import ROOT
from tests.support.app import serve_app
from tests.support.lesions import encode_photo, lesion_photo
from tests.support.tiny import pixel_set, tiny_config, tiny_flags, write_isic2017
from tests.support.waiting import until

for package in ("model.zoo.vision", "segmentation_models_pytorch", "cv2"):
    pytest.importorskip(package, reason="needs requirements-zoo.txt")

# torch.onnx.export uses a function of torch's own that torch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

SMALL: dict[str, dict[str, Any]] = {
    "lraspp": {},
    "lite0-unet": {"width": 32, "pretrained": False},
    "enet": {"width": 8},
    "unet": {"width": 4},
    "segnet": {"width": 4},
    "fcn8s": {"width": 2},
    "egeunet": {},
    "segformer-b0": {"width": 16},
    "slsdeep": {"depth": 14, "width": 8},
    "segan": {"width": 2},
    "frcn": {"width": 1},
    "gan-fcn": {},
}
"""Options of each network for a test of seconds."""

PARAMETERS: list[tuple[str, dict[str, Any], int, float]] = [
    # Network, options, parameters, millions as published
    ("lraspp", {}, 3_218_138, 3.22),
    ("lite0-unet", {}, 5_198_161, 5.20),
    ("enet", {}, 359_136, 0.36),
    ("unet", {}, 12_127_481, 12.1),
    ("unet", {"width": 64}, 31_037_633, 31.0),
    ("segnet", {}, 11_507_521, 11.5),
    ("segnet", {"width": 64}, 29_443_585, 29.4),
    ("fcn8s", {}, 134_265_699, 134.3),
    ("egeunet", {}, 53_374, 0.053),
    ("segformer-b0", {}, 3_714_401, 3.71),
    ("slsdeep", {}, 46_582_337, 46.6),
    ("segan", {}, 156_235_264, 156.3),  # the authors' code, with norms that it does not use
    ("frcn", {}, 16_299_073, 16.3),
    ("gan-fcn", {}, 11_663_777, 11.7),  # of the substitute
]

every = pytest.mark.parametrize("name", zoo.networks())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[float]]]:
    """Weights after four steps on two images, and the loss of each step."""

    @cache
    def train(name: str) -> tuple[Path, list[float]]:
        folder = tmp_path_factory.mktemp(name)
        config = tiny_config(
            network=name, options=SMALL[name], size=128, batch_size=2, learning_rate=3e-4
        )
        selections = {"validation": pixel_set(2, 128, 700)}
        trainer = Trainer(config, folder, pixel_set(2, 128), selections, "drawn lesions")
        trainer.network.train()
        for module in trainer.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.5  # its statistics are those of the last steps
        losses = [float(trainer.step(torch.tensor([0, 1]))["loss"]) for _ in range(4)]
        for parameter, value in trainer.network.named_parameters():
            assert value.grad is not None, parameter
        save_network(trainer.network, folder / "w.safetensors", {"size": "128"})
        return folder / "w.safetensors", losses

    return train


@pytest.fixture(scope="module")
def exported(
    trained: Callable[[str], tuple[Path, list[float]]],
) -> Callable[[str], Path]:
    @cache
    def make(name: str) -> Path:
        weights = trained(name)[0]
        graph = weights.with_name(f"{name}.onnx")
        with warnings.catch_warnings():  # marks do not reach fixtures of a module
            warnings.simplefilter("ignore", FutureWarning)
            assert export(weights, graph, name=f"small-{name}", network=name) < 1e-4
        return graph

    return make


# What they are


def test_every_network_is_tried_and_counted() -> None:
    assert set(SMALL) == set(zoo.networks()) == {row[0] for row in PARAMETERS}


@pytest.mark.parametrize(("name", "options", "count", "published"), PARAMETERS)
def test_a_network_is_as_large_as_its_paper_says(
    name: str, options: dict[str, Any], count: int, published: float
) -> None:
    # Nothing has to be allocated for a large one. Constructors of some small ones read values.
    with torch.device("meta" if published > 15 else "cpu"):
        network = zoo.build(name, **options)
    assert sum(p.numel() for p in network.parameters()) == count
    assert count / 1e6 == pytest.approx(published, abs=0.005 if published < 10 else 0.1)


def test_the_documentation_lists_every_network_with_its_parameters() -> None:
    text = (ROOT / "docs/zoo.md").read_text().partition("## One table")[0]
    rows = re.findall(r"^\| `([\w-]+)` \|[^|]+\| ([\d.]+) \|", text, re.MULTILINE)
    counted = {name: f"{count / 1e6:.2f}" for name, options, count, _ in PARAMETERS if not options}
    assert dict(rows) == counted


@every
def test_its_file_names_source_licence_and_what_is_substituted(name: str) -> None:
    head = import_module(zoo.check(name).__module__).__doc__ or ""
    assert "Source" in head and ("arXiv:" in head or "doi:" in head)
    assert re.search(r"\((Apache-2\.0|MIT|BSD-3-Clause)\)", head)
    assert "Faithful" in head or "Substituted: all of it" in head
    assert "Substituted" in head or "Not to be had" in head


# They learn


@every
def test_a_step_moves_every_weight_and_steps_lower_the_loss(
    name: str, trained: Callable[[str], tuple[Path, list[float]]]
) -> None:
    losses = trained(name)[1]
    assert min(losses[1:]) < losses[0]


@every
def test_logits_come_at_the_images_size(name: str) -> None:
    network = zoo.build(name, **SMALL[name]).eval()
    with torch.inference_mode():
        assert network(torch.rand(2, 3, 64, 128)).shape == (2, 1, 64, 128)
    with pytest.raises(ValueError, match="expected images"):
        network(torch.rand(1, 1, 64, 64))
    if network.multiple > 1:
        with pytest.raises(ValueError, match="image is 64×63; both sides must be multiples of"):
            network(torch.rand(1, 3, 63, 64))


def test_fcn8s_learns_by_what_it_infers_with() -> None:
    network = zoo.build("fcn8s", width=4)
    for module in network.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    images = torch.rand(2, 3, 128, 64)
    learning, inferring = network.train()(images), network.eval()(images)
    assert inferring.std() > 0.1
    torch.testing.assert_close(learning, inferring, atol=1e-4, rtol=1e-4)


def test_imagenet_weights_are_where_training_starts() -> None:
    fresh, started = (zoo.build("lite0-unet", width=32) for _ in range(2))
    started.start()
    known = started.state_dict()
    first = known["body.encoder.model.conv_stem.weight"]
    assert not torch.equal(first, fresh.state_dict()["body.encoder.model.conv_stem.weight"])
    # Running variances of a network that has seen photos: none is as it was made.
    variances = [v for k, v in known.items() if "encoder" in k and k.endswith("running_var")]
    assert variances and not any(torch.equal(v, torch.ones_like(v)) for v in variances)
    alone = zoo.build("lite0-unet", width=32, pretrained=False)
    before = {k: v.clone() for k, v in alone.state_dict().items()}
    alone.start()
    assert all(torch.equal(v, before[k]) for k, v in alone.state_dict().items())


@pytest.mark.parametrize("enlarge", [1.5, 2])
def test_lite0_can_look_at_an_enlarged_image(enlarge: float) -> None:
    network = zoo.build("lite0-unet", width=32, pretrained=False, enlarge=enlarge)
    seen: list[torch.Size] = []
    network.get_submodule("body").register_forward_pre_hook(
        lambda _, given: seen.append(given[0].shape)
    )
    assert network.eval()(torch.rand(1, 3, 128, 64)).shape == (1, 1, 128, 64)
    assert seen == [(1, 3, 128 * enlarge, 64 * enlarge)]


def test_segans_critic_and_its_network_pull_in_opposite_directions(tmp_path: Path) -> None:
    loss = LossConfig(critic=1.0, bce=1.0, jaccard=1.0)
    config = tiny_config(network="segan", options=SMALL["segan"], size=64, batch_size=2, loss=loss)
    selections = {"validation": pixel_set(2, 64, 700)}
    trainer = Trainer(config, tmp_path, pixel_set(2, 64), selections, "drawn lesions")
    assert isinstance(trainer.discriminator, Critic)
    before = [weight.clone() for weight in trainer.discriminator.parameters()]
    terms = trainer.step(torch.tensor([0, 1]))
    assert terms["critic"] > 0 > terms["discriminator"]
    weights = list(trainer.discriminator.parameters())
    assert not any(torch.equal(*pair) for pair in zip(weights, before, strict=True))
    largest = max(float(weight.detach().abs().max()) for weight in weights)
    assert largest == pytest.approx(Critic.CLIP)
    with pytest.raises(ConfigError, match="two adversaries: choose one"):
        load_config(overrides={"loss.critic": 1, "loss.adversarial": 1})


def test_slsdeep_learns_by_its_own_loss(tmp_path: Path) -> None:
    loss = LossConfig(endpoint=1.0, bce=1.0, jaccard=0.0)
    config = tiny_config(
        network="slsdeep", options=SMALL["slsdeep"], size=64, batch_size=2, loss=loss
    )
    selections = {"validation": pixel_set(2, 64, 700)}
    trainer = Trainer(config, tmp_path, pixel_set(2, 64), selections, "drawn lesions")
    trainer.network.train()
    terms = trainer.step(torch.tensor([0, 1]))
    assert float(terms["loss"]) == pytest.approx(float(terms["bce"] + terms["endpoint"]))


# The contract


# To trace a network takes up to a minute, and the layers of these are those of others.
_NOT_TRACED = {"fcn8s", "gan-fcn", "segan", "segnet", "slsdeep"}
_LONGEST = {"egeunet", "lite0-unet", "lraspp", "segformer-b0"}
traced = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.thorough] if name in _LONGEST else [])
        for name in zoo.networks()
        if name not in _NOT_TRACED
    ],
)


@pytest.mark.slow
@traced
def test_it_is_exported_with_the_contract_of_all(
    name: str,
    trained: Callable[[str], tuple[Path, list[float]]],
    exported: Callable[[str], Path],
) -> None:
    graph = exported(name)
    images = np.stack([lesion_photo(seed, 128, 128).pixels for seed in range(3)])
    infer = onnx_runner(graph)
    network = read_network(trained(name)[0], name)
    with torch.inference_mode():
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        expected = network(x).sigmoid()[:, 0].numpy()
    for count in (1, 3):
        np.testing.assert_allclose(infer(images[:count]), expected[:count], atol=1e-4)
    assert expected.std() > 1e-3
    props = {p.key: p.value for p in onnx.load(graph).metadata_props}
    assert (props["network"], props["name"]) == (name, f"small-{name}")
    assert props["parameters"] == str(sum(p.numel() for p in network.parameters()))
    assert "attention" not in props


def test_the_same_weights_give_the_same_file(
    trained: Callable[[str], tuple[Path, list[float]]],
    exported: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    # The network that is traced soonest.
    export(trained("frcn")[0], tmp_path / "again.onnx", name="small-frcn")
    assert (tmp_path / "again.onnx").read_bytes() == exported("frcn").read_bytes()


def test_half_the_bytes_keep_the_masks(
    trained: Callable[[str], tuple[Path, list[float]]],
    exported: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, half = exported("unet"), tmp_path / "half.onnx"
    # To trace it again takes seconds.
    graph = onnx.load_model_from_string(unstamped(whole.read_bytes()))
    monkeypatch.setattr(model.export, "_graph", lambda *_: graph)
    weights = str(trained("unet")[0])
    model.export.main(["--weights", weights, "--output", str(half), "--half"])
    assert half.stat().st_size < 0.7 * whole.stat().st_size
    images = np.stack([lesion_photo(seed, 128, 128).pixels for seed in range(3)])
    expected, given = onnx_runner(whole)(images), onnx_runner(half)(images)
    np.testing.assert_allclose(given, expected, atol=0.02)
    assert (given != expected).any()
    check_digest(half.read_bytes())


@traced
def test_it_is_served(name: str, exported: Callable[[str], Path]) -> None:
    app, _ = create_app(Settings(model=exported(name), threads=1))
    photo = lesion_photo(5, 300, 200)
    with serve_app(app) as client:
        until(lambda: client.get("/health/ready").status_code == 200)
        answer = client.post(
            "/segment/json", files={"file": encode_photo(photo.pixels)}
        ).raise_for_status()
        card = client.get("/model").json()
    assert answer.json()["model"]["name"] == card["name"] == f"small-{name}"
    assert card["parameters"] > 0


@traced
def test_an_engine_is_built_of_it(
    name: str, exported: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    find_tensorrt().check_builds()
    command = ["--onnx", str(exported(name)), "--output", str(tmp_path / "e"), "--buckets", "1"]
    assert trt_build.__main__.main([*command, "--network", name]) == 0, capsys.readouterr().err
    said = json.loads((tmp_path / "e.json").read_text())
    assert said["model"]["network"] == name and said["engine_bytes"] > 0


# One command for all


def test_the_commands_take_the_networks_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, cache_dir, out = write_isic2017(tmp_path / "data"), tmp_path / "cache", tmp_path / "run"
    where = ["--data", str(data), "--cache", str(cache_dir)]
    tiny = tiny_flags(epochs=1, options__width=4)
    model.train.main([*where, "--out", str(out), "--network", "enet", *tiny])
    best = out / "best.safetensors"
    metadata = load_metadata(best)
    assert (metadata["network"], json.loads(metadata["options"])) == ("enet", {"width": 4})
    model.train.main([*where, "--out", str(out), "--resume"])

    images = data / "ISIC-2017_Validation_Data"
    masks = data / "ISIC-2017_Validation_Part1_GroundTruth"
    pairs = ["--images", str(images), "--masks", str(masks)]
    model.evaluate.main([*pairs, "--model", str(best), "--network", "enet"])
    assert "jaccard" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        model.evaluate.main([*pairs, "--model", str(best), "--network", "lraspp"])
    assert f"{best} holds the network enet, not lraspp" in capsys.readouterr().err

    table = tmp_path / "table"
    flags = ["--presets", "quick", "--out", str(table), "--network", "enet", "--epochs", "1"]
    model.ablate.main([*where, *flags, *tiny])
    assert load_metadata(table / "quick" / "seed-0" / "best.safetensors")["network"] == "enet"


# Bad input


def test_an_unknown_network_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="no network 'enett'; there are: slsnet, lraspp"):
        zoo.build("enett")
    with pytest.raises(ConfigError, match="no network 'enett'; there are: slsnet, teacher"):
        load_config(overrides={"network": "enett"})
    for main in (model.train.main, model.evaluate.main, model.ablate.main, model.export.main):
        with pytest.raises(SystemExit):
            main(["--network", "enett"])
        assert "invalid choice: 'enett' (choose from slsnet, lraspp" in _plain(capsys)


def _plain(capsys: pytest.CaptureFixture[str]) -> str:
    """What a command printed as its error. Python 3.11 puts the choices in quotes."""
    said = capsys.readouterr().err
    before, _, choices = said.rpartition("(choose from ")
    return f"{before}(choose from {choices.replace(chr(39), '')}"


def test_weights_of_another_network_are_refused_with_both_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], exported: Callable[[str], Path]
) -> None:
    graph = exported("enet")
    weights = graph.with_name("w.safetensors")
    with pytest.raises(ValueError, match="holds the network enet, not slsnet"):
        read_network(weights, "slsnet")
    with pytest.raises(ValueError, match="holds the network enet, not lraspp"):
        export(weights, tmp_path / "x.onnx", network="lraspp")
    with pytest.raises(ValueError, match=r"enet\.onnx holds the network enet, not slsnet"):
        model.evaluate.load_network(graph, name="slsnet")
    with pytest.raises(ValueError, match=r"slsnet\.onnx holds the network slsnet, not enet"):
        model.evaluate.load_network(model.evaluate.WEIGHTS, name="enet")
    command = ["--onnx", str(graph), "--output", str(tmp_path / "e"), "--network", "slsnet"]
    assert trt_build.__main__.main(command) == 1
    assert "holds the network enet, not slsnet" in capsys.readouterr().err


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="enet has no option 'depth'; it takes width"):
        zoo.build("enet", depth=3)
    with pytest.raises(ValueError, match="lraspp has no option 'width'; it takes none"):
        zoo.build("lraspp", width=3)
    for options, reason in (
        ({"width": 0}, "enet: width must be a whole number from 1, not 0"),
        ({"width": True}, "enet: width must be a whole number from 1, not True"),
        ({"width": "wide"}, "enet: width must be a whole number from 1, not 'wide'"),
        ({"width": 1}, "enet with .*'width': 1.*negative dimension"),
    ):
        with pytest.raises(ConfigError, match=reason):
            new_network(load_config(overrides={"network": "enet", "options": options}))
    for lite0, reason in (
        ({"pretrained": "no"}, "pretrained must be true or false, not 'no'"),
        ({"width": 8}, "width must be 16 at least, not 8"),
        ({"enlarge": 0.5}, "enlarge must be 1 at least, not 0.5"),
        ({"enlarge": "2"}, "enlarge must be a number, not '2'"),
        ({"enlarge": True}, "enlarge must be a number, not True"),
        ({"enlarge": math.nan}, "enlarge must be a number, not nan"),
        ({"enlarge": math.inf}, "enlarge must be a number, not inf"),
    ):
        with pytest.raises(ValueError, match=reason):
            zoo.build("lite0-unet", **lite0)
    with pytest.raises(ConfigError, match=r"options are of a network of model\.zoo; slsnet"):
        load_config(overrides={"options": {"width": 4}})
    path = tmp_path / "w.safetensors"
    save_network(zoo.build("enet", width=4), path, {})
    told = load_metadata(path)
    save_file(nn.Linear(2, 2).state_dict(), path, told)
    with pytest.raises(ValueError, match="holds weights of another enet"):
        read_network(path)
    for metadata, reason in (
        ({"network": "enet", "options": '{"depth": 3}'}, "enet has no option 'depth'"),
        ({"network": "enet", "options": "{"}, "Expecting property name"),
        ({"network": "later"}, "no network 'later'"),
        ({"config": "{"}, "Expecting property name"),
    ):
        save_file(nn.Linear(2, 2).state_dict(), path, metadata)
        with pytest.raises(ValueError, match=rf"w\.safetensors holds .*{reason}"):
            read_network(path)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named 'timm' for {name}")

    monkeypatch.setattr(zoo, "import_module", missing)
    with pytest.raises(ValueError, match=r"lraspp: No module.*pip install -r requirements-zoo"):
        zoo.build("lraspp")
