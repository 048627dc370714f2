"""Photos for calibration and for the parity gate, with their true masks if there are any.

A folder has the ISIC layout: `NAME.jpg` (or `.png`), and the true mask as
`NAME_segmentation.png` in the same folder or another. `model.truth` lists other names of masks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.truth import find_masks, find_photos, read_truth
from photos.image import JpegReader, read_photo

REFERENCE = Path(__file__).parent / "reference"
"""Generated lesions with their masks, which are shipped. The gate uses them by default."""

BATCH = 8


@dataclass(frozen=True)
class Sample:
    """One photo as the network sees it."""

    name: str
    pixels: NDArray[np.uint8]
    """The pixels [128, 128, 3], RGB."""
    width: int
    """Width of the photo; like `height`, in pixels."""
    height: int
    truth: NDArray[np.bool_] | None
    """The true mask [height, width], lesion true; None if there is none."""


def load_samples(
    images: Path,
    masks: Path | None = None,
    limit: int | None = None,
    jpeg: JpegReader | None = None,
) -> list[Sample]:
    """Read up to `limit` photos of a folder, spread evenly over its sorted names.

    `jpeg` decodes usual JPEG files, as for `read_photo`.

    Raises:
        FileNotFoundError: the folder holds none.
        photos.image.ImageError: a photo is bad.
        model.truth.DataError: a mask is bad.
    """
    files = find_photos(images) if images.is_dir() else []
    if not files:
        raise FileNotFoundError(f"{images} holds no photo")
    if limit is not None and limit < len(files):
        files = [files[i * len(files) // limit] for i in range(limit)]
    found = find_masks(files, masks or images)
    return [_load(path, found.get(path), jpeg) for path in files]


def _load(path: Path, mask: Path | None, jpeg: JpegReader | None) -> Sample:
    photo = read_photo(path.read_bytes(), jpeg=jpeg)
    truth = None
    if mask is not None:
        picture = Image.fromarray(read_truth(mask))
        size = (photo.width, photo.height)
        truth = np.asarray(picture.resize(size, Image.Resampling.NEAREST))
    return Sample(path.stem, photo.pixels, photo.width, photo.height, truth)


def batches(samples: Sequence[Sample], size: int = BATCH) -> Iterator[NDArray[np.uint8]]:
    """Yield the samples' pixels as uint8 [n, 128, 128, 3] with n ≤ `size`."""
    for start in range(0, len(samples), size):
        yield np.stack([sample.pixels for sample in samples[start : start + size]])
