"""Files of half the size; `tests/server/static` has the masks of one."""

import onnx
import pytest

from common.half import halved
from tests.support import MODEL


def test_weights_beyond_float16_are_refused() -> None:
    model = onnx.load_model_from_string(MODEL.read_bytes())
    weight = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] = 70_000
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    with pytest.raises(ValueError, match="float16"):
        halved(model.SerializeToString())
    with pytest.raises(ValueError, match="no ONNX file"):
        halved(b"nothing")
