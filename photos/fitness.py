"""Whether a picture is a dermoscopic photo at all, told from the pixels that the network gets.

A mask is drawn on anything: a document, a face, a lens cap. `Detector` says how far a picture's
statistics of colour and detail are from those of the photos that the network was trained on.
`python -m model.fitness` fits it; it belongs to the weights whose digest it names.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEATURES", "Detector", "features", "inside_frame", "is_unfit"]

Values = NDArray[np.float64]

FEATURES = 44
"""How many numbers `features` gives."""

_SIDE = 128
_SCALES = 4
"""Above the finest: means of 2×2 up to 16×16 pixels, each against those twice as large."""
# From 8-bit RGB to lightness, red against green, and yellow against blue, each within -1 and 1.
_OPPONENT = np.array(
    [[1 / 3, 1 / 3, 1 / 3], [1 / 2, -1 / 2, 0], [1 / 4, 1 / 4, -1 / 2]], np.float32
) / np.float32(255)
_ONE, _OTHER = np.triu_indices(3, 1)
# Below half a level of 255 there is no detail, but rounding.
_LEAST = 1e-6
_BRIGHT, _DARK = 250, 20

# A pixel of a frame has its brightest channel below this: tubes of dermatoscopes are not quite
# black. A side of the picture is cut off while more than this share of it is frame, until so many
# pixels are left; then it is no frame, but the picture itself.
_FRAME_BELOW = 50
_FRAME_SHARE = 0.08
_LEAST_INSIDE = 64


@dataclass(frozen=True)
class Detector:
    """How far a picture is from the photos that a network was made for, by groups of them.

    Each group of photos is a normal distribution of their features. The distance from it is that of
    Mahalanobis, with a share for the group's size and width: together they are a Gaussian mixture.

    Raises:
        ValueError: the numbers make no detector.
    """

    weights_sha256: str
    """SHA-256 of the weights that it belongs to."""
    photos: int
    """How many photos it was fitted to."""
    limit: float
    """The distance beyond which a picture is unfit."""
    means: tuple[tuple[float, ...], ...]
    """Of each group's features, [groups][FEATURES]."""
    whitening: tuple[tuple[float, ...], ...]
    """Of each group, the upper triangle row by row of the matrix by which what is left of features
    is multiplied, so that its length is the distance."""
    offsets: tuple[float, ...]
    """Of each group, what its size and width add to the square of the distance, from 0."""

    def __post_init__(self) -> None:
        triangle = FEATURES * (FEATURES + 1) // 2
        groups = len(self.offsets)
        for name, rows, width in (
            ("means", self.means, FEATURES),
            ("whitening", self.whitening, triangle),
            ("offsets", (self.offsets,), groups),
        ):
            count = 1 if name == "offsets" else groups
            if not groups or len(rows) != count or any(len(row) != width for row in rows):
                raise ValueError(f"{name} does not have {width} numbers for each group")
            if not np.isfinite(np.array(rows)).all():
                raise ValueError(f"{name} has numbers that are not finite")
        if not 0 < self.limit < np.inf or min(self.offsets) < 0:
            raise ValueError("limit is not above 0, or an offset is below it")

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """The detector in a JSON document, as `document` writes it.

        Raises:
            ValueError: it has no detector.
        """
        try:
            return cls.of(json.loads(content))
        except (KeyError, TypeError) as error:
            raise ValueError(f"it holds no detector: {error!r}") from error

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The detector with these fields, which may be lists.

        Raises:
            KeyError, TypeError, ValueError: they make none.
        """
        means, whitening = (tuple(tuple(map(float, row)) for row in values[key]) for key in _TABLES)
        return cls(
            str(values["weights_sha256"]),
            int(values["photos"]),
            float(values["limit"]),
            means,
            whitening,
            tuple(map(float, values["offsets"])),
        )

    def document(self) -> bytes:
        """The detector as a JSON document, a line for each group and field."""
        values = asdict(self)
        tables = {key: values.pop(key) for key in _TABLES}
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
        for key, rows in tables.items():
            groups = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in rows)
            lines.append(f" {json.dumps(key)}: [\n  {groups}\n ]")
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

    def distance(self, pixels: NDArray[np.uint8]) -> float:
        """How far a picture is from the photos of training, to three digits; 1 is the limit.

        Black bars that fill up a format, and what surrounds the round field of view of a
        dermatoscope, are no part of the photo, and the network is used to them. So a picture is as
        near as what is inside them. A white border is another thing: masks often reach up to it.

        Args:
            pixels: uint8 [128, 128, 3], what the network gets.
        """
        distance = self._distance(pixels)
        if is_unfit(distance) and (inside := inside_frame(pixels)) is not None:
            distance = min(distance, self._distance(inside))
        return distance

    def _distance(self, pixels: NDArray[np.uint8]) -> float:
        whitening, centres, offsets = self._arrays
        white = (features(pixels) @ whitening - centres).reshape(len(offsets), FEATURES)
        squares = (white * white).sum(axis=1) + offsets
        return round(float(np.sqrt(squares.min())) / self.limit, 3)

    @cached_property
    def _arrays(self) -> tuple[Values, Values, Values]:
        """Side by side for all groups: [FEATURES, groups · FEATURES] and its length; [groups]."""
        whitening = np.zeros((len(self.offsets), FEATURES, FEATURES))
        whitening[:, *np.triu_indices(FEATURES)] = np.array(self.whitening)
        centres = np.einsum("gf,gfw->gw", np.array(self.means), whitening)
        side_by_side = np.ascontiguousarray(whitening.transpose(1, 0, 2)).reshape(FEATURES, -1)
        return side_by_side, centres.ravel(), np.array(self.offsets)


_TABLES = ("means", "whitening")


def is_unfit(distance: float) -> bool:
    """Whether a picture that far away is likely no dermoscopic photo."""
    return distance > 1


def inside_frame(pixels: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """What a nearly black frame surrounds, as large as the whole; None without a frame.

    The side that is frame for the largest part is cut off again and again. Of a round field of view
    this leaves about the square that fits into it.

    Args:
        pixels: uint8 [128, 128, 3] RGB.

    Returns:
        uint8 [128, 128, 3], enlarged bilinearly.
    """
    dark = pixels.max(axis=2) < _FRAME_BELOW
    # A lesion may be as dark. A frame is what the picture's edge reaches straight through.
    reached = np.logical_and.accumulate
    frame = reached(dark) | reached(dark[::-1])[::-1]
    frame |= reached(dark, axis=1) | reached(dark[:, ::-1], axis=1)[:, ::-1]
    top, bottom, left, right = 0, _SIDE, 0, _SIDE
    while min(bottom - top, right - left) > _LEAST_INSIDE:
        rows, columns = slice(top, bottom), slice(left, right)
        edges = (
            frame[top, columns],
            frame[bottom - 1, columns],
            frame[rows, left],
            frame[rows, right - 1],
        )
        shares = [np.count_nonzero(edge) / edge.size for edge in edges]
        worst = shares.index(max(shares))
        if shares[worst] <= _FRAME_SHARE:
            if (bottom - top, right - left) == (_SIDE, _SIDE):
                return None
            return _enlarged(_enlarged(pixels[rows, columns]).transpose(1, 0, 2)).transpose(1, 0, 2)
        top, bottom = top + (worst == 0), bottom - (worst == 1)
        left, right = left + (worst == 2), right - (worst == 3)
    return None


def _enlarged(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """More rows, between which it is interpolated: uint8 [n, m, 3] → [128, m, 3]."""
    at = ((np.arange(_SIDE) + 0.5) * len(pixels) / _SIDE - 0.5).clip(0, len(pixels) - 1)
    above = at.astype(np.intp)
    below = np.minimum(above + 1, len(pixels) - 1)
    share = (at - above)[:, None, None]
    between = pixels[above] * (1 - share) + pixels[below] * share
    return (between + 0.5).astype(np.uint8)


def features(pixels: NDArray[np.uint8]) -> Values:
    """Statistics of a picture's colours and detail, float64 [FEATURES].

    In this order: how much detail there is at the finest scale, in lightness only, since what of
    colour is there depends on the camera's compression; at each of four scales above it, how much
    in each of three channels, and how these vary together; the mean colour; how the middle and the
    corners differ from what is between them; at the three finest scales, whether detail has a
    direction, and whether it is in few places; and the shares of pixels that are reddish,
    yellowish, nearly white and nearly black.

    Args:
        pixels: uint8 [128, 128, 3] RGB.
    """
    # Channel by channel, of which NumPy adds up rows far faster.
    planes = np.array(pixels.transpose(2, 0, 1), np.float32, order="C")
    light = (planes[0] + planes[1] + planes[2]) * np.float32(1 / (3 * 255))
    halved = _halved(planes)
    side = _SIDE // 2
    opponent = (_OPPONENT @ halved.reshape(3, -1)).astype(np.float32, copy=False)
    levels = [opponent.reshape(3, side, side)]
    for _ in range(_SCALES):
        levels.append(_halved(levels[-1]))
    products = np.stack([_products(level) for level in levels])
    # What a scale holds beyond the next coarser one (Haar).
    detail = products[:-1] - products[1:]
    finest = float(np.vdot(light, light)) / light.size - products[0, 0, 0]
    amount = np.maximum(np.diagonal(detail, axis1=1, axis2=2), 0) + _LEAST
    together = detail[:, _ONE, _OTHER] / np.sqrt(amount[:, _ONE] * amount[:, _OTHER])
    red, green, blue = halved
    brightest = np.maximum(np.maximum(red, green), blue)
    return np.concatenate(
        [
            [np.log(max(finest, 0) + _LEAST)],
            np.log(amount).ravel(),
            together.ravel(),
            _colour_and_layout(levels[-1].astype(np.float64)),
            *(_texture(level) for level in (light, levels[0][0], levels[1][0])),
            [
                np.count_nonzero(condition) / brightest.size
                for condition in (
                    red >= green,
                    green >= blue,
                    brightest > _BRIGHT,
                    brightest < _DARK,
                )
            ],
        ]
    )


def _halved(level: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means of 2×2: float32 [3, n, n] → [3, n / 2, n / 2]."""
    rows: NDArray[np.float32] = level[:, 0::2] + level[:, 1::2]
    return (rows[..., 0::2] + rows[..., 1::2]) * np.float32(0.25)


