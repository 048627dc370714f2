"""Pictures that are no dermoscopic photos, to try a detector on; `python -m model.fitness report`.

Drawn are documents, screenshots, charts, blank frames, a lens cap, gradients, noise, patterns,
landscapes, faces, and skin from afar. Each follows from its seed. Photos come with scikit-image,
scikit-learn and Matplotlib, where those are installed.
"""

import colorsys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from photos.image import ImageError, read_photo

__all__ = ["KINDS", "drawn", "of_packages"]

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]

_SIDE = 256
_FOLDERS = {"matplotlib": "mpl-data/sample_data", "skimage": "data", "sklearn": "datasets/images"}
_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif")
_LEAST_SIDE = 96
"""Smaller pictures of packages are icons; pixels."""


def drawn(kind: str, seed: int) -> Pixels:
    """A picture of one of `KINDS`, uint8 [256, 256, 3]; the seed decides all about it."""
    return KINDS[kind](np.random.default_rng([seed, *kind.encode()]))


def of_packages() -> Iterator[tuple[str, Pixels]]:
    """The pictures that installed packages ship, uint8 [128, 128, 3], each with its name."""
    for package, below in _FOLDERS.items():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        folder = Path(spec.submodule_search_locations[0]) / below
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in _SUFFIXES:
                continue
            try:
                photo = read_photo(path.read_bytes())
            except ImageError:
                continue
            if min(photo.width, photo.height) >= _LEAST_SIDE:
                yield f"{package}/{path.name}", photo.pixels


def _document(rng: np.random.Generator) -> Pixels:
    page = Image.new("L", (_SIDE, _SIDE), int(rng.integers(225, 256)))
    draw = ImageDraw.Draw(page)
    pitch, left = int(rng.integers(6, 16)), int(rng.integers(8, 40))
    for y in range(int(rng.integers(8, 40)), _SIDE - 10, pitch):
        x = left
        while x < _SIDE - left and rng.random() > 0.03:
            word = int(rng.integers(6, 30))
            draw.rectangle((x, y, x + word, y + pitch // 3), fill=int(rng.integers(0, 90)))
            x += word + 4
    return np.asarray(page.rotate(rng.normal(0, 2), fillcolor=240).convert("RGB"))


def _screenshot(rng: np.random.Generator) -> Pixels:
    picture = Image.new("RGB", (_SIDE, _SIDE), _colour(rng))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(5, 30))):
        x, y, w, h = rng.integers(0, _SIDE, 4).tolist()
        draw.rectangle((x, y, x + w // 2, y + h // 3), fill=_colour(rng), outline=_colour(rng))
        draw.text((x + 3, y + 3), "Lorem ipsum dolor sit amet", fill=_colour(rng))
    return np.asarray(picture)


def _chart(rng: np.random.Generator) -> Pixels:
    picture = Image.new("RGB", (_SIDE, _SIDE), "white")
    draw = ImageDraw.Draw(picture)
    draw.line([(30, 10), (30, 226), (246, 226)], fill="black", width=2)
    for _ in range(int(rng.integers(1, 5))):
        heights = 120 + np.cumsum(rng.normal(0, 12, 20))
        colour = _colour(rng)
        points = list(zip(range(35, 245, 11), heights.tolist(), strict=False))
        if rng.random() < 0.5:
            draw.line(points, fill=colour, width=int(rng.integers(1, 4)))
        else:
            for x, y in points:
                draw.rectangle((x, min(y, 224), x + 7, 224), fill=colour)
    return np.asarray(picture)


def _blank(rng: np.random.Generator) -> Pixels:
    grain = rng.normal(0, rng.uniform(0, 3), (_SIDE, _SIDE, 3))
    return _levels(np.full((_SIDE, _SIDE, 3), _colour(rng)) + grain)


def _lens_cap(rng: np.random.Generator) -> Pixels:
    """Black with some light at one edge, darker towards the corners, and grain."""
    y, x = np.mgrid[:_SIDE, :_SIDE] / _SIDE - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    light = rng.uniform(0, 25) * np.clip(np.cos(angle) * x + np.sin(angle) * y, 0, 1)
    level = rng.uniform(0, 15) * (1 - x**2 - y**2) + light
    return _levels(level[..., None] + rng.normal(0, rng.uniform(0, 5), (_SIDE, _SIDE, 3)))


def _gradient(rng: np.random.Generator) -> Pixels:
    y, x = np.mgrid[:_SIDE, :_SIDE] / _SIDE
    angle = rng.uniform(0, 2 * np.pi)
    share = (np.cos(angle) * x + np.sin(angle) * y + 1) / 2
    first, last = np.array(_colour(rng)), np.array(_colour(rng))
    return _levels(first + (last - first) * share[..., None])


def _noise(rng: np.random.Generator) -> Pixels:
    cells = int(2 ** rng.integers(3, 9))
    picture = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
    return np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))


