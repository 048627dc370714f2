"""Measures the range of every convolution's input on real photos, for int8 engines.

    python -m trt_build.calibrate --onnx model/weights/slsnet.onnx --images FOLDER

writes `model/weights/slsnet.calibration.json`, which an int8 build reads. The file belongs to
that one ONNX file and says so.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from common.files import write_atomically
from common.onnx import onnx_session
from common.program import Help
from engines.plan import file_sha256
from trt_build.samples import Sample, batches, load_samples

PERCENTILE = 99.99
"""A range covers this share of an activation's magnitudes in a batch. Larger ones are clipped:
one bright pixel would make every other step coarser."""

DEFAULT_IMAGES = 256


class CalibrationError(ValueError):
    """There are no ranges for this ONNX file."""


def calibration_path(onnx_path: Path) -> Path:
    """Return the path of the ranges of an ONNX file."""
    return onnx_path.with_suffix(".calibration.json")


def measure_ranges(
    onnx_path: Path, samples: Sequence[Sample], percentile: float = PERCENTILE
) -> dict[str, float]:
    """Return, by tensor name, the magnitude that int8's 127 stands for.

    It is the largest `percentile` of any batch; the tensors are all convolutions' inputs.
    """
    model = onnx.load(onnx_path)
    # Where another operator only moves the data between two inputs, both get the same range.
    names = sorted({node.input[0] for node in model.graph.node if node.op_type == "Conv"})
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnx_session(model.SerializeToString())
    ranges = dict.fromkeys(names, 0.0)
    for batch in batches(samples):
        for name, value in zip(names, session.run(names, {"image": batch}), strict=True):
            ranges[name] = max(ranges[name], _percentile(value, percentile))
    return ranges


def _percentile(value: NDArray[np.float32], percentile: float) -> float:
    return float(np.percentile(np.abs(value), percentile))


def write_ranges(onnx_path: Path, output: Path, ranges: Mapping[str, float], images: int) -> None:
    """Write the ranges, with the ONNX file that they belong to."""
    payload = {
        "onnx_sha256": file_sha256(onnx_path),
        "images": images,
        "percentile": PERCENTILE,
        "ranges": ranges,
    }
    write_atomically(output, json.dumps(payload, indent=1).encode())


def read_ranges(onnx_path: Path, calibration: Path | None = None) -> dict[str, float]:
    """Read the ranges beside `onnx_path`, or from `calibration`.

    Raises:
        CalibrationError: there are none, or they are of another file.
    """
    path = calibration or calibration_path(onnx_path)
    how = f"python -m trt_build.calibrate --onnx {onnx_path} --images FOLDER"
    try:
        payload = json.loads(path.read_bytes())
        ranges = {str(name): float(value) for name, value in payload["ranges"].items()}
        belongs_to = payload["onnx_sha256"]
    except FileNotFoundError as error:
        raise CalibrationError(f"{path} is missing; make it with {how}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(f"{path} holds no ranges; make it again with {how}") from error
    if belongs_to != file_sha256(onnx_path):
        raise CalibrationError(f"{path} belongs to another ONNX file; make it again with {how}")
    return ranges


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the ranges."""
    parser = argparse.ArgumentParser(
        formatter_class=Help, prog="python -m trt_build.calibrate", description=__doc__
    )
    parser.add_argument("--onnx", type=Path, required=True, help="the network's file")
    parser.add_argument("--images", type=Path, required=True, help="folder of photos")
    parser.add_argument("--output", type=Path, help="the ranges (default: beside the ONNX file)")
    parser.add_argument("--limit", type=int, default=DEFAULT_IMAGES, help="most photos to use")
    args = parser.parse_args(arguments)
    samples = load_samples(args.images, limit=args.limit)
    output = args.output or calibration_path(args.onnx)
    write_ranges(args.onnx, output, measure_ranges(args.onnx, samples), len(samples))
    print(f"{output}: ranges from {len(samples)} photos")


if __name__ == "__main__":
    main()
