"""An ONNX file of half the size.

Weights are stored in float16 and cast to float32 where they are used, so that all arithmetic stays
as it was; ONNX Runtime casts them once, when it loads the file.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from common.stamp import unstamped

__all__ = ["halved"]

# Smaller constants are not worth a node each.
_LEAST_VALUES = 64


def halved(content: bytes) -> bytes:
    """An ONNX file's bytes, its weights in float16 behind casts; without a stamp.

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
    smaller: bytes = model.SerializeToString()
    return smaller