def _pattern(rng: np.random.Generator) -> Pixels:
    y, x = np.mgrid[:_SIDE, :_SIDE]
    step = int(rng.integers(4, 40))
    on = (x // step + (y // step) * rng.integers(0, 2)) % 2 == 0
    return np.where(on[..., None], _colour(rng), _colour(rng)).astype(np.uint8)


def _landscape(rng: np.random.Generator) -> Pixels:
    sky, ground = _hue(rng, 0.5, 0.65), np.array(_hue(rng, 0.2, 0.4))
    picture = Image.new("RGB", (_SIDE, _SIDE), sky)
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(2, 6))):
        heights = rng.integers(100, 220) + np.cumsum(rng.normal(0, 5, _SIDE))
        shape = [(0.0, float(_SIDE)), *enumerate(heights.tolist()), (float(_SIDE), float(_SIDE))]
        draw.polygon(shape, fill=_shade(ground, rng.uniform(0.4, 1.1)))
    return _levels(np.asarray(picture) + rng.normal(0, 8, (_SIDE, _SIDE, 3)))


def _face(rng: np.random.Generator) -> Pixels:
    """A head with hair, eyes and mouth before a background, a little out of focus."""
    skin = _skin(rng)
    picture = Image.new("RGB", (_SIDE, _SIDE), _wall(rng))
    draw = ImageDraw.Draw(picture)
    x, y = (128 + rng.normal(0, 12, 2)).tolist()
    wide, high = float(rng.uniform(45, 75)), float(rng.uniform(65, 100))
    hair = _shade(np.array([120, 90, 60]), rng.uniform(0.1, 1.6))
    draw.ellipse((x - wide - 8, y - high - 14, x + wide + 8, y + high * 0.6), fill=hair)
    draw.rectangle((x - wide / 2, y, x + wide / 2, _SIDE), fill=_shade(skin, 0.9))
    draw.rectangle((x - 100, y + high + 10, x + 100, _SIDE * 2), fill=_colour(rng))
    draw.ellipse((x - wide, y - high, x + wide, y + high), fill=_shade(skin, 1))
    for side in (-1, 1):
        eye = x + side * wide * 0.42, y - high * 0.15
        draw.ellipse((eye[0] - 10, eye[1] - 5, eye[0] + 10, eye[1] + 5), fill="white")
        draw.ellipse((eye[0] - 4, eye[1] - 4, eye[0] + 4, eye[1] + 4), fill=_shade(skin, 0.2))
    draw.polygon([(x, y), (x - 8, y + 22), (x + 8, y + 22)], fill=_shade(skin, 0.8))
    mouth = (x - 22, y + high * 0.45, x + 22, y + high * 0.45 + 9)
    draw.ellipse(mouth, fill=_shade(np.array([190, 80, 80]), rng.uniform(0.6, 1)))
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2))))
    return _levels(soft * _light(rng) + rng.normal(0, 4, (_SIDE, _SIDE, 3)))


def _skin_from_afar(rng: np.random.Generator) -> Pixels:
    """A limb before a background, with a few small spots: a clinical overview."""
    skin = _skin(rng)
    picture = Image.new("RGB", (_SIDE, _SIDE), _wall(rng))
    draw = ImageDraw.Draw(picture)
    left, wide = int(rng.integers(20, 90)), int(rng.integers(70, 140))
    lean = int(rng.integers(-40, 40))
    shape = [(left, 0), (left + wide, 0), (left + wide + lean, _SIDE), (left + lean, _SIDE)]
    draw.polygon(shape, fill=_shade(skin, 1))
    for _ in range(int(rng.integers(1, 8))):
        x, y = int(rng.integers(left, left + wide)), int(rng.integers(0, _SIDE))
        r = float(rng.uniform(1, 5))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=_shade(skin, 0.5))
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(1)))
    return _levels(soft * _light(rng) + rng.normal(0, 4, (_SIDE, _SIDE, 3)))


def _colour(rng: np.random.Generator) -> Colour:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def _wall(rng: np.random.Generator) -> Colour:
    """As it is behind people: of little colour."""
    return _shade(rng.uniform(40, 240) * (1 + rng.uniform(-0.1, 0.1, 3)), 1)


def _hue(rng: np.random.Generator, low: float, high: float) -> Colour:
    parts = colorsys.hsv_to_rgb(rng.uniform(low, high), rng.uniform(0.3, 0.8), rng.uniform(0.5, 1))
    return _shade(255 * np.array(parts), 1)


def _skin(rng: np.random.Generator) -> NDArray[np.float64]:
    light, dark = np.array([230.0, 185, 160]), np.array([90.0, 60, 45])
    return np.asarray(dark + (light - dark) * rng.random())


def _shade(colour: NDArray[np.floating] | NDArray[np.integer], share: float) -> Colour:
    red, green, blue = (min(255, int(part * share)) for part in colour)
    return red, green, blue


def _light(rng: np.random.Generator) -> NDArray[np.float64]:
    """What light from one side does, [1, 256, 1]."""
    slope = np.linspace(-1, 1, _SIDE) * rng.uniform(-0.3, 0.3)
    return np.asarray(1 + slope)[None, :, None]


def _levels(values: NDArray[np.floating]) -> Pixels:
    levels: Pixels = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return levels


KINDS: dict[str, Callable[[np.random.Generator], Pixels]] = {
    "document": _document,
    "screenshot": _screenshot,
    "chart": _chart,
    "blank frame": _blank,
    "lens cap": _lens_cap,
    "gradient": _gradient,
    "noise": _noise,
    "pattern": _pattern,
    "landscape": _landscape,
    "face": _face,
    "skin from afar": _skin_from_afar,
}
"""What can be drawn."""
