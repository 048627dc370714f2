"""The photos that the load test sends, and the right mask of each.

Photos are generated in sizes and formats that clients have, or read from a folder. Each is first
run
through the network here, without a server, and every answer is compared with that mask.
"""

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from photos.image import FORMATS, ImageError, encode_png, lesion_mask, read_photo, unpack_mask
from server.backends import open_backend
from server.http.uploads import FIELD
from server.settings import available_cores
from trt_build.parity import GATES, mask_iou, onnx_runner

__all__ = ["Card", "Deck", "Expected", "Verdict", "bare_network_ms", "deal", "generated", "given"]

Verdict = Literal["identical", "rounding", "wrong"]

# Width, height, format, and how many of the 24 cards: mostly JPEG, mostly small, as photos of
# dermatoscopes and the copies of them that applications send are.
MIX = (
    (600, 450, "JPEG", 6),
    (1024, 768, "JPEG", 5),
    (768, 1024, "JPEG", 3),
    (2048, 1536, "JPEG", 3),
    (3024, 2016, "JPEG", 1),
    (600, 450, "PNG", 2),
    (1024, 768, "WEBP", 2),
    (600, 450, "TIFF", 1),
    (600, 450, "BMP", 1),
)

_MOST_GIVEN = 48
"""Of a folder's images; each is held in memory twice."""

_ROUNDING = {"fp32": 1e-4, "bf16": 0.02}
"""Far more than a probability changes by: in float32 because sums are in another order in another
batch, in bfloat16 because values have 8 bits (0.01 at most on ISIC's validation photos)."""

_BOUNDARY = "slsnet-boundary-5c4b1f"


class Expected:
    """The mask of one photo, predicted without a server."""

    def __init__(self, probability: NDArray[np.float32], width: int, height: int) -> None:
        """Make the mask and its PNG from the network's answer.

        Args:
            probability: float32 [128, 128].
            width, height: the photo's, pixels.
        """
        self.png = encode_png(lesion_mask(probability, width, height), width, height)
        self._probability = probability
        self._size = (width, height)
        self._verdicts: dict[tuple[bytes, str], Verdict] = {}

    def verdict(self, answer: bytes, precision: str) -> Verdict:
        """How a server's PNG compares.

        In fp32 and bf16 a pixel may differ where the probability lies so near to the threshold that
        rounding explains it (`_ROUNDING`). An engine of less precision than fp32 may also overlap
        as much as its own gate asks (`trt_build.parity`).
        """
        if answer == self.png:
            return "identical"
        if (answer, precision) not in self._verdicts:
            self._verdicts[answer, precision] = self._compare(answer, precision)
        return self._verdicts[answer, precision]

    def _compare(self, answer: bytes, precision: str) -> Verdict:
        width, height = self._size
        try:
            with Image.open(BytesIO(answer), formats=("PNG",)) as picture:
                found = np.asarray(picture.convert("1"))
        except (UnidentifiedImageError, OSError):
            return "wrong"
        if found.shape != (height, width):
            return "wrong"
        rounding = _ROUNDING.get(precision, 0)
        least, most = self._at(0.5 + rounding), self._at(0.5 - rounding)
        if not (least & ~found).any() and not (found & ~most).any():
            return "rounding"
        if precision == "fp32":
            return "wrong"
        gate = next((g.mask_iou for p, g in GATES.items() if p == precision), None)
        iou = mask_iou(found, self._at(0.5))
        return "rounding" if iou >= (gate or GATES["int8"].mask_iou) else "wrong"

    def _at(self, threshold: float) -> NDArray[np.bool_]:
        width, height = self._size
        return unpack_mask(lesion_mask(self._probability, width, height, threshold), width)


@dataclass(frozen=True)
class Card:
    """One request of the deck."""

    kind: str
    """Size and format, which is all that a report says of a photo."""
    body: bytes
    content_type: str
    expected: Expected


@dataclass(frozen=True)
class Deck:
    """The requests that are sent, over and over."""

    cards: Sequence[Card]
    source: str
    """For the report: never a path, nor a name."""
    model: Path
    pixels: NDArray[np.uint8]
    """Of the photos, uint8 [count, 128, 128, 3]."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Cards by kind."""


def generated(model: Path) -> Deck:
    """Generated photos in `MIX`'s sizes and formats."""
    # Only where it is asked for: it draws what the tests draw.
    from tests.support.lesions import encode_photo, lesion_photo

    photos = []
    for seed, (width, height, image_format, count) in enumerate(MIX):
        pixels = lesion_photo(seed, width, height).pixels
        photos.append((encode_photo(pixels, image_format), count))
    return _deck(photos, model, "generated photos")


def given(folder: Path, model: Path) -> Deck:
    """The images that lie in `folder`, as they are.

    Raises:
        ValueError: none of them is a photo that is served.
    """
    photos = []
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        data = file.read_bytes()
        try:
            read_photo(data)
        except ImageError:
            continue
        photos.append(data)
        if len(photos) == _MOST_GIVEN:
            break
    if not photos:
        raise ValueError(f"{folder} holds no image in one of the formats {', '.join(FORMATS)}.")
    # Each as a form and bare, so that both ways are gone with each of them.
    twice = [(data, 2) for data in photos]
    return _deck(twice, model, f"{len(photos)} given photos")


def bare_network_ms(deck: Deck, backend: str) -> float:
    """One image through the network that `backend` runs, median: no server, nothing else."""
    network = open_backend(backend, deck.model, threads=available_cores())
    try:
        network.warm_up()
        seconds = []
        for pixels in deck.pixels:
            started = time.perf_counter()
            network.infer(pixels[None])
            seconds.append(time.perf_counter() - started)
    finally:
        network.close()
    return 1000 * statistics.median(seconds)


def deal(cards: Sequence[Card]) -> Iterator[Card]:
    """All cards in an arbitrary order, then again in another, without end; always the same."""
    order = random.Random(0)
    while True:
        yield from order.sample(cards, len(cards))


def _deck(photos: Sequence[tuple[bytes, int]], model: Path, source: str) -> Deck:
    infer = onnx_runner(model)
    cards: list[Card] = []
    pixels = []
    for data, count in photos:
        photo = read_photo(data)
        pixels.append(photo.pixels)
        kind = f"{photo.width}×{photo.height} {_format(data)}"
        expected = Expected(infer(photo.pixels[None])[0], photo.width, photo.height)
        for _ in range(count):
            # In turn as browsers send it and as programs do.
            wrapped = len(cards) % 2 == 0
            body, content_type = _form(data) if wrapped else (data, _content_type(data))
            cards.append(Card(kind, body, content_type, expected))
    kinds: dict[str, int] = {}
    for card in cards:
        kinds[card.kind] = kinds.get(card.kind, 0) + 1
    return Deck(cards, source, model, np.stack(pixels), kinds)


def _format(data: bytes) -> str:
    with Image.open(BytesIO(data), formats=FORMATS) as picture:
        return cast("str", picture.format)


def _content_type(data: bytes) -> str:
    return Image.MIME[_format(data)]


def _form(data: bytes) -> tuple[bytes, str]:
    """A form with one file, whose name says nothing."""
    head = (
        f"--{_BOUNDARY}\r\n"
        f'Content-Disposition: form-data; name="{FIELD}"; filename="photo"\r\n'
        f"Content-Type: {_content_type(data)}\r\n\r\n"
    )
    body = head.encode() + data + f"\r\n--{_BOUNDARY}--\r\n".encode()
    return body, f"multipart/form-data; boundary={_BOUNDARY}"
