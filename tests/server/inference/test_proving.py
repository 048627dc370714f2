"""A backend serves only if all of its ways through the network answer rightly."""

import asyncio
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from server.backends import BackendError, BackendInfo, Images
from server.inference.proving import Proved, proved


class _Backend:
    """Two photos run at the same time; each call has a number, and may be answered wrongly."""

    def __init__(self, is_wrong: Callable[[int, int], bool]) -> None:
        """`is_wrong` gets a call's number, from 0 on, and the images of its batch."""
        self.closed = False
        self._is_wrong = is_wrong
        self._calls = itertools.count()

    def describe(self) -> BackendInfo:
        return BackendInfo("torch", "1", "cpu", "fp32", max_batch=4, slots=2)

    def warm_up(self) -> None:
        pass

    def infer(self, batch: Images) -> NDArray[np.float32]:
        wrong = self._is_wrong(next(self._calls), len(batch))
        return np.full((len(batch), 128, 128), 2 if wrong else 0.5, np.float32)

    def close(self) -> None:
        self.closed = True


def _prove(backend: _Backend) -> Proved:
    with ThreadPoolExecutor(1) as pool:
        return asyncio.run(proved(backend, Path("none.onnx"), pool))


def test_a_backend_that_answers_rightly_serves() -> None:
    backend = _Backend(lambda *_: False)
    assert _prove(backend).seconds_an_image > 0
    assert not backend.closed


@pytest.mark.parametrize(
    "is_wrong",
    [
        pytest.param(lambda call, images: images == 1 and call % 2 == 0, id="the first slot"),
        pytest.param(lambda call, images: images == 1 and call % 2 == 1, id="the second slot"),
        pytest.param(lambda _, images: images > 1, id="a batch"),
    ],
)
def test_a_backend_that_answers_wrongly_is_refused_and_closed(
    is_wrong: Callable[[int, int], bool],
) -> None:
    backend = _Backend(is_wrong)
    with pytest.raises(BackendError, match="not probabilities"):
        _prove(backend)
    assert backend.closed
