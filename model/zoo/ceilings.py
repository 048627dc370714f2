"""What methods in two steps could reach at best: a perfect detector, or perfect labels of parts.

    python -m model.zoo.ceilings --images DIR --masks DIR

Source: Unver and Ayan 2019 (doi:10.3390/diagnostics9030072) give GrabCut a box that YOLO found;
others label superpixels. Here the box is that of the annotated mask, and each superpixel has the
label of most of its pixels. So no detector is trained, and none can do better than these figures.
Implementation: OpenCV's GrabCut (Apache-2.0) and scikit-image's SLIC (BSD-3-Clause).
Figures are mean Jaccards over photos, at the photos' size reduced to `--side`.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.program import Help
from model.data import Sample, add_pair_arguments, find_pairs
from model.metrics import count, jaccard
from model.truth import DataError, read_truth
from photos.image import ImageError, read_photo

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

SEGMENTS = (300, 1000)


def grabcut(pixels: Pixels, truth: Mask, margin: float = 0.02) -> Mask:
    """GrabCut from the box of the annotated mask.

    Args:
        pixels: uint8 [H, W, 3], RGB.
        truth: bool [H, W]; where it is empty or fills the frame, there is nothing to cut.
        margin: added to the box on every side, a share of the frame.
    """
    import cv2

    rows, columns = (np.flatnonzero(truth.any(axis)) for axis in (1, 0))
    if not len(rows):
        return truth
    height, width = truth.shape
    top, bottom = _widened(rows, height, margin)
    left, right = _widened(columns, width, margin)
    if (bottom - top, right - left) == (height, width):
        return np.ones_like(truth)  # it learns the background from what lies around the box
    found = np.zeros(truth.shape, np.uint8)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    box = (left, top, right - left, bottom - top)
    cv2.setRNGSeed(0)
    bgr = np.ascontiguousarray(pixels[:, :, ::-1])
    cv2.grabCut(bgr, found, box, *models, 5, cv2.GC_INIT_WITH_RECT)
    cut: Mask = np.isin(found, (cv2.GC_FGD, cv2.GC_PR_FGD))
    return cut


def _widened(places: NDArray[np.intp], side: int, margin: float) -> tuple[int, int]:
    room = round(margin * side)
    return max(0, int(places[0]) - room), min(side, int(places[-1]) + 1 + room)


def superpixels(pixels: Pixels, truth: Mask, segments: int) -> Mask:
    """SLIC's superpixels, each with the label of most of its pixels.

    Args:
        pixels: uint8 [H, W, 3], RGB.
        truth: bool [H, W].
        segments: about how many superpixels.
    """
    from skimage.segmentation import slic

    # Looser and smoother than by default (10 and 0): parts follow colours, and less so hair.
    labels = slic(pixels, n_segments=segments, compactness=3, sigma=2, start_label=0)
    lesion = np.bincount(labels.ravel(), weights=truth.ravel())
    majority = 2 * lesion > np.bincount(labels.ravel())
    labelled: Mask = majority[labels]
    return labelled


METHODS: dict[str, Callable[[Pixels, Mask], Mask]] = {
    "GrabCut in the annotated box": grabcut,
    **{f"SLIC, {n} segments": partial(superpixels, segments=n) for n in SEGMENTS},
}


def ceilings(samples: Sequence[Sample], side: int = 512) -> dict[str, float]:
    """The mean Jaccard of every method over photos with their masks.

    Raises:
        DataError: an image or a mask cannot be used.
    """

    def score(sample: Sample) -> list[float]:
        try:
            pixels = read_photo(sample.image.read_bytes(), size=side).pixels
        except (ImageError, OSError) as error:
            raise DataError(f"{sample.image}: {error}") from error
        grey = Image.fromarray(read_truth(sample.mask).astype(np.uint8) * 255)
        truth = np.asarray(grey.resize((side, side), Image.Resampling.BOX)) > 127
        found = np.stack([method(pixels, truth) for method in METHODS.values()])
        figures: list[float] = jaccard(count(found, np.broadcast_to(truth, found.shape))).tolist()
        return figures

    # One photo at a time: GrabCut's random numbers are of the whole process.
    figures = np.array([score(sample) for sample in samples])
    return dict(zip(METHODS, figures.mean(0).tolist(), strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m model.zoo.ceilings", description=__doc__, formatter_class=Help
    )
    add_pair_arguments(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="the first N photos (default: all)")
    parser.add_argument(
        "--side",
        type=int,
        default=512,
        metavar="PIXELS",
        help="longest side that photos are reduced to",
    )
    args = parser.parse_args(arguments)
    try:
        samples = find_pairs(args.images, args.masks)[: args.limit]
        figures = ceilings(samples, args.side)
    except ModuleNotFoundError as error:
        parser.exit(1, f"error: {error}: pip install -r requirements-zoo.txt\n")
    except (DataError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"mean Jaccard over {len(samples)} photos at {args.side}×{args.side}")
    for name, value in figures.items():
        print(f"{name:>30}  {value:.3f}")


if __name__ == "__main__":
    main()
