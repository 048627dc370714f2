"""True masks: which file belongs to which photo, and which of its pixels are lesion.

Training, evaluation, calibration and parity use it, so that a folder means the same to each.
"""

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from photos import formats
from photos.image import FORMATS

LESION_ABOVE = 128
"""A mask's grey value (of 255) above this is lesion, as in the official scorer."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""Suffixes of photos and masks, in any case."""

_SURELY_A_MASK = "_segmentation"
_MASK_ENDINGS = (_SURELY_A_MASK, "_lesion", "_mask")
"""What follows the photo's name in a mask's name, before the suffix, in any case."""


class DataError(ValueError):
    """The data cannot be used as it is. The message names the file or id, and the fix."""


def find_photos(folder: Path) -> list[Path]:
    """The photos of a folder, sorted: all pictures except masks, superpixels and hidden files."""
    pictures = [path for path in sorted(folder.iterdir()) if _is_picture(path)]
    stems = {path.stem for path in pictures}
    return [path for path in pictures if not _is_mask(path.stem, stems)]


def find_masks(photos: Iterable[Path], masks: Path) -> dict[Path, Path]:
    """Find the mask of each photo in the folder `masks`. Photos without a mask are left out.

    A mask has the photo's name and then `_segmentation`, `_lesion` or `_mask`. In another folder
    than the photo's it may have just the photo's name. The suffix may be that of any picture.

    Raises:
        DataError: two files could be the mask of one photo.
    """
    by_name: dict[str, list[Path]] = {}
    for path in sorted(masks.iterdir()):
        if _is_picture(path):
            by_name.setdefault(path.stem.lower(), []).append(path)
    found = {}
    for photo in photos:

        def named(*endings: str, photo: Path = photo) -> list[Path]:
            return [
                path
                for ending in endings
                for path in by_name.get((photo.stem + ending).lower(), ())
                if path.stem.startswith(photo.stem)
            ]

        fitting = named(*_MASK_ENDINGS)
        if not fitting and photo.parent.resolve() != masks.resolve():
            fitting = named("")
        if len(fitting) > 1:
            raise DataError(
                f"{fitting[0]} and {fitting[1].name} could both be the mask of {photo.name}:"
                " remove one of them"
            )
        if fitting:
            found[photo] = fitting[0]
    return found


def read_truth(path: Path) -> NDArray[np.bool_]:
    """Read a mask as bool [height, width]. Above 128 is lesion, as in the official scorer. The mask
    is turned by its EXIF orientation, as photos are.

    Raises:
        DataError: the file does not decode, would be read wrongly, is transparent somewhere, or is
            no black and white picture with lesion in white.
    """
    try:
        data = path.read_bytes()
        with Image.open(BytesIO(data), formats=FORMATS) as file:
            transparent = _is_transparent(file)
            rare = _is_rare(file, data)
            deep = formats.Grey.of(file)
            upright = ImageOps.exif_transpose(file)
            if upright.mode == "1" and not transparent:
                return np.asarray(upright)
            grey = _levels(upright, deep)
    except Exception as error:  # Pillow's errors on damaged files are an open list
        raise DataError(f"{path} does not decode as a mask ({error}): replace it") from error
    if rare:
        raise DataError(
            f"{path} is stored in a way that few programs read rightly: save it as a PNG of 8 bits,"
            " lesion as 255 and the rest as 0"
        )
    if transparent:
        raise DataError(
            f"{path} is transparent in places, which may stand for lesion or for skin: save it"
            " without transparency, lesion as 255 and the rest as 0"
        )
    brightest = int(grey.max())
    if 0 < brightest <= LESION_ABOVE:
        raise DataError(
            f"{path} has no value above {LESION_ABOVE}, the brightest is {brightest}: store lesion"
            " as 255 and the rest as 0"
        )
    if np.mean((grey > 63) & (grey < 192)) > 0.1:  # resizing leaves a few at the border
        raise DataError(
            f"{path} is not black and white, over 10 % of it is grey: a mask is expected,"
            " lesion 255 and the rest 0"
        )
    return is_lesion(grey)


def is_lesion(grey: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which pixels of a mask are lesion: uint8 → bool, of the same shape."""
    return grey > LESION_ABOVE


def _is_rare(file: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether Pillow reads the file wrongly, or 0 is white on a scale that has no black."""
    deep = file.mode in ("I", "F") or file.mode.startswith("I;16")
    return formats.refusal(file, data) is not None or (deep and formats.Grey.of(file).inverted)


def _levels(picture: Image.Image, grey: formats.Grey) -> NDArray[Any]:
    """The grey values, 0 to 255. Brighter values become 255."""
    if picture.mode in ("I", "F"):
        values: NDArray[Any] = np.nan_to_num(grey.values(picture))
        return values.clip(0, 255)
    return np.asarray(picture.convert("L"))


def _is_transparent(file: Image.Image) -> bool:
    """Whether any pixel is transparent. An alpha channel may be opaque throughout."""
    if not file.has_transparency_data:
        return False
    if file.mode.startswith("I"):  # Pillow does not convert it to RGBA
        return True
    return int(np.asarray(file.convert("RGBA").getchannel("A")).min()) < 255


def _is_picture(path: Path) -> bool:
    return not path.name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES


def _is_mask(stem: str, stems: set[str]) -> bool:
    """Whether a picture is the mask of another in its folder, or ISIC's superpixels of it."""
    lower = stem.lower()
    return lower.endswith((_SURELY_A_MASK, "_superpixels")) or any(
        lower.endswith(ending) and stem[: -len(ending)] in stems for ending in _MASK_ENDINGS
    )
