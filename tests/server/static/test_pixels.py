"""The page's own pixels: averaged as Pillow does, and read without what browsers change."""

import base64
import io
import json
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from photos.image import read_photo
from tests.support import ROOT
from tests.support.lesions import encode_photo, lesion_photo
from tests.support.node import needs_node

pytestmark = needs_node

MODULE = (ROOT / "server/page/device/pixels.js").as_uri()
PIXELS = lesion_photo(5, 300, 200).pixels
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def node(code: str, *arguments: str) -> Any:
    """What an ES module prints as JSON, with the names of pixels.js at hand."""
    script = f"""
        import {{ PhotoError, bare, jpegScale, means, squash }} from "{MODULE}";
        import {{ readFileSync, readdirSync, writeFileSync }} from "node:fs";
        const given = process.argv.slice(1);
        {code}"""
    command = ["node", "--input-type=module", "--eval", script, "--", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010F] = "A maker"
    tags[0x0112] = orientation
    return tags


def saved(name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, name, **options)
    return file.getvalue()


def test_the_square_is_pillows(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    shapes = [(600, 450), (512, 384), (128, 128), (129, 127), (450, 600), (128, 300), (40_000, 3)]
    shapes += [(300, 900), (100, 3000), (257, 386), (3, 2), (1, 1)]
    shapes += [(int(width), int(height)) for width, height in rng.integers(1, 900, (60, 2))]
    given, expected = [], []
    for number, (width, height) in enumerate(shapes):
        orientation = number % 8 + 1
        values = rng.integers(0, 256, (height, width, 3), np.uint8)
        (tmp_path / str(number)).write_bytes(values.tobytes())
        given.append([width, height, orientation])
        stored = io.BytesIO()
        Image.fromarray(values).save(stored, "PNG", exif=exif(orientation), compress_level=1)
        expected.append(read_photo(stored.getvalue()).pixels)
    found = node(
        """
        const told = JSON.parse(given[0]).map(([width, height, orientation], i) => {
          const pixels = readFileSync(`${given[1]}/${i}`);
          return Buffer.from(squash({ pixels, width, height }, orientation)).toString("base64");
        });
        console.log(JSON.stringify(told));
        """,
        json.dumps(given),
        str(tmp_path),
    )
    for shape, pixels, square in zip(given, expected, found, strict=True):
        values = np.frombuffer(base64.b64decode(square), np.uint8).reshape(128, 128, 3)
        np.testing.assert_array_equal(values, pixels, str(shape))


def test_a_jpeg_is_reduced_as_pillow_reduces_it(tmp_path: Path) -> None:
    sizes = [
        (255, 900),
        (256, 256),
        (511, 4000),
        (600, 513),
        (1024, 1024),
        (2047, 3000),
        (4000, 2048),
    ]
    drafts = []
    for size in sizes:
        file = io.BytesIO()
        Image.new("RGB", size).save(file, "JPEG")
        with Image.open(file) as picture:
            picture.draft("RGB", (256, 256))
            drafts.append(picture.size)
    found = node(
        """
        const told = JSON.parse(given[0]).map(([width, height]) => {
          const by = jpegScale(width, height);
          return [Math.ceil(width / by), Math.ceil(height / by)];
        });
        console.log(JSON.stringify(told));
        """,
        json.dumps(sizes),
    )
    assert [tuple(size) for size in found] == drafts


def text_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_profile(png: bytes, orientation: int, *, packed: bool) -> bytes:
    """EXIF in a PNG's text, as ImageMagick writes it."""
    block = exif(orientation).tobytes()
    lines = f"\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    key = b"Raw profile type exif\0"
    chunk = text_chunk(b"zTXt", key + b"\0" + zlib.compress(lines))
    return png[:33] + (chunk if packed else text_chunk(b"tEXt", key + lines)) + png[33:]


def xmp(orientation: int) -> bytes:
    return f'<x:xmpmeta><a tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def variants() -> dict[str, bytes]:
    """Photos that say in many ways how they lie."""
    plain = saved("PNG")
    late = saved("PNG", exif=exif(8))
    eight = late.index(b"eXIf") - 4
    end = eight + 12 + int.from_bytes(late[eight : eight + 4], "big")
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp(7).decode())
    found = {
        "plain.jpg": saved("JPEG"),
        "plain.webp": saved("WEBP", lossless=True),
        "plain.bmp": saved("BMP"),
        "profile.png": saved("PNG", icc_profile=PROFILE, gamma=1.0),
        "late.png": late[:eight] + late[end:-12] + late[eight:end] + late[-12:],
        "raw.png": raw_profile(plain, 5, packed=False),
        "packed.png": raw_profile(plain, 4, packed=True),
        "xmp.png": saved("PNG", pnginfo=info),
        "xmp.jpg": saved("JPEG", xmp=xmp(6)),
        "both.jpg": saved("JPEG", xmp=xmp(6), exif=exif(3)),
        "odd.jpg": saved("JPEG", exif=exif(9), icc_profile=PROFILE),
        "progressive.jpg": saved("JPEG", progressive=True, exif=exif(2), comment=b"\xff\xd9"),
        "damaged.jpg": saved("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    }
    for orientation in range(1, 9):
        found[f"{orientation}.jpg"] = encode_photo(PIXELS, "JPEG", orientation=orientation)
        found[f"{orientation}.webp"] = saved(
            "WEBP", lossless=True, exif=exif(orientation), icc_profile=PROFILE, xmp=xmp(3)
        )
        found[f"{orientation}.png"] = saved("PNG", exif=exif(orientation))
    return found


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_browsers_are_left_nothing_to_turn_or_to_convert(tmp_path: Path) -> None:
    photos = variants()
    for name, data in photos.items():
        (tmp_path / name).write_bytes(data)
    told = node(
        """
        const told = {};
        for (const name of readdirSync(given[0])) {
          const path = `${given[0]}/${name}`;
          const { parts, orientation } = await bare(new Uint8Array(readFileSync(path)));
          writeFileSync(path, Buffer.concat(parts));
          told[name] = orientation;
        }
        console.log(JSON.stringify(told));
        """,
        str(tmp_path),
    )
    for name, data in photos.items():
        assert told[name] == read_photo(data).orientation, name
        with Image.open(tmp_path / name) as left, Image.open(io.BytesIO(data)) as picture:
            assert not left.getexif() and not {"icc_profile", "gamma"} & left.info.keys(), name
            np.testing.assert_array_equal(np.asarray(left), np.asarray(picture), name)


def test_what_is_no_whole_photo_is_refused(tmp_path: Path) -> None:
    whole = {"JPEG": saved("JPEG"), "PNG": saved("PNG"), "WEBP": saved("WEBP")}
    cut = [data[:length] for data in whole.values() for length in (len(data) // 2, len(data) - 2)]
    cut += [whole["JPEG"][:30], whole["PNG"][:9], whole["WEBP"][:20]]
    named = {
        "TIFF": saved("TIFF"),
        "AVIF": saved("AVIF"),
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "DICOM": bytes(128) + b"DICM",
    }
    video = b"\0\0\0\x18ftypmp42\0\0\0\0isom"
    other = [*named.values(), b"hello", b"GIF89a", video, b"\xff\xd8", b"RIFF\0\0\0\0WAVEfmt "]
    for number, data in enumerate([b"", *cut, *other]):
        (tmp_path / f"{number:02}").write_bytes(data)
    told = node(
        """
        const told = [];
        for (const name of readdirSync(given[0]).sort()) {
          const bytes = new Uint8Array(readFileSync(`${given[0]}/${name}`));
          const error = await bare(bytes).catch((found) => found);
          told.push([error instanceof PhotoError, error.status, error.message]);
        }
        console.log(JSON.stringify(told));
        """,
        str(tmp_path),
    )
    assert all(known for known, _, _ in told)
    assert [status for _, status, _ in told] == [400] + [422] * len(cut) + [415] * len(other)
    words = [detail for _, _, detail in told[1 + len(cut) :]]
    assert all(f"the format {name}," in word for name, word in zip(named, words, strict=False))
    assert not any("the format" in word for word in words[len(named) :])


@pytest.mark.parametrize("by", [1, 2, 4, 8])
def test_means_at_the_edges_are_of_what_is_there(tmp_path: Path, by: int) -> None:
    width, height = 21, 10
    pixels = np.random.default_rng(by).integers(0, 256, (height, width, 4), np.uint8)
    (tmp_path / "pixels").write_bytes(pixels.tobytes())
    found = node(
        f"""
        const out = new Uint8Array(3 * Math.ceil({width} / {by}) * Math.ceil({height} / {by}));
        means(readFileSync(given[0]), {width}, {height}, {by}, out);
        console.log(JSON.stringify([...out]));
        """,
        str(tmp_path / "pixels"),
    )
    expected = [
        np.floor(pixels[y : y + by, x : x + by, :3].mean((0, 1)) + 0.5)
        for y in range(0, height, by)
        for x in range(0, width, by)
    ]
    assert found == np.concatenate(expected).tolist()
