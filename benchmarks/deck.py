"""The photos that the load test sends, and the right mask of each.

Photos are generated in sizes and formats that clients have, or read from a folder. Each first runs
through the network here, without a server, and every answer is compared with that mask.
"""

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.onnx import onnx_runner
from photos.image import FORMATS, ImageError, read_photo
from server.backends import open_backend
from server.cores import available_cores
from server.http.uploads import FIELD
from tests.support.expected import Expected

# Width, height, format, and how many of the 24 cards: mostly small JPEGs, as are the photos of
# dermatoscopes, and the copies that applications send of them.
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
"""The most images that are taken from a folder, since each is held in memory twice."""

_BOUNDARY = "slsnet-boundary-5c4b1f"


@dataclass(frozen=True)
class Card:
    """One request of the deck."""

    kind: str
    """Size and format of the photo; a report says no more of it."""
    body: bytes
    content_type: str
    expected: Expected


@dataclass(frozen=True)
class Deck:
    """The requests that are sent, again and again."""

    cards: Sequence[Card]
    source: str
    """Where the photos are from, for the report: never a path or a name."""
    model: Path
    pixels: NDArray[np.uint8]
    """Pixels of the photos, uint8 [count, 128, 128, 3]."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Number of cards by kind."""


def generated(model: Path) -> Deck:
    """Make a deck of generated photos in `MIX`'s sizes and formats."""
    # Imported here, since it is needed only where photos are generated.
    from tests.support.lesions import encode_photo, lesion_photo

    photos = []
    for seed, (width, height, image_format, count) in enumerate(MIX):
        pixels = lesion_photo(seed, width, height).pixels
        photos.append((encode_photo(pixels, image_format), count))
    return _deck(photos, model, "generated photos")


def given(folder: Path, model: Path) -> Deck:
    """Make a deck of the images that lie in `folder`, as they are.

    Raises:
        ValueError: the folder holds no photo that the server accepts.
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
    # Each is sent as a form and bare, so that every photo takes both ways.
    twice = [(data, 2) for data in photos]
    return _deck(twice, model, f"{len(photos)} given photos")


def bare_network_ms(deck: Deck, backend: str) -> float:
    """Median time of one image through the network of `backend` alone, without a server."""
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
    """All cards in an arbitrary order, then in another, without end. It is the same each time."""
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
            # They alternate between the form of browsers and the bare body of programs.
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
    """Make a form with one file. The file's name says nothing about it."""
    head = (
        f"--{_BOUNDARY}\r\n"
        f'Content-Disposition: form-data; name="{FIELD}"; filename="photo"\r\n'
        f"Content-Type: {_content_type(data)}\r\n\r\n"
    )
    body = head.encode() + data + f"\r\n--{_BOUNDARY}--\r\n".encode()
    return body, f"multipart/form-data; boundary={_BOUNDARY}"
