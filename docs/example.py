"""Makes the README's pictures: `python -m docs.example --output docs`.

A generated photo (`lesion.jpg`) goes to a real server; `example.png` shows it, the mask
that comes back, and the mask's outline over the photo with the true border beside it.
"""

import argparse
import http.client
import json
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common.program import Help
from tests.support.launch import serve
from tests.support.lesions import encode_photo, lesion_photo

SEED = 4
WIDTH, HEIGHT = 600, 450
GAP = 12
PREDICTED, TRUE = (80, 220, 255), (255, 255, 255)


def main() -> None:
    """Command line: write both pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.example", description=__doc__, formatter_class=Help
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="where both pictures are replaced"
    )
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    photo = lesion_photo(SEED, WIDTH, HEIGHT)
    data = encode_photo(photo.pixels)
    (folder / "lesion.jpg").write_bytes(data)
    with serve() as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/segment?format=json", data, {"Content-Type": "image/jpeg"})
        answer = json.loads(connection.getresponse().read())
    mask = Image.open(BytesIO(b64decode(answer["mask"]["png"])))
    truth = Image.fromarray(photo.mask)

    picture = Image.new("RGB", (3 * WIDTH + 2 * GAP, HEIGHT), "white")
    pixels = Image.fromarray(photo.pixels)
    picture.paste(pixels, (0, 0))
    picture.paste(mask.convert("RGB"), (WIDTH + GAP, 0))
    outlined = pixels.copy()
    for border, colour in ((truth, TRUE), (mask, PREDICTED)):
        outlined.paste(colour, mask=_outline(border))
    ImageDraw.Draw(outlined).text(
        (10, 8),
        "white: true border, blue: predicted",
        fill="white",
        stroke_width=2,
        font_size=16,
        stroke_fill="black",
    )
    picture.paste(outlined, (2 * (WIDTH + GAP), 0))
    picture.quantize(192).save(folder / "example.png", optimize=True)

    found = np.asarray(mask)
    jaccard = (found & photo.mask).sum() / (found | photo.mask).sum()
    print(f"Jaccard with the true mask: {jaccard:.3f}")


def _outline(mask: Image.Image) -> Image.Image:
    """The border's pixels, three wide, as a 1-bit image."""
    grey = mask.convert("L")
    wide, narrow = grey.filter(ImageFilter.MaxFilter(3)), grey.filter(ImageFilter.MinFilter(3))
    return Image.fromarray(np.asarray(wide) != np.asarray(narrow))


if __name__ == "__main__":
    main()
