"""Dermoscopic data sets: images and masks are paired, split by id, and cached as pixels.

Official layouts (ISIC 2016, 2017, 2018, PH2) are recognised by their folder names; any other folder
pair holds `X.jpg|png|bmp|...` and `X_segmentation.png` or the like (`model.truth`). The whole set
is decoded once, by the function that serving uses, and kept as uint8, so that an epoch never
waits for the disk.
"""

import argparse
import contextlib
import csv
import hashlib
import math
import os
import re
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.files import replacing
from common.progress import TELL_EVERY_S, tell
from model.truth import IMAGE_SUFFIXES, DataError, find_masks, find_photos, read_truth
from photos.image import ImageError, read_photo

Split = Literal["training", "validation", "test"]

_PARTS_2017: tuple[tuple[Split, str], ...] = (
    ("training", "Training"),
    ("validation", "Validation"),
    ("test", "Test_v2"),
)
_PARTS_2018: tuple[tuple[Split, str], ...] = (*_PARTS_2017[:2], ("test", "Test"))
# Set, split, image folder, mask folder. Where an id repeats, the later set's mask is taken.
_ISIC_2016 = "ISBI2016_ISIC_Part1"
_LAYOUTS: tuple[tuple[str, Split, str, str], ...] = (
    ("isic2016", "training", f"{_ISIC_2016}_Training_Data", f"{_ISIC_2016}_Training_GroundTruth"),
    ("isic2016", "test", f"{_ISIC_2016}_Test_Data", f"{_ISIC_2016}_Test_GroundTruth"),
    *(
        ("isic2017", split, f"ISIC-2017_{part}_Data", f"ISIC-2017_{part}_Part1_GroundTruth")
        for split, part in _PARTS_2017
    ),
    *(
        ("isic2018", split, f"ISIC2018_Task1-2_{part}_Input", f"ISIC2018_Task1_{part}_GroundTruth")
        for split, part in _PARTS_2018
    ),
)


_ID_COLUMNS = ("isic_id", "image_id", "image_name", "image", "id")


@dataclass(frozen=True)
class Sample:
    """One image and its mask, still on disk."""

    id: str
    image: Path
    mask: Path
    origin: str = "folder"
    split: Split = "training"
    group: str = ""
    """The lesion or patient of this photo. Photos of one group stay together; empty: its id."""


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--data` (by default $SLSNET_DATA) and `--cache`, which every training command takes."""
    data = Path(os.environ.get("SLSNET_DATA", "../shared/data"))
    parser.add_argument(
        "--data", type=Path, default=data, help="folder of data sets, one folder each"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("runs/cache"),
        help="folder for decoded pixels, used again by the next run",
    )


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--images` and `--masks`, whose folders `find_pairs` reads."""
    parser.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="folder of photos"
    )
    parser.add_argument(
        "--masks",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the annotators' masks; may be the same",
    )


def add_held_out_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--runs`, which held photos out (`data.folds`)."""
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        required=True,
        metavar="RUN",
        help="folders of runs, each of which held out a fold",
    )


def find_pairs(
    images: Path, masks: Path, origin: str = "folder", split: Split = "training"
) -> list[Sample]:
    """Pair the images of one folder with the masks of another (or the same) folder, sorted by id.

    Raises:
        DataError: a folder is missing or holds no images, or an image has no mask.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder")
    photos = find_photos(images)
    found = find_masks(photos, masks)
    samples = [Sample(photo.stem, photo, mask, origin, split) for photo, mask in found.items()]
    missing = [photo for photo in photos if photo not in found]
    if missing:
        more = f" and {len(missing) - 1} more have" if len(missing) > 1 else " has"
        raise DataError(
            f"{missing[0]}{more} no mask: expected {masks / missing[0].stem}_segmentation.png; "
            "add the mask or remove the image"
        )
    if not samples:
        raise DataError(f"{images} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    repeated = [name for name, count in Counter(s.id for s in samples).items() if count > 1]
    if repeated:
        raise DataError(f"{images} holds {repeated[0]} more than once, in different formats")
    return samples


def find_samples(root: Path) -> list[Sample]:
    """Find all official data sets at `root` or two levels below at most, or else one plain pair.

    Raises:
        DataError: nothing is found, or an image has no mask.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: pass the folder that holds the data sets")
    parents = [root, *sorted(p for p in root.iterdir() if p.is_dir())]
    parents += [q for p in parents[1:] for q in sorted(p.iterdir()) if q.is_dir()]
    samples: list[Sample] = []
    for parent in parents:
        for origin, split, images, masks in _LAYOUTS:
            if (parent / images).is_dir():
                samples += find_pairs(parent / images, parent / masks, origin, split)
        if (ph2 := parent / "PH2 Dataset images").is_dir():
            samples += _find_ph2(ph2)
    if samples:
        return samples
    for images, masks in (("images", "masks"), ("images", "images")):
        if (root / images).is_dir() and (root / masks).is_dir():
            return find_pairs(root / images, root / masks)
    if photos := find_photos(root):
        for masks_folder in (root, root / "masks"):
            if masks_folder.is_dir() and find_masks(photos, masks_folder):
                return find_pairs(root, masks_folder)
    raise DataError(
        f"{root} holds no data set: no folders of an official layout, no images/ beside masks/, "
        "and no X_segmentation.png beside X.jpg"
    )


