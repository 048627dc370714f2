"""The network for browsers: the same graph, with weights of half the size.

Weights are stored in float16 and cast to float32 where they are used, so that all arithmetic is
that of the server; ONNX Runtime casts them once, when it loads the file.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from common.onnx import onnx_runner
from common.stamp import stamped, trial_images, unstamped
from photos.image import MODEL_SIZE
from trt_build.parity import GENERATED, Parity, compare
from trt_build.samples import REFERENCE, load_samples

__all__ = ["halved", "metadata", "parity", "trial"]

# Smaller constants are not worth a node each.
_LEAST_VALUES = 64

# Answers on a trial image are means over so many pixels a side.
_CELL = 8


def halved(content: bytes) -> bytes:
    """An ONNX file's bytes, its weights in float16 behind casts, with new answers and digest.

    Raises:
        ValueError: a weight does not fit into float16, or it is no ONNX file.
    """
    try:
        model = onnx.load_model_from_string(unstamped(content))
    except Exception as error:  # protobuf's own class is not public
        raise ValueError("it is no ONNX file") from error
    graph = model.graph
    casts = []
    for weight in graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < _LEAST_VALUES:
            continue
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError(f"its weights {weight.name} do not fit into float16")
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(half, f"{name}_half"))
        casts.append(helper.make_node("Cast", [weight.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    content = model.SerializeToString()
    return stamped(content, onnx_runner(content))


def parity(reference: bytes, candidate: bytes) -> Parity:
    """How the candidate's masks differ from the reference's, on the shipped photos."""
    return compare(
        onnx_runner(reference),
        onnx_runner(candidate),
        load_samples(REFERENCE),
        name="weights in float16",
        precision="fp16",
        source=GENERATED,
    )


def trial(content: bytes) -> bytes:
    """What a browser tries the network with: images, then the answers to them.

    Returns:
        The bytes of uint8 [3, 128, 128, 3] RGB, then of uint8 [3, 16, 16]: mean probabilities of
        8×8 pixels, 255 for 1.
    """
    images = trial_images()
    cells = MODEL_SIZE // _CELL
    probabilities = onnx_runner(content)(images)
    means = probabilities.reshape(-1, cells, _CELL, cells, _CELL).mean((2, 4))
    answers: bytes = np.rint(means * 255).astype(np.uint8).tobytes()
    return images.tobytes() + answers


def metadata(content: bytes) -> dict[str, str]:
    """An ONNX file's metadata."""
    return {entry.key: entry.value for entry in onnx.load_model_from_string(content).metadata_props}
