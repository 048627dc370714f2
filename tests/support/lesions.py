"""Synthetic dermoscopic photos with their exact masks, for tests and demos where no real ones are.

Skin is coloured by its pigment the way light is absorbed: a pixel is skin × exp(−density × the
absorption of melanin), so every lesion fits its skin tone. The scene is drawn in units of the
frame's short side, so one seed gives one scene at any size.
"""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Field = NDArray[np.floating[Any]]

# sRGB of lit skin under a dermatoscope, from pale to dark.
SKIN_TONES = (
    (232, 206, 204),
    (229, 184, 172),
    (217, 190, 172),
    (212, 163, 138),
    (181, 132, 106),
    (139, 96, 75),
)
MELANIN = np.array([0.62, 1.0, 1.15], np.float32)
"""Absorption of red, green and blue relative to green."""

# Scenes are drawn at most this wide and then enlarged: no camera resolves more of a lesion.
_MAX_DRAWN = 1600


@dataclass(frozen=True)
class LesionPhoto:
    """A photo with the truth about it."""

    pixels: NDArray[np.uint8]
    """[height, width, 3], RGB."""
    mask: NDArray[np.bool_]
    """[height, width], lesion true."""


def lesion_photo(
    seed: int, width: int = 600, height: int = 450, *, tone: int | None = None
) -> LesionPhoto:
    """Draw the scene `seed`: one lesion and what comes with it in a clinic.

    Args:
        seed: chooses everything: skin, lesion, hair, vignette, ruler, bubbles, sticker, light.
        width: pixels.
        height: pixels.
        tone: index into `SKIN_TONES`, or None to let the seed choose.
    """
    shrink = max(1.0, max(width, height) / _MAX_DRAWN)
    scene = _Scene(seed, max(1, round(width / shrink)), max(1, round(height / shrink)))
    distance = scene.lesion_distance()
    drawn = np.clip(scene.paint(distance, tone), 0, 255).astype(np.uint8)
    size = (width, height)
    pixels = np.array(Image.fromarray(drawn).resize(size, Image.Resampling.BICUBIC))
    smooth = Image.fromarray(distance).resize(size, Image.Resampling.BILINEAR)
    return LesionPhoto(pixels, np.asarray(smooth) > 0)


UNDONE = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What turns an upright picture so that applying an EXIF orientation makes it upright again."""


def encode_photo(
    pixels: NDArray[np.uint8],
    image_format: str = "JPEG",
    *,
    mode: str = "RGB",
    orientation: int = 1,
    **options: Any,
) -> bytes:
    """Encode as a camera would: in any mode, turned away from upright by EXIF `orientation`.

    A reader that applies the orientation sees `pixels` upright again.
    """
    image = Image.fromarray(pixels)
    if (turn := UNDONE[orientation]) is not None:
        image = image.transpose(turn)
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "P":
        image = image.quantize(256)
    else:
        image = image.convert(mode)
    if image_format == "JPEG":
        options.setdefault("quality", 90)
    buffer = BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def drawn_photo(
    seed: int, width: int = 600, height: int = 450, image_format: str = "JPEG", **options: Any
) -> bytes:
    """The scene `seed` as a file; `options` are those of `encode_photo`."""
    return encode_photo(lesion_photo(seed, width, height).pixels, image_format, **options)


def write_pairs(
    folder: Path, count: int, width: int = 600, height: int = 450, *, first_seed: int = 0
) -> list[str]:
    """Write `lesion_N.jpg` and `lesion_N_segmentation.png`; returns the names without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for seed in range(first_seed, first_seed + count):
        photo = lesion_photo(seed, width, height)
        name = f"lesion_{seed:03d}"
        (folder / f"{name}.jpg").write_bytes(encode_photo(photo.pixels))
        Image.fromarray(photo.mask).save(folder / f"{name}_segmentation.png")
        names.append(name)
    return names


