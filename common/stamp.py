"""The stamp at the end of an ONNX file: answers on trial images, and a digest of the file's bytes.

With them whoever loads the file can tell whether it is whole, and whether it still computes what it
did when it was exported. Both are ordinary metadata. `python -m model.export` writes them; a file
from elsewhere may have neither. The stamp is appended by hand, which protobuf allows, because the
library `onnx` is not installed where the network is served.
"""

import base64
import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from common.metadata import entry
from photos.image import MODEL_SIZE

__all__ = [
    "Infer",
    "StampError",
    "check_digest",
    "difference_from",
    "stamped",
    "trial_images",
    "unstamped",
]

ANSWERS = "trial_answers"
"""Metadata: the answers on `trial_images`, each as 16 × 16 means, one byte each, in base64."""

DIGEST = "content_sha256"
"""Metadata, the last: SHA-256 of all bytes before it."""

_CELLS = 16

Infer = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""A network: uint8 [n, size, size, 3] → probability, float32 [n, size, size]."""


class StampError(ValueError):
    """The digest does not match the bytes, or the answers cannot be read."""


def stamped(content: bytes, infer: Infer | None) -> bytes:
    """An ONNX file's bytes with new answers and a new digest; old ones are replaced.

    Args:
        infer: runs the network of the file: uint8 [n, 128, 128, 3] → float32 [n, 128, 128]; None
            leaves the answers out.
    """
    content = unstamped(content)
    if infer is not None:
        answers = base64.b64encode(_brief(infer(trial_images()))).decode()
        content += entry(ANSWERS, answers)
    return content + entry(DIGEST, hashlib.sha256(content).hexdigest())


def unstamped(content: bytes) -> bytes:
    """The bytes without what `stamped` appended."""
    for key, length in ((DIGEST, 64), (ANSWERS, _ANSWERS_LENGTH)):
        last = entry(key, "0" * length)
        if content[-len(last) :].startswith(last[:-length]):
            content = content[: -len(last)]
    return content


def check_digest(content: bytes) -> None:
    """Check the bytes' digest, if they have one.

    Raises:
        StampError: it does not match.
    """
    start = entry(DIGEST, "0" * 64)[:-64]
    at = content.rfind(start)
    if at < 0:
        return
    said = content[at + len(start) :]
    if said != hashlib.sha256(memoryview(content)[:at]).hexdigest().encode():
        raise StampError(
            f"its bytes are not those that its digest ({DIGEST} in its metadata) was made of: it is"
            " damaged, or was changed after `python -m model.export` wrote it"
        )


def difference_from(answers: str, probabilities: NDArray[np.float32]) -> float:
    """The largest difference between the stored answers and those on `trial_images`.

    Args:
        answers: the stored ones.
        probabilities: the others, [3, 128, 128].

    Raises:
        StampError: the stored answers cannot be read.
    """
    found = np.frombuffer(_brief(probabilities), np.uint8).astype(np.int16)
    try:
        stored = np.frombuffer(base64.b64decode(answers, validate=True), np.uint8)
    except ValueError as error:
        raise StampError(f"its {ANSWERS} are not base64") from error
    if stored.shape != found.shape:
        raise StampError(f"its {ANSWERS} are not those of {len(trial_images())} images")
    return float(np.abs(found - stored).max()) / 255


def trial_images() -> NDArray[np.uint8]:
    """Three spots on skin, uint8 [3, 128, 128, 3]: dark, pale and at the frame's edge."""
    y, x = np.mgrid[:MODEL_SIZE, :MODEL_SIZE] / MODEL_SIZE
    images = []
    for column, row, radius, contrast in (
        (0.53, 0.48, 0.27, 1.0),
        (0.40, 0.58, 0.15, 0.45),
        (0.85, 0.20, 0.32, 0.8),
    ):
        edge = radius * (1 + 0.15 * np.sin(5 * np.arctan2(y - row, x - column)))
        spot = 1 / (1 + np.exp((np.hypot(x - column, 1.2 * (y - row)) - edge) / 0.02))
        grain = 0.03 * np.sin(61 * x + 13 * np.sin(47 * y))
        skin, lesion = np.array([0.78, 0.62, 0.56]), np.array([0.42, 0.26, 0.21])
        rgb = skin + contrast * (lesion - skin) * spot[..., None] + grain[..., None]
        images.append((np.clip(rgb, 0, 1) * 255).astype(np.uint8))
    return np.stack(images)


_ANSWERS_LENGTH = len(base64.b64encode(bytes(3 * _CELLS * _CELLS)))


def _brief(probabilities: NDArray[np.float32]) -> bytes:
    cell = MODEL_SIZE // _CELLS
    cells = probabilities.reshape(-1, _CELLS, cell, _CELLS, cell).mean((2, 4))
    brief: bytes = np.rint(np.clip(cells, 0, 1) * 255).astype(np.uint8).tobytes()
    return brief
