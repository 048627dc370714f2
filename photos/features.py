"""Measurements of a lesion's shape and colours, after the A, B and C of dermatoscopy's ABCD rule.

They are measurements of a mask and no diagnosis: they score nothing, and a mask can be wrong. The
rule (Stolz et al., "ABCD rule of dermatoscopy", European Journal of Dermatology 4, 1994; Nachbar et
al., Journal of the American Academy of Dermatology 30, 1994) is applied by people, to asymmetry in
structure and colour too, and to eighths of the border.

`docs/decisions.md` says why this is not done by scikit-image; the tests compare the two.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from photos.image import lesion_mask, unpack_mask
from photos.masks import Rings

__all__ = ["COLOURS", "Features", "convex_hull", "features", "perimeter"]

# Longer side of the mask, in pixels, on which moments and asymmetry are computed: beyond that they
# change in the third digit.
_LONGEST = 512

COLOURS = {
    "white": (255, 255, 255),
    "red": (200, 50, 50),
    "light_brown": (205, 133, 63),
    "dark_brown": (101, 67, 33),
    "blue_grey": (80, 110, 130),
    "black": (0, 0, 0),
}
"""The six colours of the rule, in sRGB. The rule has their names only, these points are chosen
here: the shares can be compared between photos of one camera in one light, and not beyond."""

# sRGB to CIE XYZ (IEC 61966-2-1), and the white of its illuminant D65.
_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_WHITE = _XYZ.sum(axis=1)


@dataclass(frozen=True)
class Features:
    """What is measured; lengths in pixels of the photo."""

    perimeter: float
    """P: length of all outlines, those of holes too, as `photos.masks.polygons` traces them."""
    major_axis: float
    """a = 4 √λ₁: length of the long axis of the ellipse with the mask's second moments, where
    λ₁ ≥ λ₂ are the eigenvalues of the covariance of the lesion's pixels, each of them a square
    (M.-K. Hu, "Visual pattern recognition by moment invariants", 1962)."""
    minor_axis: float
    """b = 4 √λ₂: length of its short axis."""
    orientation: float
    """Direction of the long axis in degrees, −90 < angle ≤ 90: from the x axis towards the y axis,
    which points down, so that a positive angle falls to the right. Means little where a ≈ b."""
    eccentricity: float
    """√(1 − b²/a²): 0 for a circle."""
    asymmetry_major: float
    """|M \\\\ M'| / |M|, where M' is M folded over the long axis: the share of the lesion whose
    mirror image is no lesion. Half of the symmetric difference over the area, as Stoecker, Li and
    Moss have it ("Automatic detection of asymmetry in skin tumors", 1992). 0 is symmetric."""
    asymmetry_minor: float
    """The same for the short axis. Both axes go through the centroid."""
    compactness: float
    """P² / (4 π A), with the mask's area A: 1 for a circle, larger the longer or more ragged."""
    irregularity: float
    """P² a b / (2 π (a² + b²) A): the compactness without the share of elongation, 1 for any
    ellipse (after Golston et al., "Automatic detection of irregular borders in melanoma and other
    skin tumors", 1992; the perimeter of an ellipse is approximated by π √((a² + b²) / 2))."""
    solidity: float
    """A / area of the convex hull of the outlines: 1 without notches."""
    colours: dict[str, float]
    """Share of the lesion's pixels, at the network's 128×128, to which each of `COLOURS` is the
    nearest in CIELAB."""
    colour_mean: tuple[float, float, float]
    """Mean red, green and blue of these pixels, 0 to 255."""
    colour_deviation: tuple[float, float, float]
    """Their standard deviations."""


