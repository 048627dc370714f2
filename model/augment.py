"""Augmentation in batches, on the device of the batch.

Parameters are drawn for the whole global batch from a seeded generator: a resumed run, and each of
several data-parallel processes, see the same images as one uninterrupted process does.

Recipes: `paper` (Sarker et al. 2019, section 4: flips, gamma, CLAHE); `strong`, which stands in
for other cameras, framings, skin tones, illumination, optics, hair, rulers and compression; and
`settle`, for a last stage after `strong`: six images of ten nearly as they are, for statistics
like those of real photos (Touvron et al. 2019), the others strongly varied, so that nothing is
forgotten.
"""

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

Recipe = Literal["none", "paper", "strong", "settle"]

_FRAME_ASPECT = (
    4 / 3
)  # of the sensors behind the squashed square: rotation is rigid there, not in the square
_PLAIN = 0.6  # share of a batch that `settle` leaves nearly as it is
_OVERLAYS = 64  # hair and ruler drawings to choose from
_JPEG_LUMINANCE = (  # ITU-T T.81, table K.1
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


class Augmenter:
    """Makes a training batch of stored uint8 images and targets.

    Args:
        size: side of the batch that comes out, pixels; the stored images' side is a multiple of it.
        stored: side of the stored images, pixels.
    """

    def __init__(self, recipe: Recipe, size: int, stored: int, device: torch.device) -> None:
        if stored % size:
            raise ValueError(f"stored images of {stored} px do not pool to {size} px")
        self.recipe, self.size, self.stored, self.device = recipe, size, stored, device
        if recipe in ("strong", "settle"):
            rng = np.random.default_rng(0)
            self.overlays = torch.from_numpy(_draw_overlays(rng, size)).to(device)
            noise = rng.standard_normal((16, 3, size, size), dtype=np.float32)
            self.noise = torch.from_numpy(noise).to(device)
            k = torch.arange(8, dtype=torch.float32)
            dct = torch.cos((2 * k[None] + 1) * k[:, None] * math.pi / 16) / 2
            dct[0] /= math.sqrt(2)
            self.dct = dct.to(device)
            self.quantisation = torch.tensor(_JPEG_LUMINANCE, device=device) / 255.0
            axis = (torch.arange(size, device=device) + 0.5) * (2 / size) - 1
            self.grid_y, self.grid_x = torch.meshgrid(axis, axis, indexing="ij")

    def __call__(
        self, images: Tensor, targets: Tensor, seed: int, part: slice | None = None, of: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Augment one batch.

        Args:
            images: uint8 [n, 3, stored, stored].
            targets: uint8 [n, k, stored, stored]; 255 is lesion.
            seed: the same seed gives the same batch.
            part: the images' place in the global batch, if data-parallel; None is all of it.
            of: number of images in the global batch, where `part` is given.

        Returns:
            float32 images [n, 3, size, size] in [0, 1] and targets [n, k, size, size] in [0, 1].
        """
        part, of = part or slice(0, len(images)), of or len(images)
        draw = _Draw(seed, part, of, self.device)
        x, y = images.float() / 255, targets.float() / 255
        if self.recipe == "none":
            return self._pool(x, y)
        if self.recipe == "paper":
            return self._paper(*self._pool(x, y), draw)
        varied = self._strong(x, y, draw)
        if self.recipe == "strong":
            return varied
        # It has random numbers of its own, so both recipes vary an image strongly in the same way.
        draw = _Draw(seed + 17, part, of, self.device)
        x, y = self._flip(*self._pool(x, y), draw)
        x = x.clamp(1e-4, 1) ** draw.log_uniform(0.85, 1.18)
        plain = draw.chance(_PLAIN)
        return torch.where(plain, x, varied[0]), torch.where(plain, y, varied[1])

    def _pool(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.stored // self.size
        return F.avg_pool2d(x, factor), F.avg_pool2d(y, factor)

    def _flip(self, x: Tensor, y: Tensor, draw: "_Draw") -> tuple[Tensor, Tensor]:
        for axis in (2, 3):
            flip = draw.chance(0.5)
            x, y = torch.where(flip, x.flip(axis), x), torch.where(flip, y.flip(axis), y)
        return x, y

    def _strong(self, x: Tensor, y: Tensor, draw: "_Draw") -> tuple[Tensor, Tensor]:
        x, y = self.artefacts(*self._pool(*self._warp(x, y, draw)), draw)
        return self._optics(self._colour(x, draw), draw).clamp(0, 1), y

    def _paper(self, x: Tensor, y: Tensor, draw: "_Draw") -> tuple[Tensor, Tensor]:
        from kornia.enhance import equalize_clahe  # only this recipe needs it

        x, y = self._flip(x, y, draw)
        x = torch.where(draw.chance(0.5), x ** draw.log_uniform(0.7, 1.4), x)
        # The clip limit is one value for a call, so it varies over batches rather than images.
        clip = 1 + 3 * float(draw.shared())
        equalised = equalize_clahe(x, clip_limit=clip, grid_size=(8, 8))
        return torch.where(draw.chance(0.5), equalised, x), y

    def _warp(self, x: Tensor, y: Tensor, draw: "_Draw") -> tuple[Tensor, Tensor]:
        """Flip, rotate, scale, stretch, shear, shift and bend; the frame's edges are mirrored."""
        angle = draw.uniform(-math.pi, math.pi)[:, 0, 0, 0]
        zoom = draw.log_uniform(0.8, 1.45)[:, 0, 0, 0]
        stretch = draw.log_uniform(0.85, 1.18)[:, 0, 0, 0]
        shear = draw.uniform(-0.12, 0.12)[:, 0, 0, 0]
        mirror = 1 - 2 * draw.chance(0.5)[:, 0, 0, 0].float()
        cos, sin = torch.cos(angle), torch.sin(angle)
        rows = [
            torch.stack([cos, -sin + shear * cos], -1),
            torch.stack([sin, cos + shear * sin], -1),
        ]
        matrix = torch.stack(rows, 1) / zoom[:, None, None]
        matrix = matrix * torch.stack([stretch * mirror, 1 / stretch], -1)[:, None]
        frame = torch.tensor([_FRAME_ASPECT, 1.0], device=self.device)
        matrix = matrix * frame / frame[:, None]
        shift = torch.cat([draw.uniform(-0.15, 0.15), draw.uniform(-0.15, 0.15)], 2)[..., 0].mT
        grid = F.affine_grid(torch.cat([matrix, shift], -1), list(x.shape), align_corners=False)
        bend = draw.normal(2, 4, 4) * draw.uniform(0, 0.05)
        bend = F.interpolate(bend, size=x.shape[-2:], mode="bicubic", align_corners=False)
        grid = grid + bend.permute(0, 2, 3, 1)
        warped = F.grid_sample(
            torch.cat([x, y], 1), grid, padding_mode="reflection", align_corners=False
        )
        return warped[:, :3], warped[:, 3:]

    def artefacts(self, x: Tensor, y: Tensor, draw: "_Draw") -> tuple[Tensor, Tensor]:
        """Add hair or ruler marks, uneven light, and the dark surround of a dermatoscope's tube."""
        alpha = self.overlays[draw.index(len(self.overlays))].float() / 255
        alpha = alpha * draw.chance(0.3) * draw.uniform(0.3, 1)
        x = torch.lerp(x, draw.uniform(0, 0.45).expand_as(x), alpha)
        light = draw.uniform(-0.2, 0.2) * self.grid_x + draw.uniform(-0.2, 0.2) * self.grid_y
        x = x * (1 + light * draw.chance(0.5))
        distance = torch.hypot(
            (self.grid_x - draw.uniform(-0.2, 0.2)) * draw.uniform(0.8, 1.1),
            (self.grid_y - draw.uniform(-0.2, 0.2)) * draw.uniform(0.8, 1.1),
        )
        tube = torch.sigmoid((draw.uniform(0.85, 1.3) - distance) * draw.log_uniform(8, 80))
        tube = torch.where(draw.chance(0.2), tube, 1)
        return x * tube, y * (tube > 0.5)  # annotators outline what they see

    def _colour(self, x: Tensor, draw: "_Draw") -> Tensor:
        """Vary skin tone, white balance and rendering: a gamma, then an affine map of RGB."""
        x = x.clamp(1e-4, 1) ** draw.log_uniform(0.65, 1.5)
        luma = torch.tensor([0.299, 0.587, 0.114], device=self.device)
        eye = torch.eye(3, device=self.device)
        saturation = draw.log_uniform(0.5, 1.7)[..., 0]
        matrix = saturation * eye + (1 - saturation) * luma.expand(3, 3)
        mix = draw.normal(1, 3, 3)[:, 0] * draw.uniform(0, 0.05)[..., 0]
        gain = torch.cat([draw.log_uniform(0.86, 1.16) for _ in range(3)], 1)[..., 0]
        matrix = (eye + mix) @ matrix * gain
        x = torch.einsum("nij,njhw->nihw", matrix, x)
        mean = x.mean((1, 2, 3), keepdim=True)
        return (x - mean) * draw.log_uniform(0.65, 1.4) + mean + draw.uniform(-0.12, 0.12)

    def _optics(self, x: Tensor, draw: "_Draw") -> Tensor:
        """Add defocus or sharpening, sensor noise and JPEG quantisation."""
        blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        blurred = F.avg_pool2d(blurred, 3, 1, 1, count_include_pad=False)
        x = torch.where(draw.chance(0.4), torch.lerp(x, blurred, draw.uniform(-0.7, 1)), x)
        noise = self.noise[draw.index(len(self.noise))]
        x = x + noise * draw.uniform(0, 0.05) * draw.chance(0.4)
        n, channels, side, _ = x.shape
        blocks = x.view(n, channels, side // 8, 8, side // 8, 8).transpose(3, 4)
        coefficients = self.dct @ blocks @ self.dct.T
        step = (self.quantisation * draw.uniform(0.1, 1)).view(n, 1, 1, 1, 8, 8)
        coefficients = (coefficients / step).round() * step
        compressed = (self.dct.T @ coefficients @ self.dct).transpose(3, 4).reshape(x.shape)
        return torch.where(draw.chance(0.3), compressed, x)


class _Draw:
    """Random numbers [n, 1, 1, 1] for the global batch, of which a process takes its part."""

    def __init__(self, seed: int, part: slice, of: int, device: torch.device) -> None:
        # The CPU draws them, so that every device gets the same numbers.
        self.generator = torch.Generator().manual_seed(seed)
        self.part, self.of, self.device = part, of, device

    def _take(self, values: Tensor) -> Tensor:
        return values[self.part].to(self.device, non_blocking=True)

    def _rand(self) -> Tensor:
        return torch.rand((self.of, 1, 1, 1), generator=self.generator)

    def shared(self) -> Tensor:
        return torch.rand((), generator=self.generator)

    def uniform(self, low: float, high: float) -> Tensor:
        return self._take(self._rand() * (high - low) + low)

    def log_uniform(self, low: float, high: float) -> Tensor:
        return self.uniform(math.log(low), math.log(high)).exp()

    def chance(self, probability: float) -> Tensor:
        return self._take(self._rand() < probability)

    def index(self, count: int) -> Tensor:
        return self._take((self._rand() * count).long())[:, 0, 0, 0]

    def normal(self, *shape: int) -> Tensor:
        return self._take(torch.randn((self.of, *shape), generator=self.generator))


def _draw_overlays(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw hair (mostly) and ruler marks: opacities, uint8 [_OVERLAYS, 1, side, side]."""
    overlays = []
    for i in range(_OVERLAYS):
        # They are drawn at twice the size, so that thin lines are smooth.
        picture = Image.new("L", (2 * side, 2 * side))
        pen = ImageDraw.Draw(picture)
        if i % 8 == 0:
            _draw_ruler(pen, rng, 2 * side)
        else:
            for _ in range(int(rng.integers(2, 30))):
                start, end = rng.uniform(-0.1, 1.1, (2, 2)) * 2 * side
                middle = (start + end) / 2 + rng.normal(0, 0.12, 2) * 2 * side
                t = np.linspace(0, 1, 24)[:, None]
                curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
                width = int(rng.integers(1, 6))
                pen.line([tuple(p) for p in curve], fill=int(rng.integers(120, 256)), width=width)
        overlays.append(np.asarray(picture.resize((side, side), Image.Resampling.BOX)))
    return np.stack(overlays)[:, None]


def _draw_ruler(pen: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    origin = rng.uniform(0, side, 2)
    angle = rng.uniform(0, 2 * math.pi)
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    spacing = rng.uniform(0.02, 0.06) * side
    for mark in range(-60, 61):
        foot = origin + along * mark * spacing
        length = (0.06 if mark % 5 == 0 else 0.03) * side
        pen.line([tuple(foot), tuple(foot + across * length)], fill=220, width=4)
