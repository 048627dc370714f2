"""A network keeps its own size and has a name and version of its own."""

import shutil
import warnings
from hashlib import sha256
from pathlib import Path

import onnx
import pytest
import torch

from model.config import GeneratorConfig
from model.evaluate import load_network
from model.export import export, main
from model.generator import Generator, input_size, save_generator
from server.backends import BackendError, open_backend
from tests.support import ROOT
from tests.support.tiny import SIMPLER

SHIPPED = ROOT / "model/weights"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of the run `mine`, whose input is 64 pixels wide and whose attention was trained pooled."""
    torch.manual_seed(0)
    path = tmp_path / "mine/best.safetensors"
    path.parent.mkdir()
    config = GeneratorConfig(**{**SIMPLER, "pam_pool": (2, 1)})
    save_generator(Generator(config), path, {"size": "64"})
    return path


def test_evaluation_takes_the_size_of_the_weights(weights: Path) -> None:
    assert load_network(weights).size == 64
    with pytest.raises(ValueError, match="trained for inputs of 64×64, not 128×128"):
        load_network(weights, 128)
    with pytest.raises(ValueError, match="takes inputs of 128×128, not 64×64"):
        load_network(SHIPPED / "slsnet.onnx", 64)


def test_weights_without_a_size_use_the_given_one() -> None:
    shipped = SHIPPED / "slsnet.safetensors"
    assert (input_size(shipped), input_size(shipped, 64)) == (128, 64)


@pytest.mark.slow
def test_an_export_has_the_size_and_an_identity_of_its_own(weights: Path) -> None:
    graph = weights.with_suffix(".onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        export(weights, graph)
    model = onnx.load(graph)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert (said["name"], said["attention"]) == ("mine", "pooled")
    assert said["version"] == sha256(weights.read_bytes()).hexdigest()[:12]
    assert load_network(graph).size == 64
    with pytest.raises(BackendError, match=r"\[64, 64, 3\]"):
        open_backend("onnxruntime", graph, threads=1)


def test_export_without_output_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in (".safetensors", ".onnx"):
        shutil.copy(SHIPPED / f"slsnet{suffix}", tmp_path)
    graph = tmp_path / "slsnet.onnx"
    before = graph.read_bytes()
    monkeypatch.setattr("sys.argv", ["export", "--weights", str(graph.with_suffix(".safetensors"))])
    with pytest.raises(SystemExit):
        main()
    assert "is there already: name the file to write with --output" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["export"])
    with pytest.raises(SystemExit):
        main()
    assert graph.read_bytes() == before
