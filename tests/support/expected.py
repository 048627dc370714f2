"""The right mask of a photo, and whether a server's answer is it."""

from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from photos.image import encode_png, lesion_mask, unpack_mask
from trt_build.parity import GATES, mask_iou

__all__ = ["Expected", "Verdict"]

Verdict = Literal["identical", "rounding", "wrong"]

_ROUNDING = {"fp32": 1e-4, "bf16": 0.02}
"""Rounding changes a probability by far less. In float32 it comes from sums in another order in
another batch, in bfloat16 from values of 8 bits (0.01 at most on ISIC's validation photos)."""


class Expected:
    """The mask of one photo, predicted without a server."""

    def __init__(self, probability: NDArray[np.float32], width: int, height: int) -> None:
        """Make the mask and its PNG from the network's answer.

        Args:
            probability: the network's answer, float32 [128, 128].
            width: width of the photo, pixels.
            height: height of the photo, pixels.
        """
        self.png = encode_png(lesion_mask(probability, width, height), width, height)
        self._probability = probability
        self._size = (width, height)
        self._verdicts: dict[tuple[bytes, str], Verdict] = {}

    def verdict(self, answer: bytes, precision: str) -> Verdict:
        """Compare a server's PNG with this mask.

        In fp32 and bf16 a pixel may differ where the probability is so near to the threshold that
        rounding explains it (`_ROUNDING`). At less precision than fp32, a mask also passes if it
        overlaps as much as that precision's gate asks (`trt_build.parity`).
        """
        if answer == self.png:
            return "identical"
        if (answer, precision) not in self._verdicts:
            self._verdicts[answer, precision] = self._compare(answer, precision)
        return self._verdicts[answer, precision]

    def _compare(self, answer: bytes, precision: str) -> Verdict:
        width, height = self._size
        try:
            with Image.open(BytesIO(answer), formats=("PNG",)) as picture:
                found = np.asarray(picture.convert("1"))
        except (UnidentifiedImageError, OSError):
            return "wrong"
        if found.shape != (height, width):
            return "wrong"
        rounding = _ROUNDING.get(precision, 0)
        least, most = self._at(0.5 + rounding), self._at(0.5 - rounding)
        if not (least & ~found).any() and not (found & ~most).any():
            return "rounding"
        if precision == "fp32":
            return "wrong"
        gate = next((g.mask_iou for p, g in GATES.items() if p == precision), None)
        iou = mask_iou(found, self._at(0.5))
        return "rounding" if iou >= (gate or GATES["int8"].mask_iou) else "wrong"

    def _at(self, threshold: float) -> NDArray[np.bool_]:
        width, height = self._size
        return unpack_mask(lesion_mask(self._probability, width, height, threshold), width)