def _find_ph2(root: Path) -> list[Sample]:
    """Find the samples of PH2, which has a folder for each case.

    They are for testing only, since the licence is not commercial.
    """
    samples = []
    for case in sorted(p for p in root.iterdir() if re.fullmatch(r"IMD\d+", p.name)):
        image = case / f"{case.name}_Dermoscopic_Image" / f"{case.name}.bmp"
        mask = case / f"{case.name}_lesion" / f"{case.name}_lesion.bmp"
        for path in (image, mask):
            if not path.is_file():
                raise DataError(f"{path} is missing: unpack PH2 again")
        samples.append(Sample(case.name, image, mask, "ph2", "test"))
    return samples


def select(samples: Iterable[Sample], split: Split) -> list[Sample]:
    """The samples of one split, sorted by id; each id is there once.

    Where an id is in several data sets the newest set's mask is taken (ISIC 2018 redrew some).
    Ids of validation and test sets of any data set are kept out of training: 2018's training set
    contains most of 2017's validation and test sets.
    """
    samples = list(samples)
    held_out = {s.id for s in samples if s.split != "training"}
    chosen: dict[str, Sample] = {}
    for sample in sorted(samples, key=lambda s: (s.origin, s.id)):
        if sample.split == split and not (split == "training" and sample.id in held_out):
            chosen[sample.id] = sample
    return sorted(chosen.values(), key=lambda s: s.id)


def refuse_leakage(splits: Mapping[str, Sequence[Sample]]) -> None:
    """Refuse an id that is in two splits.

    Raises:
        DataError: an id is in two splits; the message names the id and both splits.
    """
    owner: dict[str, str] = {}
    for name, samples in splits.items():
        for sample in samples:
            other = owner.setdefault(sample.id, name)
            if other != name:
                raise DataError(
                    f"{sample.id} is in both {other} and {name}: remove it from one of them, "
                    "or the score means nothing"
                )


