"""What the server says of a photo."""

import base64
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Lesion", "Network", "Result", "network_of", "result_of"]


@dataclass(frozen=True)
class Lesion:
    """The lesion that was found, in pixels of the mask."""

    found: bool
    area: int
    area_fraction: float
    """Of the frame, 0 to 1."""
    bounding_box: tuple[int, int, int, int] | None
    """x, y, width, height."""
    centroid: tuple[float, float] | None
    """x, y."""
    mean_probability: float | None
    max_probability: float


@dataclass(frozen=True)
class Network:
    """The network that answered."""

    name: str
    version: str
    weights_sha256: str
    file_sha256: str


@dataclass(frozen=True, eq=False)
class Result:
    """A photo's mask, and what belongs to it."""

    mask: NDArray[np.bool_]
    """[height, width] of the photo, upright; True is lesion."""
    probability: NDArray[np.float32] | None
    """[height, width], 0 to 1; None unless it was asked for."""
    quality: dict[str, Any] | None
    """How good the mask is likely to be: the `jaccard` to be expected, and its `grade`; None where
    the server does not know."""
    fitness: dict[str, Any] | None
    """Whether it is a dermoscopic photo at all: its `distance` from such, and `unfit` above 1; None
    where the server does not know."""
    features: dict[str, Any] | None
    """Measurements of shape and colours, as the server names them; None unless they were asked for,
    or without a lesion."""
    lesion: Lesion
    network: Network
    threshold: float
    clean: bool
    timings_ms: dict[str, float]
    """Milliseconds in the server, by stage."""
    request_id: str


def network_of(model: dict[str, Any]) -> Network:
    """The network that an answer names; other members are passed over.

    Raises:
        KeyError: it names none.
    """
    return Network(
        **{key: model[key] for key in ("name", "version", "weights_sha256", "file_sha256")}
    )


def result_of(document: dict[str, Any]) -> Result:
    """The result in a JSON answer. Members that a newer server adds are passed over.

    Raises:
        KeyError, TypeError, ValueError, OSError: it is no such answer.
    """
    mask, lesion, model = document["mask"], document["lesion"], document["model"]
    size = int(mask["height"]), int(mask["width"])
    threshold = float(document["threshold"])
    probability = None
    if mask["format"] == "probabilities":
        levels = np.frombuffer(base64.b64decode(mask["probabilities"]), "<u2").reshape(size)
        probability = levels.astype(np.float32) / np.float32(65535)
        bitmap = probability > threshold
    else:
        with Image.open(BytesIO(base64.b64decode(mask["png"])), formats=["PNG"]) as picture:
            bitmap = np.array(picture, bool).reshape(size)
    box, centroid = lesion["bounding_box"], lesion["centroid"]
    return Result(
        mask=bitmap,
        probability=probability,
        quality=document.get("quality"),
        fitness=document.get("fitness"),
        features=document.get("features"),
        lesion=Lesion(
            found=lesion["found"],
            area=lesion["area"],
            area_fraction=lesion["area_fraction"],
            bounding_box=None if box is None else (box[0], box[1], box[2], box[3]),
            centroid=None if centroid is None else (centroid[0], centroid[1]),
            mean_probability=lesion["mean_probability"],
            max_probability=lesion["max_probability"],
        ),
        network=network_of(model),
        threshold=threshold,
        clean=document["clean"],
        timings_ms=document["timings_ms"],
        request_id=document["request_id"],
    )
