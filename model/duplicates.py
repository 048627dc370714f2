"""Photos that belong together: copies of one photo, and groups that a table gives.

It is hand-written because the threshold was measured on ISIC's photos, and numpy needs few lines.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

_SIDE = 16
"""The compared thumbnails have this side, in pixels."""

_BLUR = 5
"""A mean of this width, in pixels, is subtracted: every photo has a dark patch amid skin."""

_LEAST_CORRELATION = 0.96
"""Two photos are copies if they correlate by so much. It was chosen on ISIC photos of even id:
the 884 that 2017 and 2018 store in different shapes and qualities correlate by 0.976 or more,
photos of different lesions by 0.939 at most; for odd ids it is 0.988 (907 photos) and 0.931."""

_ROWS = 512
"""Photos compared with all others at a time, which bounds memory."""


def groups(images: Iterable[NDArray[np.uint8]], labels: Sequence[Hashable | None]) -> list[int]:
    """For each photo, give the index of the first one that it belongs together with, often its own.

    Two photos are copies if their thumbnails, turned and mirrored to fit best, correlate. It finds
    copies of another size, format, quality, brightness and contrast. Two photos that belong
    together with a third one belong together.

    Args:
        images: uint8 [3, side, side] each, the whole frame squashed; the side is a multiple of 16.
        labels: one for each photo. Photos of equal labels belong together; None equals no other.
    """
    first = list(range(len(labels)))

    def root(index: int) -> int:
        while first[index] != index:
            first[index] = index = first[first[index]]
        return index

    def join(one: int, other: int) -> None:
        low, high = sorted((root(one), root(other)))
        first[high] = low

    known: dict[Hashable, int] = {}
    for index, label in enumerate(labels):
        if label is not None:
            join(index, known.setdefault(label, index))
    for one, other in _copies(images):
        join(one, other)
    return [root(index) for index in range(len(labels))]


def _copies(images: Iterable[NDArray[np.uint8]]) -> Iterator[tuple[int, int]]:
    """Find the pairs of copies, as pairs of indices."""
    thumbnails = [_thumbnail(image) for image in images]
    if not thumbnails:
        return
    small = np.stack(thumbnails)
    upright = small.reshape(len(small), -1)
    for turns in range(4):
        turned = np.rot90(small, turns, (1, 2))
        for form in (turned, turned[..., ::-1]):
            forms = form.reshape(upright.shape)
            for start in range(0, len(upright), _ROWS):
                alike = upright[start : start + _ROWS] @ forms.T > _LEAST_CORRELATION
                for one, other in np.argwhere(alike).tolist():
                    if start + one != other:
                        yield start + one, other


def _thumbnail(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[3, side, side] → [16, 16] of length 1, so that the product of two is their correlation."""
    step = image.shape[-1] // _SIDE
    grey = image.reshape(3, _SIDE, step, _SIDE, step).mean((0, 2, 4), np.float32)
    around = sliding_window_view(np.pad(grey, _BLUR // 2, "edge"), (_BLUR, _BLUR))
    detail: NDArray[np.float32] = grey - around.mean((2, 3))
    detail -= detail.mean()
    detail /= max(float(np.linalg.norm(detail)), 1e-6)
    return detail
