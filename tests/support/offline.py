"""The network without a server: what each answer must equal, whatever it was batched with."""

import numpy as np
from numpy.typing import NDArray

from photos.image import Photo, lesion_mask, read_photo, unpack_mask
from server.backends import open_backend
from tests.support import MODEL

CPU_BACKEND = "onnxruntime"
"""What `auto` takes on this machine, where there is no GPU."""


class Offline:
    """The shipped network on one thread."""

    def __init__(self) -> None:
        self._backend = open_backend(CPU_BACKEND, MODEL, threads=1)

    def probability(self, photo: Photo) -> NDArray[np.float32]:
        """float32 [128, 128]"""
        probability: NDArray[np.float32] = self._backend.infer(photo.pixels[None])[0]
        return probability

    def mask(self, data: bytes, threshold: float = 0.5) -> NDArray[np.bool_]:
        """bool [height, width]"""
        photo = read_photo(data)
        packed = lesion_mask(self.probability(photo), photo.width, photo.height, threshold)
        return unpack_mask(packed, photo.width)
