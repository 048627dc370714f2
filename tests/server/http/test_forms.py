"""What was found, in the forms of files that people use."""

import base64
import email
import json
import xml.etree.ElementTree as ET
from email.message import Message
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from photos.image import encode_png, read_photo, upsampled
from tests.support.answers import assert_problem, post, read_png
from tests.support.launch import ServerProcess
from tests.support.lesions import drawn_photo, encode_photo, lesion_photo
from tests.support.offline import Offline

PHOTO = drawn_photo(2, 400, 300, "PNG")


@pytest.fixture(scope="module")
def probability(offline: Offline) -> NDArray[np.float32]:
    """At the photo's size."""
    return next(upsampled(offline.probability(read_photo(PHOTO)), 400, 300, 300))


def form(server: ServerProcess, name: str, photo: bytes = PHOTO, **query: Any) -> httpx.Response:
    return post(server, photo, params={"format": name, **query})


def opened(content: bytes) -> Image.Image:
    picture = Image.open(BytesIO(content))
    picture.load()
    return picture


def outlined(shown: NDArray[np.uint8], photo: NDArray[np.uint8], mask: NDArray[np.bool_]) -> None:
    """Drawn where the mask ends, and nowhere else."""
    changed = np.abs(shown.astype(int) - photo).max(axis=2) > 60
    near = np.zeros_like(mask)
    for down in range(-6, 7):
        for right in range(-6, 7):
            near |= np.roll(mask, (down, right), (0, 1)) != mask
    assert changed[near].mean() > 0.2 and changed[~near].mean() < 0.001


@pytest.mark.parametrize(("name", "kind"), [("overlay", "JPEG"), ("overlay-png", "PNG")])
@pytest.mark.parametrize("as_form", [True, False])
def test_an_overlay_is_the_upright_photo_with_the_outline(
    server: ServerProcess, offline: Offline, name: str, kind: str, as_form: bool
) -> None:
    pixels = lesion_photo(2, 400, 300).pixels
    photo = encode_photo(pixels, "PNG", orientation=6)
    sent: dict[str, Any] = {"files": {"file": photo}} if as_form else {"content": photo}
    answer = httpx.post(f"{server.url}/segment", params={"format": name}, **sent)
    assert answer.headers["content-type"] == f"image/{kind.lower()}"
    shown = opened(answer.content)
    assert (shown.format, shown.mode, shown.size) == (kind, "RGB", (400, 300))
    outlined(np.asarray(shown), pixels, offline.mask(photo))


def test_a_parameter_in_the_form_chooses_the_form(server: ServerProcess) -> None:
    answer = httpx.post(f"{server.url}/segment", files={"file": PHOTO}, data={"format": "overlay"})
    assert answer.content == form(server, "overlay").content


def test_the_overlay_of_a_large_photo_is_reduced(server: ServerProcess) -> None:
    large = encode_photo(lesion_photo(2, 5200, 3400).pixels, "PNG", compress_level=1)
    assert opened(form(server, "overlay", large).content).size == (2048, 1339)


@pytest.mark.parametrize(("name", "bits"), [("probability8", 8), ("probability16", 16)])
def test_probabilities_as_png(
    server: ServerProcess, probability: NDArray[np.float32], name: str, bits: int
) -> None:
    answer = form(server, name, size="original")
    assert answer.headers["content-type"] == "image/png"
    picture = opened(answer.content)
    assert picture.mode == ("L" if bits == 8 else "I;16") and picture.size == (400, 300)
    levels = np.asarray(picture) / (2**bits - 1)
    assert np.abs(levels - probability).max() <= 0.5 / (2**bits - 1) + 2e-4
    # Without a size, the network's own.
    assert opened(form(server, name).content).size == (128, 128)