def _products(level: NDArray[np.float32]) -> Values:
    """The mean product of each two channels, float64 [3, 3]."""
    flat = level.reshape(3, -1)
    return (flat @ flat.T).astype(np.float64) / flat.shape[1]


def _colour_and_layout(coarse: Values) -> Values:
    """What 4×4 squares of three channels say, float64 [9]."""
    lightness, red, yellow = coarse.mean(axis=(1, 2))
    lightness += 0.02
    middle = coarse[:, 1:3, 1:3].mean(axis=(1, 2))
    corners = coarse[:, ::3, ::3].mean(axis=(1, 2))
    between = (coarse.sum(axis=(1, 2)) - 4 * middle - 4 * corners) / 8
    colour = [np.log(lightness), red / lightness, yellow / lightness]
    return np.concatenate([colour, middle - between, corners - between])


def _texture(light: NDArray[np.float32]) -> list[float]:
    """How unlike detail is across and down, and how evenly it is spread over the frame."""
    across, down = light[:, 1:] - light[:, :-1], light[1:] - light[:-1]
    squares = [float(np.vdot(steps, steps)) / steps.size for steps in (across, down)]
    mean = sum(float(np.abs(steps).sum()) / steps.size for steps in (across, down))
    return [
        abs(float(np.log((squares[0] + _LEAST) / (squares[1] + _LEAST)))),
        float(np.log((mean + 1e-4) ** 2 / (sum(squares) + _LEAST))),
    ]
