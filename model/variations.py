"""Photos as a poorer camera, a hastier hand or a smaller file would give them, in three strengths.

`model.report` asks how many of a network's points each costs. All work on squares of RGB, uint8
[side, side, 3]; lengths are in pixels of a side of 256.
"""

from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Pixels = NDArray[np.uint8]


def blurred(pixels: Pixels, sigma: float) -> Pixels:
    """Out of focus: a Gaussian."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def noisy(pixels: Pixels, sigma: float) -> Pixels:
    """Too little light: noise with this standard deviation in levels of 255, always the same."""
    noise = np.random.default_rng(0).normal(0, sigma, pixels.shape)
    return _levels(pixels + noise)


def compressed(pixels: Pixels, quality: float) -> Pixels:
    """Saved as JPEG of this quality."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=int(quality))
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


def exposed(pixels: Pixels, stops: float) -> Pixels:
    """Exposed by so many stops more: twice the light each, in linear light (gamma 2.2)."""
    return _levels(255 * (pixels / 255) * 2 ** (stops / 2.2))


def cast(pixels: Pixels, share: float) -> Pixels:
    """Under yellower light: red gains this share, and blue loses it."""
    return _levels(pixels * np.array([1 + share, 1, 1 - share]))


def rotated(pixels: NDArray[Any], degrees: float) -> NDArray[Any]:
    """Turned around the middle; beyond the frame it goes on as in a mirror. Masks too."""
    if degrees % 90 == 0:
        return np.rot90(pixels, int(degrees) // 90).copy()
    side = len(pixels)
    margin = side // 4
    border = [(margin, margin)] * 2 + [(0, 0)] * (pixels.ndim - 2)
    picture = Image.fromarray(np.pad(pixels, border, mode="symmetric"))
    how = Image.Resampling.BICUBIC if pixels.ndim == 3 else Image.Resampling.NEAREST
    turned = np.asarray(picture.rotate(degrees, how))
    return turned[margin : margin + side, margin : margin + side]


def barred(pixels: Pixels, share: float) -> Pixels:
    """Between black bars that take this share of the height, above and below."""
    side = len(pixels)
    bar = round(side * share)
    inner = Image.fromarray(pixels).resize((side, side - 2 * bar), Image.Resampling.BOX)
    framed = np.zeros_like(pixels)
    framed[bar : side - bar] = np.asarray(inner)
    return framed


def bordered(pixels: Pixels, share: float) -> Pixels:
    """In a black border, which takes this share of each side."""
    across = barred(pixels, share).transpose(1, 0, 2)
    return barred(np.ascontiguousarray(across), share).transpose(1, 0, 2).copy()


def seen_through_tube(pixels: Pixels, radius: float, softness: float = 1, level: int = 0) -> Pixels:
    """In a round field of view, whose radius is this share of the side, on nearly black.

    Args:
        softness: of the edge, in pixels of a side of 128.
        level: of what surrounds the field.
    """
    side = len(pixels)
    y, x = np.mgrid[:side, :side] + 0.5 - side / 2
    beyond = (np.hypot(x, y) - radius * side) / (softness * side / 128)
    field = 1 / (1 + np.exp(np.clip(beyond, -50, 50)))[..., None]
    return _levels(pixels * field + level * (1 - field))


def _levels(values: NDArray[np.floating]) -> Pixels:
    levels: Pixels = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return levels


VARIATIONS: dict[str, tuple[Callable[[Pixels, float], Pixels], tuple[float, float, float], str]] = {
    "blur": (blurred, (1, 2, 4), "σ, pixels of 256"),
    "noise": (noisy, (8, 16, 32), "σ, levels of 255"),
    "compression": (compressed, (40, 20, 10), "JPEG quality"),
    "underexposure": (exposed, (-0.5, -1, -2), "stops"),
    "overexposure": (exposed, (0.25, 0.5, 1), "stops"),
    "colour cast": (cast, (0.1, 0.2, 0.3), "share that red gains and blue loses"),
}
"""Name → what it does to pixels, its three strengths, and their unit."""

FRAMES: dict[str, Callable[[Pixels], Pixels]] = {
    "between black bars": partial(barred, share=0.125),
    "in a black border": partial(bordered, share=0.05),
    "in a wide black border": partial(bordered, share=0.2),
    "in a round field of view": partial(seen_through_tube, radius=0.5),
    "in a small, soft and dark grey one": partial(
        seen_through_tube, radius=0.42, softness=4, level=30
    ),
}
"""Name → what programs and dermatoscopes put around a photo. The lesion moves, and masks with it,
so these are for what says whether a picture is a photo at all (`model.fitness`)."""

ROTATIONS = (15.0, 45.0, 90.0)
"""Degrees. The mask turns too, so these are apart."""