def test_probabilities_as_numpys_file(
    server: ServerProcess, probability: NDArray[np.float32]
) -> None:
    answer = form(server, "npy", size="original")
    assert answer.headers["content-type"] == "application/x-npy"
    loaded = np.load(BytesIO(answer.content), allow_pickle=False)
    assert loaded.dtype == np.float32 and loaded.shape == (300, 400)
    assert np.abs(loaded - probability).max() < 2e-4
    clean = np.load(BytesIO(form(server, "npy", clean="true").content))
    assert clean.shape == (128, 128)


def test_the_outline_as_svg(server: ServerProcess) -> None:
    answer = form(server, "svg")
    assert answer.headers["content-type"] == "image/svg+xml"
    document = ET.fromstring(answer.content)
    space = "{http://www.w3.org/2000/svg}"
    assert (document.tag, document.get("viewBox")) == (f"{space}svg", "0 0 400 300")
    paths = [path.get("d", "") for path in document.iter(f"{space}path")]
    found = post(server, PHOTO, params={"format": "json", "mask": "polygons"}).json()
    drawn = [
        [
            [tuple(map(float, point.split())) for point in ring.strip("Z").split("L")]
            for ring in path.split("M")[1:]
        ]
        for path in paths
    ]
    expected = [
        [[tuple(point) for point in ring] for ring in rings] for rings in found["mask"]["polygons"]
    ]
    assert drawn == expected


def test_an_annotation_of_coco(server: ServerProcess) -> None:
    answer = form(server, "coco")
    assert answer.headers["content-type"] == "application/json"
    annotation = answer.json()
    whole = post(server, PHOTO, params={"format": "json", "mask": "rle"}).json()
    assert annotation == {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "segmentation": whole["mask"]["rle"],
        "area": whole["lesion"]["area"],
        "bbox": whole["lesion"]["bounding_box"],
        "iscrowd": 0,
    }


# pycocotools is for NumPy 1.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_cocos_own_tools_read_the_annotation(server: ServerProcess, offline: Offline) -> None:
    tools = pytest.importorskip("pycocotools.mask", reason="needs pycocotools")
    annotation = form(server, "coco").json()
    decoded = tools.decode(annotation["segmentation"]).astype(bool)
    np.testing.assert_array_equal(decoded, offline.mask(PHOTO))
    assert tools.area(annotation["segmentation"]) == annotation["area"]


@pytest.mark.parametrize(
    ("name", "is_text"),
    [
        ("overlay", False),
        ("probability8", False),
        ("probability16", False),
        ("npy", False),
        ("svg", True),
        ("coco", None),
    ],
)
def test_json_holds_the_same(server: ServerProcess, name: str, is_text: bool | None) -> None:
    whole = httpx.post(f"{server.url}/segment/json", content=PHOTO, params={"mask": name}).json()
    assert whole["mask"].keys() == {"format", "width", "height", name}
    held = whole["mask"][name]
    content = form(server, name).content
    if is_text is None:
        assert held == json.loads(content)
    else:
        assert (held.encode() if is_text else base64.b64decode(held)) == content


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("image/jpeg", "image/jpeg"),
        ("image/svg+xml", "image/svg+xml"),
        ("application/x-npy", "application/x-npy"),
        ("image/png;q=0.5, image/jpeg", "image/jpeg"),
        ("image/jpeg;q=0.5, image/png", "image/png"),
        ("*/*;q=0, image/jpeg", "image/jpeg"),
        # As browsers ask for any image: the mask, as ever.
        ("image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", "image/png"),
        ("image/jpeg, */*", "image/png"),
    ],
)
def test_accept_may_name_a_form(server: ServerProcess, accept: str, kind: str) -> None:
    answer = post(server, PHOTO, headers={"Accept": accept})
    assert answer.headers["content-type"] == kind


def test_a_form_without_a_lesion(server: ServerProcess) -> None:
    none: dict[str, Any] = {"threshold": 1}
    assert opened(form(server, "overlay", **none).content).size == (400, 300)
    assert b"<path" not in form(server, "svg", **none).content
    annotation = form(server, "coco", **none).json()
    assert (annotation["area"], annotation["bbox"]) == (0, [0, 0, 0, 0])
    parameters = {"format": "json", "features": "true", **none}
    assert post(server, PHOTO, params=parameters).json()["features"] is None