def read_groups(path: Path, column: str) -> dict[str, str]:
    """Read the lesion or patient of each id from a table like ISIC's metadata.

    Args:
        path: CSV with a header. The first column called `isic_id`, `image_id`, `image_name`,
            `image` or `id` holds the id, with or without a file's suffix.
        column: name of the column of groups. An id without a group stands alone.

    Raises:
        DataError: the table cannot be read, or lacks these columns.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            names = list(table.fieldnames or ())
            rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"data.groups: {path} is not a readable CSV file: {error}") from error
    ids = [name for name in names if name in _ID_COLUMNS and name != column]
    if not ids or column not in names:
        wanted = f"{column!r} (data.group_column)" if ids else f"of ids ({', '.join(_ID_COLUMNS)})"
        raise DataError(
            f"data.groups: {path} has no column {wanted}; there are: {', '.join(names) or 'none'}"
        )
    found: dict[str, str] = {}
    for row in rows:
        name, group = ((row[key] or "").strip() for key in (ids[0], column))
        if name.lower().endswith(IMAGE_SUFFIXES):
            name = name.rpartition(".")[0]
        if group and found.setdefault(name, group) != group:
            raise DataError(f"data.groups: {path} has {name} in {found[name]} and in {group}")
    return found


def hold_out(samples: Sequence[Sample], fold: int, folds: int) -> tuple[list[Sample], list[Sample]]:
    """Split by a hash of the id: the first list has all folds but one, the second that fold.

    Samples of one group (`Sample.group`) stay together.
    """
    keys = [(s.group or s.id).encode() for s in samples]
    inside = [int(hashlib.sha256(key).hexdigest(), 16) % folds == fold for key in keys]
    return (
        [s for s, held in zip(samples, inside, strict=True) if not held],
        [s for s, held in zip(samples, inside, strict=True) if held],
    )


@dataclass(frozen=True)
class PixelSet:
    """Decoded samples: uint8 images [n, 3, side, side], masks [n, 1, side, side]; 255 is lesion."""

    ids: tuple[str, ...]
    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]

    def of(self, samples: Sequence[Sample]) -> "PixelSet":
        """The pixels of `samples`, in their order."""
        if (wanted := tuple(s.id for s in samples)) == self.ids:
            return self
        row = {name: index for index, name in enumerate(self.ids)}
        rows = [row[name] for name in wanted]
        return PixelSet(wanted, self.images[rows], self.masks[rows])


def read_mask(
    path: Path, side: int, frame: tuple[int, int], allow_uniform: bool
) -> NDArray[np.uint8]:
    """Read a true mask and average it to side × side; uint8, 255 is lesion.

    Args:
        path: a black and white image.
        side: side of the result, pixels.
        frame: width and height of the photo that the mask belongs to, pixels.
        allow_uniform: whether a mask without lesion, or without skin, is accepted.

    Raises:
        DataError: the mask cannot be read, has another size than its image, or is uniform.
    """
    mask = read_truth(path)
    if mask.shape != frame[::-1]:
        raise DataError(
            f"{path} is {mask.shape[1]}×{mask.shape[0]}, its image {frame[0]}×{frame[1]}: "
            "resize the mask to its image"
        )
    if not allow_uniform and mask.all() == mask.any():
        what = "all lesion" if mask.any() else "empty"
        raise DataError(
            f"{path} is {what}: redraw it, remove the pair, or set data.allow_uniform_masks=true"
        )
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX))


def load_pixels(
    samples: Sequence[Sample], side: int, cache: Path | None = None, allow_uniform: bool = False
) -> PixelSet:
    """Decode every sample once. The folder `cache`, if given, keeps the pixels for the next run.

    Raises:
        DataError: an image or mask cannot be used; the message names the file.
    """
    ids = tuple(s.id for s in samples)
    entry = None
    if cache is not None:
        key = hashlib.sha256(f"3 {side} {allow_uniform}".encode())
        for sample in samples:
            for path in (sample.image, sample.mask):
                stat = path.stat()
                key.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        entry = cache / f"{key.hexdigest()[:16]}-{side}px.npz"
        if entry.is_file():
            # What numpy raises depends on where the file is damaged.
            damaged = OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile
            with contextlib.suppress(*damaged), entry.open("rb") as file, np.load(file) as stored:
                return PixelSet(ids, stored["images"], stored["masks"])

    def decode(sample: Sample) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        try:
            photo = read_photo(sample.image.read_bytes(), size=side)
        except (ImageError, OSError) as error:
            raise DataError(f"{sample.image} cannot be used: {error}") from error
        mask = read_mask(sample.mask, side, (photo.width, photo.height), allow_uniform)
        return photo.pixels.transpose(2, 0, 1), mask[None]

    pairs = []
    began = time.monotonic()
    told = -math.inf
    with ThreadPoolExecutor() as pool:
        for pair in pool.map(decode, samples):
            pairs.append(pair)
            if (now := time.monotonic()) - told > TELL_EVERY_S:
                told = now
                left = (now - began) / len(pairs) * (len(samples) - len(pairs))
                tell(f"decoding photo {len(pairs)}/{len(samples)}", left)
    shape = (0, 3, side, side)
    images = np.stack([p[0] for p in pairs]) if pairs else np.empty(shape, np.uint8)
    masks = np.stack([p[1] for p in pairs]) if pairs else np.empty((0, 1, side, side), np.uint8)
    if cache is not None and entry is not None:
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(entry) as path:
            np.savez(path, images=images, masks=masks)
    return PixelSet(ids, images, masks)
