"""OpenVINO: what ONNX Runtime answers, in bfloat16 where the processor multiplies it."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from numpy.typing import NDArray

from server.backends import BackendError, Images, open_backend
from server.backends.onnxruntime import OnnxRuntimeBackend
from server.backends.openvino import OpenVinoBackend
from server.http.app import create_app
from server.settings import Settings
from tests.support import MODEL, ROOT
from tests.support.answers import read_png
from tests.support.app import serve_app
from tests.support.lesions import encode_photo, lesion_photo
from tests.support.offline import Offline
from tests.support.waiting import until
from trt_build.parity import compare, mask_iou
from trt_build.samples import REFERENCE, Sample, batches, load_samples


class Processor(openvino.Core):  # type: ignore[misc]
    """This machine's, which is said to multiply bfloat16; OpenVINO takes float32 if it does not."""

    can: tuple[str, ...] = ("FP32", "BF16")

    def get_property(self, *_: Any) -> Any:
        return list(self.can)


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "Core", Processor)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return load_samples(REFERENCE)


@pytest.fixture
def backend() -> Iterator[OpenVinoBackend]:
    backend = OpenVinoBackend(MODEL, threads=3)
    backend.warm_up()
    yield backend
    backend.close()


def test_its_masks_pass_the_gate(backend: OpenVinoBackend, samples: list[Sample]) -> None:
    onnx = open_backend("onnxruntime", MODEL, threads=1)
    parity = compare(
        onnx.infer, backend.infer, samples, name="openvino", precision="bf16", source="drawn"
    )
    assert not parity.failures()
    info, other = backend.describe(), onnx.describe()
    assert (info.name, info.device, info.precision) == ("openvino", "cpu", "bf16")
    assert (info.model, info.file_sha256) == (other.model, other.file_sha256)
    onnx.close()


def test_a_photo_has_one_answer_alone_and_beside_others(
    backend: OpenVinoBackend, samples: list[Sample]
) -> None:
    pixels: NDArray[np.uint8] = next(batches(samples[:3]))
    assert backend.describe().slots == 3
    alone = [backend.infer(image[None]) for image in pixels]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda n: backend.infer(pixels[n % 3][None]), range(24)))
    for n, probability in enumerate(together):
        np.testing.assert_array_equal(probability, alone[n % 3])
    np.testing.assert_array_equal(backend.infer(pixels), np.concatenate(alone))


def test_it_serves(offline: Offline) -> None:
    data = encode_photo(lesion_photo(1, 450, 600).pixels)
    app, _ = create_app(Settings(backend="openvino", threads=2))
    with serve_app(app) as client:
        until(lambda: client.get("/health/ready").status_code == 200)
        assert client.get("/model").json()["backend"]["precision"] == "bf16"
        answer = client.post("/segment", content=data).raise_for_status()
    assert mask_iou(read_png(answer.content), offline.mask(data)) > 0.99


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_graph_with_another_contract_is_refused(tmp_path: Path, name: str) -> None:
    image, probability = (
        onnx.helper.make_tensor_value_info(called, onnx.TensorProto.FLOAT, ["n", 3, 64, 64])
        for called in ("image", "probability")
    )
    node = onnx.helper.make_node("Sigmoid", ["image"], ["probability"])
    graph = onnx.helper.make_graph([node], "other", [image], [probability])
    onnx.save(onnx.helper.make_model(graph, ir_version=10), tmp_path / "other.onnx")
    said = r"other\.onnx does not keep the served contract .*\('image', 'float32', \[3, 64, 64\]\)"
    with pytest.raises(BackendError, match=said):
        open_backend(name, tmp_path / "other.onnx", threads=1)


