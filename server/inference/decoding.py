"""JPEG files decoded on the GPU (`--decode gpu`), for as long as that works."""

import logging

import numpy as np
from numpy.typing import NDArray

from engines.jpeg import GpuJpeg, GpuJpegError
from server.observe.metrics import Metrics

__all__ = ["GpuDecoding"]

log = logging.getLogger("slsnet.decoding")


class GpuDecoding:
    """A `photos.image.JpegReader` that leaves all photos to the CPU once the GPU has failed.

    Args:
        metrics: counts the photos.

    Raises:
        GpuJpegError: the GPU cannot decode here, or its pixels are too far off the CPU's.
    """

    def __init__(self, metrics: Metrics) -> None:
        try:
            self._read: GpuJpeg | None = GpuJpeg()
        except GpuJpegError as error:
            raise GpuJpegError(f"--decode gpu: {error}") from error
        self._metrics = metrics
        log.info("JPEG photos are decoded on %s", self._read.said)

    def __call__(self, data: bytes, orientation: int, size: int) -> NDArray[np.uint8] | None:
        """See `GpuJpeg.__call__`; None where the GPU fails."""
        read = self._read
        if read is None:
            return None
        try:
            pixels = read(data, orientation, size)
        except GpuJpegError as error:
            # It may be an error that the process does not survive on the GPU, and no photo waits
            # for the next one to fail too.
            # Photos that were there meanwhile fail as well; the log says it once.
            works, self._read = self._read, None
            if works is not None:
                log.error("the CPU decodes all photos from now on, the GPU failed: %s", error)
            return None
        if pixels is not None:
            self._metrics.decoded_on_gpu.inc()
        return pixels
