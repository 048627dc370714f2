"""A photo's file → its mask's file and its row, with the server's decoding, batching and network.

Memory holds at most one photo's bytes for each thread, and 128×128 pixels for each that waits.
"""

import errno
import math
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.files import write_atomically
from photos.forms import Form, Found, encoded, forms
from photos.image import ImageError, NoDecoderError, Photo, encode_png, read_photo
from server.backends import BackendInfo
from server.bulk.ledger import Row, Task, also_path
from server.bulk.sources import BulkError
from server.inference.errors import InferenceFailed, Unavailable
from server.inference.loading import Loader
from server.inference.service import Service
from server.observe.metrics import Metrics
from server.settings import Settings

__all__ = ["Options", "PhotoSegmenter"]

# Errors of writing that the next mask would meet too.
_ALL_FAIL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@dataclass(frozen=True)
class Options:
    """How a probability becomes a mask."""

    threshold: float
    """Probability above which a pixel is lesion."""
    clean: bool
    """Whether only the largest region is left, without its holes."""
    also: str = ""
    """Forms of files to write beside the mask, as `photos.forms.forms` reads them."""
    frame: int = 0
    """Which one of each DICOM object, from 1; 0 for the only one."""


class PhotoSegmenter:
    """The network, loaded once, for one event loop.

    Args:
        settings: the server's; those of HTTP are not used.
        options: how a probability becomes a mask.
        root: folder of the photos' paths.
        masks: folder of the masks' paths.
    """

    def __init__(self, settings: Settings, options: Options, root: Path, masks: Path) -> None:
        self._service = Service(settings, Metrics())
        self._loader = Loader(self._service, self._service.networks.default)
        self._pixels = self._service.pixels
        self._options = options
        self._root = root
        self._masks = masks

    async def open(self) -> BackendInfo:
        """Load the network and warm it up.

        Raises:
            BackendError: it cannot be loaded.
        """
        return await self._loader.load()

    async def close(self) -> None:
        """Finish the photos at work, then close the network."""
        await self._loader.close()
        await self._service.close()

    @property
    def at_work(self) -> int:
        """How many photos to work on at a time: some are decoded while a batch of others runs."""
        info, settings = self._service.backend, self._service.settings
        threads = settings.decoders
        return max(2 * (settings.max_batch or info.max_batch) * info.slots, 2 * threads)

    async def segment(self, task: Task) -> Row:
        """Segment one photo; its row says what is wrong with it.

        Raises:
            BulkError: the network fails on every photo.
        """
        service = self._service
        try:
            photo, decode_s = await service.threads.run(self._read, self._root / task.path)
            (inference,), backend = await service.networks.default.infer(
                [photo.pixels], deadline=math.inf, is_gone=lambda: False, bulk=False
            )
            infer_s = (inference.ended - inference.started) / inference.batch_size
            return await service.threads.run(
                self._finish, task, photo, inference.probability, backend, decode_s + infer_s
            )
        except NoDecoderError as error:
            return Row("failed", str(error))
        except ImageError as error:
            return Row("unusable", str(error))
        except OSError as error:
            return Row("failed", error.strerror or repr(error))
        except ValueError as error:
            # No file can have this path, for example with a NUL in it.
            return Row("failed", str(error))
        except Unavailable:
            raise BulkError("The network fails on every photo, the log says why.") from None
        except InferenceFailed:
            return Row("failed", "the network failed on this photo, in its batch and alone")

    def _read(self, path: Path) -> tuple[Photo, float]:
        """Run in a thread: the photo, and the seconds that it took."""
        started = time.perf_counter()
        settings = self._service.settings
        try:
            is_file = stat.S_ISREG(path.stat().st_mode)
        except FileNotFoundError:
            raise FileNotFoundError(0, "there is no such file") from None
        if not is_file:
            if path.is_dir():
                # It was listed although it could not be read: say why it cannot.
                os.scandir(path).close()
            raise OSError(0, "no file")
        data = self._bytes(path)
        photo = read_photo(
            data,
            max_pixels=settings.max_pixels,
            room=self._pixels.room,
            frame=self._options.frame or None,
        )
        return photo, time.perf_counter() - started

    def _bytes(self, path: Path) -> bytes:
        most = self._service.settings.max_body_bytes
        with path.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise ImageError(f"The file has more than {most} bytes, look at --max-body-bytes.")
        return data

    def _encoded(self, form: Form, found: Found, task: Task) -> bytes:
        # Read again rather than kept, so that memory holds one photo for each thread.
        data = self._bytes(self._root / task.path) if form.draws_photo else b""
        max_pixels = self._service.settings.max_pixels
        return encoded(form, found, data, max_pixels=max_pixels, room=self._pixels.room)

    def _finish(
        self,
        task: Task,
        photo: Photo,
        probability: NDArray[np.float32],
        backend: BackendInfo,
        seconds: float,
    ) -> Row:
        """Run in a thread: write the mask, and measure it."""
        started = time.perf_counter()
        width, height = photo.width, photo.height
        found = Found(
            *(probability, width, height, self._options.threshold),
            clean=self._options.clean,
            pixels=photo.pixels,
            frame=self._options.frame or None,
        )
        lesion = found.lesion
        try:
            # The mask comes last: a photo that has one is done.
            for form in forms(self._options.also):
                path = also_path(self._masks.parent, form, task.mask)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, self._encoded(form, found, task))
            mask = self._masks / task.mask
            mask.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(mask, encode_png(found.packed, width, height))
        except OSError as error:
            if error.errno in _ALL_FAIL:
                raise BulkError(f"No mask can be written: {error.strerror}.") from error
            raise
        table = backend.quality
        drawn = found.probability > found.threshold
        quality = None if table is None else table.quality(probability, drawn)
        distance = None if backend.detector is None else backend.detector.distance(photo.pixels)
        x, y, box_width, box_height = lesion.bounding_box or (None,) * 4
        centroid_x, centroid_y = lesion.centroid or (None, None)
        return Row(
            "ok",
            "",
            width,
            height,
            lesion.area,
            lesion.area_fraction,
            x,
            y,
            box_width,
            box_height,
            centroid_x,
            centroid_y,
            lesion.mean_probability,
            lesion.max_probability,
            quality,
            distance,
            backend.name,
            backend.precision,
            round(1000 * (seconds + time.perf_counter() - started), 1),
        )