def test_nothing_is_written_or_told(tmp_path: Path) -> None:
    """It reports each import to an analytics service otherwise, and keeps an id in the home."""
    code = f"""
import pathlib, sys
sys.addaudithook(lambda name, _: name.startswith("socket.") and print(name))
import server.backends
import openvino
core = openvino.Core()
core.compile_model(core.read_model({str(MODEL)!r}), "CPU")
print(sorted(p.name for p in pathlib.Path.home().iterdir()))
"""
    home = {"HOME": str(tmp_path), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=home, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_network_whose_masks_bfloat16_changes_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a processor without bfloat16 the masks are the same, so float32 answers otherwise."""
    honest = OnnxRuntimeBackend.infer

    def shifted(self: OnnxRuntimeBackend, batch: Images) -> NDArray[np.float32]:
        return np.roll(honest(self, batch), 1, 2)

    monkeypatch.setattr(OnnxRuntimeBackend, "infer", shifted)
    said = r"bfloat16 changes its masks \(mean IoU with float32 0\.9.*--backend onnxruntime"
    with pytest.raises(BackendError, match=said):
        open_backend("openvino", MODEL, threads=1)


def test_a_processor_without_bfloat16_is_told_what_is_as_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Processor, "can", ("FP32", "INT8"))
    with pytest.raises(BackendError, match=r"multiply bfloat16 .*FP32, INT8.*onnxruntime"):
        open_backend("openvino", MODEL, threads=1)


def test_without_the_package_its_requirements_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "server.backends.openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"install requirements-openvino\.txt"):
        open_backend("openvino", MODEL, threads=1)


@pytest.mark.parametrize("content", [b"", b"no network", MODEL.read_bytes()[:5000]])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "network.onnx").write_bytes(content)
    with pytest.raises(BackendError, match=r"cannot load .*network\.onnx"):
        open_backend("openvino", tmp_path / "network.onnx", threads=1)


def test_a_file_in_openvinos_own_format_is_refused_before_openvino_reads_it(
    tmp_path: Path,
) -> None:
    openvino.save_model(openvino.Core().read_model(MODEL), tmp_path / "network.xml")
    with pytest.raises(BackendError, match=r"ONNX Runtime cannot load .*network\.xml"):
        open_backend("openvino", tmp_path / "network.xml", threads=1)


def test_openvino_reads_no_file_that_names_an_address_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes weights from there, and crashes where nothing is."""
    monkeypatch.setattr(Processor, "read_model", None)
    secret = np.full((1, 128, 128, 3), 7, np.uint8)
    weight = onnx.TensorProto(
        name="weight", data_type=onnx.TensorProto.UINT8, dims=secret.shape, data_location="EXTERNAL"
    )
    for key, value in (
        ("location", "*/_ORT_MEM_ADDR_/*"),
        ("offset", secret.ctypes.data),
        ("length", secret.nbytes),
    ):
        weight.external_data.add(key=key, value=str(value))
    (tmp_path / "network.onnx").write_bytes(_network("Max", ["image", "weight"], [weight]))
    with pytest.raises(BackendError, match="in-memory address"):
        open_backend("openvino", tmp_path / "network.onnx", threads=1)


def test_what_openvino_alone_cannot_load_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "network.onnx").write_bytes(_network("Twice", ["image"], []))
    with pytest.raises(
        BackendError, match=r"^OpenVINO cannot load .*network\.onnx: .*Twice"
    ) as said:
        open_backend("openvino", tmp_path / "network.onnx", threads=1)
    assert "\n" not in str(said.value)


def _network(operator: str, inputs: list[str], weights: list[onnx.TensorProto]) -> bytes:
    """Keeps the contract. `Twice` is a function, which OpenVINO does not know."""
    helper, kind = onnx.helper, onnx.TensorProto
    twice = helper.make_function(
        "own",
        "Twice",
        ["x"],
        ["y"],
        [helper.make_node("Max", ["x", "x"], ["y"])],
        [helper.make_opsetid("", 17)],
    )
    is_own = operator == twice.name
    graph = helper.make_graph(
        [
            helper.make_node(operator, inputs, ["values"], domain="own" if is_own else ""),
            helper.make_node("Cast", ["values"], ["real"], to=kind.FLOAT),
            helper.make_node("ReduceMean", ["real"], ["mean"], axes=[3], keepdims=0),
            helper.make_node("Sigmoid", ["mean"], ["probability"]),
        ],
        "network",
        [helper.make_tensor_value_info("image", kind.UINT8, ["n", 128, 128, 3])],
        [helper.make_tensor_value_info("probability", kind.FLOAT, ["n", 128, 128])],
        initializer=weights,
    )
    model = helper.make_model(
        graph,
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("own", 1)],
        functions=[twice] if is_own else [],
    )
    content: bytes = model.SerializeToString()
    return content
