"""Proves a backend before it serves: it has to run and answer correctly. Its speed is measured."""

import asyncio
import math
import time
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np

from common.stamp import ANSWERS, StampError, difference_from
from photos.image import MODEL_SIZE
from server.backends import Backend, BackendError

__all__ = ["proved"]

# The largest difference in probability from the answers at export. bfloat16 and float16 stay within
# a tenth of it; the masks of int8 are checked when the engine is built.
_MOST_DIFFERENCE = 0.05
_MOST_DIFFERENCE_INT8 = 0.25


async def proved(backend: Backend, pool: Executor) -> float:
    """Warm `backend` up and try it, in a thread of `pool`; close it if that fails.

    Returns:
        Seconds for a photo, while as many run as can at the same time.

    Raises:
        BackendError: its answers are no probabilities, or differ from those stored in its file.
    """
    proving = asyncio.get_running_loop().run_in_executor(pool, _prove, backend)
    try:
        return await asyncio.shield(proving)
    except asyncio.CancelledError:

        def close(proved: asyncio.Future[float]) -> None:
            if not proved.cancelled():
                proved.exception()
            backend.close()

        # If it hangs, a thread is still in it.
        proving.add_done_callback(close)
        raise
    except BaseException:
        backend.close()
        raise


def _prove(backend: Backend) -> float:
    backend.warm_up()
    image = np.zeros((1, MODEL_SIZE, MODEL_SIZE, 3), np.uint8)
    slots = backend.describe().slots
    taken_s = math.inf
    with ThreadPoolExecutor(slots) as threads:
        # The quickest of three, since on a busy machine a single one may take many times as long.
        for _ in range(3):
            started = time.perf_counter()
            *_, probability = threads.map(backend.infer, [image] * slots)
            taken_s = min(taken_s, time.perf_counter() - started)
    if (
        probability.shape != (1, MODEL_SIZE, MODEL_SIZE)
        or not ((probability >= 0) & (probability <= 1)).all()
    ):
        raise BackendError("The network's answers are not probabilities.")
    _prove_answers(backend)
    return taken_s / slots


def _prove_answers(backend: Backend) -> None:
    info = backend.describe()
    answers = info.model.get(ANSWERS)
    if answers is None:
        return
    most = _MOST_DIFFERENCE_INT8 if info.precision == "int8" else _MOST_DIFFERENCE
    try:
        difference = difference_from(answers, backend.infer)
    except StampError as error:
        raise BackendError(f"The network's stored answers cannot be read: {error}.") from error
    if not difference <= most:
        raise BackendError(
            f"On the trial images the network's answers differ by {difference:.2f} in probability"
            " from those stored when it was exported: export it again."
        )