def test_features_in_json(server: ServerProcess) -> None:
    for parameters in ({"size": "original"}, {"size": "model"}):
        answer = post(server, PHOTO, params={"features": "true", **parameters}).json()
        found = answer["features"]
        # In pixels of the photo, whatever size the mask has.
        assert 50 < found["minor_axis"] <= found["major_axis"] < 500
        assert sum(found["colours"].values()) == pytest.approx(1, abs=0.01)
        assert 0 <= found["asymmetry_major"] < 1
    assert "features" not in post(server, PHOTO, params={"format": "json"}).json()


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"format": "svg", "mask": "rle"}, ("mask=rle", "format=svg")),
        ({"format": "overlay", "features": "true"}, ("features=true", "format=overlay")),
        ({"format": "png", "features": "true"}, ("features=true", "JSON")),
        ({"format": "overlay", "size": "model"}, ("photo's size",)),
        ({"mask": "overlay", "size": "model"}, ("photo's size",)),
        ({"format": "gif"}, ("overlay", "npy")),
    ],
)
def test_what_does_not_go_together_is_told(
    server: ServerProcess, query: dict[str, str], words: tuple[str, ...]
) -> None:
    for sent in ({"content": PHOTO}, {"files": {"file": PHOTO}, "data": query}):
        params = None if "data" in sent else query
        answer = httpx.post(f"{server.url}/segment", params=params, **sent)
        assert_problem(answer, 422, *words)


def test_a_batch_has_forms_and_features_in_its_lines(server: ServerProcess) -> None:
    files = [("a", ("a.png", PHOTO)), ("b", ("b.png", drawn_photo(3, 320, 240)))]
    answer = httpx.post(
        f"{server.url}/segment/batch",
        files=files,
        params={"mask": "overlay", "features": "true"},
    )
    lines = sorted(map(json.loads, answer.text.splitlines()), key=lambda line: int(line["index"]))
    sizes = []
    for line in lines:
        result = line["result"]
        sizes.append(opened(base64.b64decode(result["mask"]["overlay"])).size)
        assert result["features"]["perimeter"] > 0
    assert sizes == [(400, 300), (320, 240)]


@pytest.mark.parametrize(
    ("mask", "kind"),
    [("overlay", "image/jpeg"), ("svg", "image/svg+xml"), ("npy", "application/x-npy")],
)
def test_a_part_of_a_batch_may_have_any_form(server: ServerProcess, mask: str, kind: str) -> None:
    answer = httpx.post(
        f"{server.url}/segment/batch",
        files=[("a", ("a.png", PHOTO)), ("b", ("b.png", b"no photo"))],
        params={"mask": mask},
        headers={"Accept": "multipart/mixed"},
    )
    head = f"Content-Type: {answer.headers['content-type']}\r\n\r\n".encode()
    message = email.message_from_bytes(head + answer.content)
    parts: dict[str, Message] = {part["Item-Index"]: part for part in message.get_payload()}  # type: ignore[misc,index]
    assert parts["0"].get_content_type() == kind
    assert parts["0"].get_payload(decode=True) == form(server, mask).content
    assert parts["1"]["Item-Status"] == "415"


def test_run_lengths_are_no_part_of_their_own(server: ServerProcess) -> None:
    answer = httpx.post(
        f"{server.url}/segment/batch",
        files=[("a", ("a.png", PHOTO))],
        params={"mask": "rle"},
        headers={"Accept": "multipart/mixed"},
    )
    assert_problem(answer, 422, "mask=rle", "JSON")


def test_the_mask_itself_is_as_it_was(server: ServerProcess, offline: Offline) -> None:
    mask = offline.mask(PHOTO)
    assert form(server, "png").content == encode_png(np.packbits(mask, axis=1), 400, 300)
    assert read_png(post(server, PHOTO).content).shape == mask.shape
