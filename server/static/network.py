"""The network for browsers: how its masks compare with the server's, and what they try it with."""

import numpy as np
import onnx

from common.half import halved
from common.onnx import onnx_runner
from common.stamp import stamped, trial_images
from photos.image import MODEL_SIZE
from trt_build.parity import GENERATED, Parity, compare
from trt_build.samples import REFERENCE, load_samples

__all__ = ["metadata", "parity", "small", "trial"]

# Answers on a trial image are means over so many pixels a side.
_CELL = 8


def small(content: bytes) -> bytes:
    """An ONNX file's bytes with weights in float16, new answers and digest.

    Raises:
        ValueError: a weight does not fit into float16, or it is no ONNX file.
    """
    half = halved(content)
    return stamped(half, onnx_runner(half))


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
