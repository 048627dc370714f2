"""The exported graph keeps the contract with serving, or is not written."""

import json
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import model.export
from common.onnx import onnx_runner
from common.stamp import unstamped
from model.config import GeneratorConfig
from model.evaluate import WEIGHTS as SHIPPED
from model.export import Contract, export, main, set_attention
from model.generator import Generator, load_generator, load_metadata, save_generator
from model.layers import ChannelAttention, PositionAttention
from tests.support.lesions import lesion_photo
from tests.support.tiny import GENERATOR, SIMPLER
from trt_build.parity import compare
from trt_build.samples import REFERENCE, load_samples

# torch.onnx.export uses a function of torch's own that torch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    figures = {"validation_jaccard": "0.7654", "threshold": "0.5", "training_data": "3 images"}
    save_generator(_attentive(GENERATOR), path, {**figures, "selection": "0.7"})
    return path


def _attentive(settings: dict[str, Any]) -> Generator:
    """A generator whose attentions have a say."""
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig(**settings))
    for module in generator.modules():
        if isinstance(module, PositionAttention):
            nn.init.constant_(module.eta, 0.4)
        elif isinstance(module, ChannelAttention):
            nn.init.constant_(module.gamma, 0.4)
    return generator


@pytest.fixture(scope="module")
def graph(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "slsnet.onnx"
    with warnings.catch_warnings():  # marks do not reach fixtures of a module
        warnings.simplefilter("ignore", FutureWarning)
        assert export(weights, path, "1.2.3", "Apache-2.0") < 1e-5
    return path


def test_contract(graph: Path) -> None:
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (image,), (probability,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type) == ("image", "tensor(uint8)")
    assert image.shape[1:] == [128, 128, 3] and isinstance(image.shape[0], str)
    assert (probability.name, probability.type) == ("probability", "tensor(float)")
    assert probability.shape[1:] == [128, 128] and isinstance(probability.shape[0], str)


def test_it_computes_what_pytorch_does(graph: Path, weights: Path) -> None:
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    images = np.stack([lesion_photo(seed, 128, 128).pixels for seed in range(3)])
    generator = load_generator(weights)
    set_attention(generator, "pooled")
    with torch.inference_mode():
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        expected = generator(x).sigmoid()[:, 0].numpy()
    for count in (1, 2, 3):
        (found,) = session.run(None, {"image": images[:count]})
        assert found.shape == (count, 128, 128) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected[:count], atol=1e-5)
    assert expected.std() > 1e-3


def test_the_file_tells_nothing_of_where_it_was_made(graph: Path) -> None:
    """That the next file of the same weights is equal, `test_zoo` shows."""
    content = onnx.load(graph)
    assert not any(node.metadata_props or node.doc_string for node in content.graph.node)
    assert b"model/" not in graph.read_bytes() and b".py" not in graph.read_bytes()


def test_metadata(graph: Path, weights: Path) -> None:
    content = onnx.load_model_from_string(unstamped(graph.read_bytes()))
    props = {p.key: p.value for p in content.metadata_props}
    generator = Generator(GeneratorConfig(**GENERATOR))
    assert props == {
        "name": "w",
        "version": "1.2.3",
        "licence": "Apache-2.0",
        "attention": "pooled",
        "parameters": str(sum(p.numel() for p in generator.parameters())),
        "weights_sha256": sha256(weights.read_bytes()).hexdigest(),
        "validation_jaccard": "0.7654",
        "threshold": "0.5",
        "training_data": "3 images",
    }


@pytest.mark.thorough
def test_the_exact_form_is_one_argument_away(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    save_generator(_attentive(SIMPLER), weights)
    export(weights, tmp_path / "exact.onnx", "1", "Apache-2.0", attention="exact")
    content = onnx.load(tmp_path / "exact.onnx")
    assert {p.key: p.value for p in content.metadata_props}["attention"] == "exact"
    images = np.stack([lesion_photo(seed, 128, 128).pixels for seed in range(2)])
    with torch.inference_mode():
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        expected = load_generator(weights)(x).sigmoid()[:, 0].numpy()
    session = ort.InferenceSession(tmp_path / "exact.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"image": images})[0], expected, atol=1e-5)


def test_a_network_trained_pooled_has_no_other_form(tmp_path: Path) -> None:
    """That it is exported, `test_identity` shows."""
    path = tmp_path / "pooled.safetensors"
    save_generator(Generator(GeneratorConfig(**{**GENERATOR, "pam_pool": (2, 1)})), path)
    generator = load_generator(path)
    assert generator.config.pam_pool == (2, 1)
    set_attention(generator, "pooled")
    assert {attention.pool for attention in generator.half_resolution_attention()} == {2}
    with pytest.raises(ValueError, match="trained with keys averaged over 2×2 positions"):
        export(path, tmp_path / "exact.onnx", "1", "Apache-2.0", attention="exact")


def test_pooled_attention_keeps_the_masks_of_the_shipped_weights(data_dir: Path | None) -> None:
    exact = Contract(load_generator(SHIPPED.with_suffix(".safetensors")))

    def infer(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            answers: NDArray[np.float32] = exact(torch.from_numpy(images)).numpy()
        return answers

    parity = compare(
        infer,
        onnx_runner(SHIPPED),
        load_samples(REFERENCE if data_dir is None else data_dir / "native", limit=8),
        name="pooled",
        precision="fp32",
        source="photos",
    )
    assert parity.failures() == []
    assert 0 < parity.max_difference < 0.06


def test_a_graph_that_computes_something_else_is_not_written(
    graph: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = graph.read_bytes()
    other = tmp_path / "other.safetensors"
    generator = load_generator(weights)
    assert generator.head.bias is not None
    generator.head.bias.data += 0.001
    save_generator(generator, other, load_metadata(weights))
    made = onnx.load_model_from_string(unstamped(before))
    # Private: no weights make PyTorch trace another graph than theirs.
    monkeypatch.setattr(model.export, "_graph", lambda *_: made)
    with pytest.raises(ValueError, match=r"differs from PyTorch by .* was not written"):
        export(other, graph, "2", "Apache-2.0")
    assert graph.read_bytes() == before
    assert [p.name for p in graph.parent.iterdir()] == [graph.name]


def test_unreadable_weights_end_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_text("no weights")
    monkeypatch.setattr("sys.argv", ["export", "--weights", str(bad), "--output", str(bad) + "x"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "is not a readable safetensors file" in error


def test_shipped_graph_is_of_the_shipped_weights() -> None:
    shipped = Path(model.__file__).parent / "weights/slsnet.safetensors"
    props = {p.key: p.value for p in onnx.load(shipped.with_suffix(".onnx")).metadata_props}
    assert props["weights_sha256"] == sha256(shipped.read_bytes()).hexdigest()
    config = json.loads(load_metadata(shipped)["config"])
    assert props["parameters"] == "2347900" and config["cam_form"] == "danet"
