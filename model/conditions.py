"""What a photo shows beside the lesion, by simple detectors: skin tone, hair, ink, rulers, corners.

They sort photos into groups for `model.report`, so that a network's mean does not hide where it
fails. Each looks at one thing on a square of 256×256 pixels, and errs: a group is mostly, not only,
what its name says.

- Skin tone is the individual typology angle, ITA = arctan((L* − 50) / b*) (Chardon et al. 1991), of
  the median skin around the lesion. The classes are those of Del Bino and Bernerd (2013). It was
  put to use for data of this kind by Kinyanjui et al. (2020, arXiv:1910.13268). Light and camera
  move it: it is the tone in the photo, not the person's.
- Hair is what a closing fills: dark lines thinner than 9 pixels (the black-hat of DullRazor, Lee et
  al. 1997) on more than 4 % of the skin.
- Pen marks are blue or violet skin: more than 0.5 % of it.
- A ruler is a row of dark ticks near the frame's edge: their profile along the edge repeats itself.
- Dark corners are a frame that is dark outside of the ellipse within it: on more than 20 % of that.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image, ImageFilter

SIDE = 256
"""Side of the square that the detectors look at, pixels."""

SKIN_TONES = (
    ("very light", 55.0),
    ("light", 41.0),
    ("intermediate", 28.0),
    ("tan", 10.0),
    ("brown", -30.0),
    ("dark", -90.0),
)
"""Classes of ITA, with the angle in degrees that each is above."""

_MARGIN, _RING = 8, 40
"""Skin around the lesion: between so many pixels from its mask."""

_DARKEST_SKIN = 20.0
"""L* below which nothing is skin that a camera has seen: the surround, hair, a gap."""

_STROKE = 9
_STRIP = 40
"""Width of a hair, and of the strip along the frame that may hold a ruler, pixels."""


@dataclass(frozen=True)
class Conditions:
    """What one photo shows."""

    ita: float
    """Individual typology angle, degrees; NaN if no skin is to be seen."""
    hair: bool
    pen_marks: bool
    ruler: bool
    dark_corners: bool

    @property
    def skin_tone(self) -> str:
        """The class of the angle."""
        if np.isnan(self.ita):
            return "no skin to be seen"
        return next(name for name, above in SKIN_TONES if self.ita > above or above == -90.0)


def conditions(pixels: NDArray[np.uint8], lesion: NDArray[np.bool_]) -> Conditions:
    """What a photo shows beside its lesion.

    Args:
        pixels: uint8 [256, 256, 3], RGB.
        lesion: bool [256, 256], its true mask.
    """
    light, red_green, yellow_blue = lab(pixels)
    far = ~_grown(lesion, _MARGIN)
    seen = far & (light > _DARKEST_SKIN)
    strokes = _strokes(light)
    ink = seen & (yellow_blue < -6) & (yellow_blue < red_green)
    skin = seen & ~strokes & ~ink
    around = skin & _grown(lesion, _RING)
    if around.sum() < 0.01 * around.size:
        around = skin
    ita = np.nan
    if around.sum() >= 0.001 * around.size:
        ita = np.degrees(np.arctan2(np.median(light[around]) - 50, np.median(yellow_blue[around])))
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE * 2 - 1
    corners = np.hypot(x, y) > 1
    return Conditions(
        ita=float(np.clip(ita, -90, 90)),
        hair=bool((strokes & far).sum() > 0.04 * max(1, far.sum())),
        pen_marks=bool(ink.sum() > 0.005 * max(1, seen.sum())),
        ruler=_has_ruler(light, far),
        dark_corners=bool((light[corners] < _DARKEST_SKIN).mean() > 0.2),
    )


def lab(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float64], ...]:
    """sRGB, uint8 [..., 3] → CIE L*, a*, b* under D65 (IEC 61966-2-1, CIE 15), each [...]."""
    rgb = pixels / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _TO_XYZ.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def _grown(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """The mask and all that is so near to it, along rows and columns."""
    grown: NDArray[np.bool_] = np.pad(mask, pixels)
    for axis in (0, 1):
        near = sliding_window_view(grown, 2 * pixels + 1, axis)
        grown = np.asarray(near.any(axis=-1), np.bool_)
    return grown


def _strokes(light: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Dark lines."""
    return _blackness(light) > 30


def _has_ruler(light: NDArray[np.float64], far: NDArray[np.bool_]) -> bool:
    """Whether dark ticks repeat along one of the frame's edges."""
    detail = np.where(far, _blackness(light), 0.0)
    for turns in range(4):
        strip = np.rot90(detail, turns)[:_STRIP]
        profile = strip.mean(axis=0)
        if profile.max() < 4:
            continue
        profile = profile - np.convolve(profile, np.full(31, 1 / 31), "same")
        spectrum = np.abs(np.fft.rfft(profile * np.hanning(len(profile)))) ** 2
        # Ticks of 4 to 32 pixels; a peak and its neighbours hold most of what is there.
        band = spectrum[SIDE // 32 : SIDE // 4]
        peak = int(np.argmax(band))
        if band[max(0, peak - 1) : peak + 2].sum() > 0.35 * spectrum[3:].sum():
            return True
    return False


def _blackness(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much darker than the closing, which is without thin dark things, in levels of 255."""
    grey = Image.fromarray(np.clip(light * 2.55, 0, 255).astype(np.uint8))
    closed = grey.filter(ImageFilter.MaxFilter(_STROKE)).filter(ImageFilter.MinFilter(_STROKE))
    return np.asarray(closed, np.float64) - np.asarray(grey, np.float64)