def features(
    probability: NDArray[np.float32],
    width: int,
    height: int,
    threshold: float,
    *,
    area: int,
    outlines: Sequence[Rings],
    pixels: NDArray[np.uint8],
) -> Features | None:
    """Measure a lesion, all of its parts together.

    Args:
        probability: float32 [128, 128] that the mask is drawn from.
        width, height: the photo's, pixels.
        threshold: lesion is where the probability is above it.
        area: of the mask, pixels of the photo.
        outlines: result of `photos.masks.polygons`, in the photo's pixels.
        pixels: uint8 [128, 128, 3], the network's pixels.

    Returns:
        None if there is no lesion, or one so small that it has no outline.
    """
    scale = min(1.0, _LONGEST / max(width, height))
    columns, rows = max(1, round(width * scale)), max(1, round(height * scale))
    mask = unpack_mask(lesion_mask(probability, columns, rows, threshold), columns)
    inside = pixels[probability > threshold]
    if not (area and outlines and mask.any() and inside.size):
        return None
    across, down = width / columns, height / rows
    row, column = np.nonzero(mask)
    x, y = (column + 0.5) * across, (row + 0.5) * down
    centre = x.mean(), y.mean()
    x, y = x - centre[0], y - centre[1]
    # A pixel is a square and no point: it has a moment of its own.
    covariance = np.cov(np.stack([x, y]), bias=True) + np.diag([across**2, down**2]) / 12
    (least, most), axes = np.linalg.eigh(covariance)
    a, b = 4 * math.sqrt(most), 4 * math.sqrt(least)
    length = perimeter(outlines)

    def asymmetry(axis: NDArray[np.float64]) -> float:
        along = 2 * (x * axis[0] + y * axis[1])
        mirrored = along * axis[0] - x + centre[0], along * axis[1] - y + centre[1]
        return 1 - _share_inside(mask, mirrored[0] / across, mirrored[1] / down)

    return Features(
        perimeter=length,
        major_axis=a,
        minor_axis=b,
        orientation=_degrees(axes[:, 1]),
        eccentricity=math.sqrt(1 - least / most),
        asymmetry_major=asymmetry(axes[:, 1]),
        asymmetry_minor=asymmetry(axes[:, 0]),
        compactness=length**2 / (4 * math.pi * area),
        irregularity=length**2 * a * b / (2 * math.pi * (a**2 + b**2) * area),
        solidity=min(1.0, area / _hull_area([point for part in outlines for point in part[0]])),
        colours=_shares(inside),
        colour_mean=_triple(inside.mean(axis=0)),
        colour_deviation=_triple(inside.std(axis=0)),
    )


def _degrees(axis: NDArray[np.float64]) -> float:
    """Its direction, above -90 and up to 90."""
    degrees = math.degrees(math.atan2(axis[1], axis[0]))
    return degrees - 180 * math.ceil((degrees - 90) / 180)


def _share_inside(mask: NDArray[np.bool_], x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    rows, columns = mask.shape
    within = (x >= 0) & (x < columns) & (y >= 0) & (y < rows)
    hits = mask[y[within].astype(np.intp), x[within].astype(np.intp)]
    return float(np.count_nonzero(hits) / x.size)


def perimeter(outlines: Sequence[Rings]) -> float:
    """Length of all outlines, those of holes too."""
    return sum(_length(ring) for part in outlines for ring in part)


def _length(ring: list[tuple[float, float]]) -> float:
    return sum(math.dist(a, b) for a, b in itertools.pairwise([*ring, ring[0]]))


def _hull_area(points: list[tuple[float, float]]) -> float:
    """The area of the convex hull, at least that of a pixel."""
    hull = convex_hull(points)
    twice = sum(a[0] * b[1] - a[1] * b[0] for a, b in itertools.pairwise([*hull, hull[0]]))
    return max(1.0, abs(twice) / 2)


def convex_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the convex hull (monotone chain; Andrew, 1979), each once and in order."""
    ordered = sorted(set(points))
    return [*_half_hull(ordered), *_half_hull(ordered[::-1])]


def _half_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    half: list[tuple[float, float]] = []
    for x, y in points:
        while len(half) > 1:
            (x0, y0), (x1, y1) = half[-2:]
            if (x1 - x0) * (y - y0) > (y1 - y0) * (x - x0):
                break
            half.pop()
        half.append((x, y))
    return half[:-1]


def _shares(inside: NDArray[np.uint8]) -> dict[str, float]:
    lab, references = _lab(inside), _lab(np.array(list(COLOURS.values())))
    nearest = np.linalg.norm(lab[:, None] - references, axis=2).argmin(axis=1)
    counts = np.bincount(nearest, minlength=len(COLOURS)) / len(inside)
    return dict(zip(COLOURS, counts.tolist(), strict=True))


def _lab(rgb: NDArray[np.integer]) -> NDArray[np.float64]:
    """8-bit sRGB [n, 3] → CIELAB (CIE 15)."""
    values = rgb / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    ratio = linear @ _XYZ.T / _WHITE
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    red, green, blue = values.tolist()
    return red, green, blue