class _Scene:
    """One scene being drawn: `width`×`height` pixels, `side` = the shorter of them = 1 unit."""

    def __init__(self, seed: int, width: int, height: int) -> None:
        self.rng = np.random.default_rng([2_347_900, seed])
        self.size = (width, height)
        self.side = min(width, height)
        self.aspect = (width / self.side, height / self.side)
        rows, columns = np.mgrid[:height, :width].astype(np.float32)
        self.x = (columns + 0.5) / self.side
        self.y = (rows + 0.5) / self.side

    def noise(self, cells: float, octaves: int = 1) -> Field:
        """Smooth noise about 0 with a deviation near 1; `cells` of it to the short side.

        Its grid is drawn for a frame of 2×2 units, whatever the picture's aspect.
        """
        total = np.zeros(self.x.shape, np.float32)
        weights = 0.0
        for octave in range(octaves):
            grid = max(2, round(cells * 2**octave))
            values = self.rng.standard_normal((2 * grid, 2 * grid)).astype(np.float32)
            box = (0, 0, self.aspect[0] * grid, self.aspect[1] * grid)
            box = (0, 0, min(box[2], 2 * grid), min(box[3], 2 * grid))
            layer = Image.fromarray(values).resize(self.size, Image.Resampling.BICUBIC, box)
            total += np.asarray(layer) / 2**octave
            weights += 0.25**octave
        return np.asarray(total / (0.7 * np.sqrt(weights)), np.float32)

    def lesion_distance(self) -> Field:
        """Signed distance to the lesion's border, about; in units, positive inside."""
        rng = self.rng
        radius = rng.uniform(0.15, 0.36)
        reach = 0.5 - 0.6 * radius
        centre = np.array(self.aspect) / 2 + rng.uniform(-reach, reach, 2) * 0.5
        warp = rng.uniform(0.005, 0.02)
        dx = self.x - centre[0] + warp * self.noise(9, 2)
        dy = self.y - centre[1] + warp * self.noise(9, 2)
        turn, stretch = rng.uniform(0, np.pi), rng.uniform(0.75, 1.0)
        along = dx * np.cos(turn) + dy * np.sin(turn)
        across = (dy * np.cos(turn) - dx * np.sin(turn)) / stretch
        angle = np.arctan2(across, along)
        border = np.ones_like(angle)
        for wave in range(2, 8):
            swing = rng.normal(0, 0.11) / wave**0.8
            border += swing * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
        border = radius * np.clip(border, 0.4, 1.8)
        return np.asarray((border - np.hypot(along, across)) * stretch, np.float32)

    def paint(self, distance: Field, tone: int | None) -> Field:
        """RGB, float32 [height, width, 3] in 0…255 or somewhat beyond."""
        rng = self.rng
        chosen = int(rng.integers(len(SKIN_TONES)))
        skin = np.array(SKIN_TONES[chosen if tone is None else tone], np.float32)
        skin = skin * rng.uniform(0.93, 1.05) + rng.normal(0, 4, 3).astype(np.float32)
        picture = skin * np.exp(-self._pigment(distance)[..., None] * MELANIN)
        # Blood: patches that take green and blue away; skin lines: fine relief.
        redness = 0.05 * self.noise(3, 3) * rng.uniform(0.3, 1.2)
        picture *= np.exp(-redness[..., None] * np.array([0.2, 1, 0.9], np.float32))
        picture *= (1 + rng.uniform(0.006, 0.018) * self.noise(70, 2))[..., None]
        if rng.random() < 0.3:  # the blue-white veil
            veil = np.clip(self.noise(3), 0, 1) * (distance > 0.04) * rng.uniform(0.3, 0.6)
            veil = self._blur(veil.astype(np.float32), 0.02)[..., None]
            picture = picture * (1 - veil) + veil * np.array([122, 126, 146], np.float32)
        if rng.random() < 0.35:
            picture = self._bubbles(picture)
        if rng.random() < 0.55:
            picture = self._hair(picture)
        if rng.random() < 0.15:
            picture = self._sticker(picture, distance)
        if rng.random() < 0.3:
            picture = self._ruler(picture)
        picture *= self._light()[..., None]
        blurred = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).filter(
            ImageFilter.GaussianBlur(self.side * rng.uniform(0.0003, 0.0015))
        )
        grain = rng.normal(0, rng.uniform(0.5, 2.5), (*self.x.shape, 1)).astype(np.float32)
        return np.asarray(blurred, np.float32) + grain

    def _pigment(self, distance: Field) -> Field:
        """Melanin's density: 0 outside the lesion and, but for freckles, in the skin."""
        rng = self.rng
        fade = rng.uniform(0.004, 0.016)
        inside = 1 / (1 + np.exp(-np.clip(distance / fade, -30, 30)))
        strength = rng.uniform(0.55, 1.5)
        density = strength * (1 + rng.uniform(0.1, 0.3) * self.noise(4, 3))
        # Darker clots, more of them towards the middle.
        clots = np.clip(self.noise(rng.uniform(5, 9), 2) - rng.uniform(0.2, 1.0), 0, 1.5)
        density += rng.uniform(0.2, 0.7) * clots * np.clip(distance / 0.05, 0.2, 1)
        # The pigment network: dark ridges where a noise field crosses zero.
        ridges = np.exp(-((self.noise(rng.uniform(26, 40)) / 0.35) ** 2))
        density += rng.uniform(0.0, 0.35) * ridges * strength
        freckles = np.clip(self.noise(16, 2) - 2.3, 0, 1) * rng.uniform(0, 0.3)
        return np.asarray(np.clip(density, 0.25, None) * inside + freckles, np.float32)

    def _light(self) -> Field:
        """Illumination: uneven, darker towards the corners, black beyond the lens."""
        rng = self.rng
        dx, dy = self.x - self.aspect[0] / 2, self.y - self.aspect[1] / 2
        turn = rng.uniform(0, 2 * np.pi)
        light = 1 + rng.uniform(0, 0.12) * (dx * np.cos(turn) + dy * np.sin(turn))
        distance = np.hypot(dx, dy)
        light *= 1 - rng.uniform(0, 0.25) * distance**2
        if rng.random() < 0.3:
            rim, soft = rng.uniform(0.56, 0.72), rng.uniform(0.006, 0.03)
            light *= 1 / (1 + np.exp(np.clip((distance - rim) / soft, -30, 30)))
        return np.asarray(light, np.float32)

    def _hair(self, picture: Field) -> Field:
        rng = self.rng
        colour = np.array(((38, 26, 22), (92, 58, 36), (30, 30, 34))[rng.integers(3)], np.float32)
        thickness = rng.uniform(0.002, 0.005)
        direction, spread = rng.uniform(0, np.pi), rng.uniform(0.1, 0.7)
        strokes = []
        for _ in range(int(rng.integers(2, 22))):
            start = rng.uniform(0, 1, 2) * self.aspect
            angle, bend, length = (
                rng.normal(direction, spread),
                rng.normal(0, 1.2),
                rng.uniform(0.2, 1.0),
            )
            steps = np.linspace(0, 1, 24)
            heading = angle + bend * steps
            path = start + np.cumsum(
                np.stack([np.cos(heading), np.sin(heading)], 1) * length / len(steps), axis=0
            )
            strokes.append((path, thickness * rng.uniform(0.5, 1.3)))
        cover = self._drawn_lines(strokes) * rng.uniform(0.75, 0.95)
        return np.asarray(picture * (1 - cover) + cover * colour)

    def _ruler(self, picture: Field) -> Field:
        """Millimetre ticks along the left or the lower edge."""
        rng = self.rng
        gap, lower = rng.uniform(0.04, 0.08), rng.random() < 0.5
        offset = rng.uniform(0.01, 0.04)
        strokes = []
        for tick in range(int(self.aspect[0 if lower else 1] / gap) + 1):
            length = 0.06 if tick % 5 == 0 else 0.035
            if lower:
                line = [(tick * gap, self.aspect[1] - offset - reach) for reach in (0, length)]
            else:
                line = [(offset + reach, tick * gap) for reach in (0, length)]
            strokes.append((np.array(line), 0.004))
        cover = self._drawn_lines(strokes) * 0.9
        return np.asarray(picture * (1 - cover) + cover * np.array([25, 25, 30], np.float32))

    def _bubbles(self, picture: Field) -> Field:
        """Air in the immersion gel: a faint dark rim with a highlight on its lit side."""
        rng = self.rng
        for _ in range(int(rng.integers(2, 14))):
            cx, cy = rng.uniform(0, 1, 2) * self.aspect
            radius = rng.uniform(0.006, 0.035)
            reach = radius * 1.6
            left, right = (
                int(np.clip((cx + s * reach) * self.side, 0, self.size[0])) for s in (-1, 1)
            )
            top, bottom = (
                int(np.clip((cy + s * reach) * self.side, 0, self.size[1])) for s in (-1, 1)
            )
            part = (slice(top, bottom), slice(left, right))
            dx, dy = (self.x[part] - cx) / radius, (self.y[part] - cy) / radius
            distance = np.hypot(dx, dy)
            rim = np.exp(-(((distance - 1) / 0.12) ** 2))
            lit = rim * np.clip(-(dx + dy) / 1.4, 0, 1) + np.exp(
                -((np.hypot(dx + 0.35, dy + 0.35) / 0.16) ** 2)
            )
            patch = picture[part] * (1 - 0.12 * rim[..., None])
            lit = np.clip(0.75 * lit, 0, 1)[..., None]
            picture[part] = patch * (1 - lit) + 250 * lit
        return picture

    def _sticker(self, picture: Field, distance: Field) -> Field:
        """A coloured calibration disc that looks into the frame, clear of the lesion."""
        rng = self.rng
        colours = ((245, 205, 20), (60, 170, 80), (90, 190, 190), (30, 100, 180))
        colour = np.array(colours[rng.integers(4)], np.float32)
        radius = rng.uniform(0.22, 0.34)
        cx = rng.uniform(0, 1) * self.aspect[0]
        cy = self.aspect[1] + radius * rng.uniform(0.1, 0.5)
        edge = (radius - np.hypot(self.x - cx, self.y - cy)) / 0.004
        cover = 1 / (1 + np.exp(-np.clip(edge, -30, 30)))
        if np.any((cover > 0.01) & (distance > -0.02)):
            return picture
        paint = colour * (1 + 0.03 * self.noise(60))[..., None]
        return np.asarray(picture * (1 - cover[..., None]) + cover[..., None] * paint)

    def _drawn_lines(self, strokes: list[tuple[NDArray[np.float64], float]]) -> Field:
        """Coverage 0…1 of lines in units, [height, width, 1], drawn twice as large."""
        width, height = self.size
        layer = Image.new("L", (2 * width, 2 * height))
        draw = ImageDraw.Draw(layer)
        for path, thickness in strokes:
            points = [(float(x), float(y)) for x, y in path * 2 * self.side]
            draw.line(points, fill=255, width=max(1, round(2 * thickness * self.side)))
        small = layer.resize(self.size, Image.Resampling.BOX)
        return np.asarray(small, np.float32)[..., None] / 255

    def _blur(self, values: Field, radius: float) -> Field:
        layer = Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))
        soft = layer.filter(ImageFilter.GaussianBlur(radius * self.side))
        return np.asarray(soft, np.float32) / 255
