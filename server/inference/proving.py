"""Proves a backend before it serves: it has to run and answer correctly. Its speed is measured.

The table of quality and the detector beside its file have to be those of its weights.
"""

import asyncio
import math
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.stamp import ANSWERS, StampError, difference_from, trial_images
from photos.fitness import Detector
from photos.image import MODEL_SIZE
from photos.quality import QualityTable
from server.backends import Backend, BackendError
from server.backends.model_file import read_detector, read_quality

__all__ = ["Proved", "proved"]

# The largest difference in probability from the answers at export. bfloat16 and float16 stay within
# a tenth of it; the masks of int8 are checked when the engine is built.
_MOST_DIFFERENCE = 0.05
_MOST_DIFFERENCE_INT8 = 0.25


@dataclass(frozen=True)
class Proved:
    """What was found out about a backend that works."""

    seconds_an_image: float
    """For a photo, while as many run as can at the same time."""
    quality: QualityTable | None
    detector: Detector | None


async def proved(backend: Backend, file: Path, pool: Executor) -> Proved:
    """Warm `backend` up and try it, in a thread of `pool`; close it if that fails.

    Args:
        file: that it was loaded from.

    Raises:
        BackendError: its answers are no probabilities, or differ from those stored in its file; or
            the table of quality or the detector is not its own.
    """
    proving = asyncio.get_running_loop().run_in_executor(pool, _prove, backend, file)
    try:
        return await asyncio.shield(proving)
    except asyncio.CancelledError:

        def close(proved: asyncio.Future[Proved]) -> None:
            if not proved.cancelled():
                proved.exception()
            backend.close()

        # If it hangs, a thread is still in it.
        proving.add_done_callback(close)
        raise
    except BaseException:
        backend.close()
        raise


def _prove(backend: Backend, file: Path) -> Proved:
    backend.warm_up()
    info = backend.describe()
    stored = info.model.get(ANSWERS)
    # Without answers to compare any images will do.
    images = (
        np.zeros((3, MODEL_SIZE, MODEL_SIZE, 3), np.uint8) if stored is None else trial_images()
    )
    seconds_an_image, found = _tried(backend, images, info.slots)
    if info.max_batch > 1:
        # Together they take another way through the network.
        found.append(backend.infer(images))
    for probabilities in found:
        if (
            probabilities.shape != images.shape[:3]
            or not ((probabilities >= 0) & (probabilities <= 1)).all()
        ):
            raise BackendError("The network's answers are not probabilities.")
        if stored is not None:
            _compare(probabilities, stored, info.precision)
    return Proved(seconds_an_image, read_quality(file, info.model), read_detector(file, info.model))


def _tried(
    backend: Backend, images: NDArray[np.uint8], slots: int
) -> tuple[float, list[NDArray[np.float32]]]:
    """Run each image as often as photos run together: seconds an image, and all answers."""
    taken_s = math.inf
    rounds = []
    with ThreadPoolExecutor(slots) as threads:
        # The quickest counts, since on a busy machine a single one may take many times as long.
        for image in images:
            started = time.perf_counter()
            rounds.append(list(threads.map(backend.infer, [image[None]] * slots)))
            taken_s = min(taken_s, time.perf_counter() - started)
    return taken_s / slots, [np.concatenate(answers) for answers in zip(*rounds, strict=True)]


def _compare(probabilities: NDArray[np.float32], stored: str, precision: str) -> None:
    """Hold answers on the trial images, [3, 128, 128], against those in the network's file."""
    most = _MOST_DIFFERENCE_INT8 if precision == "int8" else _MOST_DIFFERENCE
    try:
        difference = difference_from(stored, probabilities)
    except StampError as error:
        raise BackendError(f"The network's stored answers cannot be read: {error}.") from error
    if not difference <= most:
        raise BackendError(
            f"On the trial images the network's answers differ by {difference:.2f} in probability"
            " from those stored when it was exported: export it again."
        )
