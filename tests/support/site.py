"""A server whose network can be replaced."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import onnx

from common.stamp import unstamped
from photos.image import MODEL_SIZE
from server.keys import new_key
from tests.support import MODEL
from tests.support.launch import ServerProcess, serve


@dataclass
class Site:
    """A server whose network can be replaced."""

    server: ServerProcess
    model: Path
    headers: dict[str, str]

    def reload(self) -> httpx.Response:
        return httpx.post(f"{self.server.url}/admin/reload", headers=self.headers, timeout=60)

    def version(self) -> str:
        card = httpx.get(f"{self.server.url}/model", headers=self.headers).json()
        return str(card["version"])


@contextlib.contextmanager
def open_site(folder: Path) -> Iterator[Site]:
    """A server of a copy of the shipped network in `folder`, with an administrator's key."""
    model = folder / "slsnet.onnx"
    shutil.copy(MODEL, model)
    key, line = new_key("ops", "admin")
    (folder / "keys").write_text(line, encoding="utf-8")
    with serve("--model", str(model), "--api-keys-file", str(folder / "keys")) as server:
        yield Site(server, model, {"X-API-Key": key})


def inverted(version: str) -> bytes:
    """The shipped network with its answer turned round: lesion where there was none."""
    graph = onnx.load(MODEL)
    for node in graph.graph.node:
        for index, name in enumerate(node.output):
            if name == "probability":
                node.output[index] = "inverse"
    one = onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [], [1.0])
    graph.graph.initializer.append(one)
    graph.graph.node.append(onnx.helper.make_node("Sub", ["one", "inverse"], ["probability"]))
    for entry in graph.metadata_props:
        if entry.key == "version":
            entry.value = version
    # Not with the digest of what it was made from.
    return unstamped(graph.SerializeToString())


def small() -> bytes:
    """A network that takes dark for lesion, in no time, and has the shipped one's metadata.

    For tests of processes and protocols, which start many servers.
    """
    pixels = onnx.helper.make_tensor_value_info(
        "image", onnx.TensorProto.UINT8, ["n", MODEL_SIZE, MODEL_SIZE, 3]
    )
    answer = onnx.helper.make_tensor_value_info(
        "probability", onnx.TensorProto.FLOAT, ["n", MODEL_SIZE, MODEL_SIZE]
    )
    nodes = [
        onnx.helper.make_node("Cast", ["image"], ["values"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("ReduceMean", ["values"], ["brightness"], axes=[3], keepdims=0),
        onnx.helper.make_node("Div", ["brightness", "white"], ["light"]),
        onnx.helper.make_node("Sub", ["one", "light"], ["probability"]),
    ]
    numbers = [
        onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [], [value])
        for name, value in (("white", 255.0), ("one", 1.0))
    ]
    shipped = onnx.load(MODEL)
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "small", [pixels], [answer], numbers),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=shipped.ir_version,
    )
    model.metadata_props.extend(shipped.metadata_props)
    # Neither with the digest nor the trial's answers of the shipped one.
    return unstamped(model.SerializeToString())
