"""A lesion in millimetres, where its photo says how large a pixel is."""

import math
from dataclasses import dataclass

import numpy as np

from photos.features import Features, convex_hull, perimeter
from photos.masks import Rings

__all__ = ["Millimetres", "millimetres"]


@dataclass(frozen=True)
class Millimetres:
    """Measures on the skin, as far as the photo's own scale is right."""

    pixel: tuple[float, float]
    """A pixel of the photo, across and down; mm."""
    area: float
    """mm²."""
    perimeter: float
    """As in `Features`, mm; so are the axes."""
    major_axis: float
    minor_axis: float
    diameter: float
    """Greatest distance of two points of the outline, mm."""


def millimetres(
    features: Features, area: int, outlines: list[Rings], pixel: tuple[float, float]
) -> Millimetres:
    """Measure a lesion whose pixels need not be squares.

    Args:
        features: the lesion's, in pixels of the photo.
        area: of the mask, pixels of the photo.
        outlines: result of `photos.masks.polygons`, in the photo's pixels.
        pixel: millimetres of a pixel, across and down.
    """
    across, down = pixel
    scaled = [[[(x * across, y * down) for x, y in ring] for ring in part] for part in outlines]
    # The ellipse of the second moments, stretched as the pixels are.
    angle = math.radians(features.orientation)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moments = turn @ np.diag([features.major_axis**2, features.minor_axis**2]) @ turn.T
    least, most = np.linalg.eigvalsh(moments * np.outer(pixel, pixel))
    hull = np.array(convex_hull([point for part in scaled for point in part[0]]))
    return Millimetres(
        pixel=pixel,
        area=area * across * down,
        perimeter=perimeter(scaled),
        major_axis=math.sqrt(most),
        minor_axis=math.sqrt(max(0.0, least)),
        diameter=float(np.linalg.norm(hull[:, None] - hull[None], axis=2).max()),
    )
