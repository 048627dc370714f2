"""DICOM over HTTP: the same masks as of other formats, millimetres, and nothing of the patient."""

import json

import httpx
import numpy as np
import pytest

from photos.image import read_photo
from tests.support.answers import assert_problem
from tests.support.dicom import PATIENT, dicom_bytes, needs_dicom
from tests.support.launch import ServerProcess
from tests.support.lesions import encode_photo, lesion_photo

pytest.importorskip("pydicom", reason="needs requirements-dicom.txt")
needs_dicom()

PIXELS = lesion_photo(2, 320, 240).pixels
PNG = encode_photo(PIXELS, "PNG")
PHOTO = dicom_bytes(PIXELS, PixelSpacing=[0.05, 0.025])
DICOM = {"Content-Type": "application/dicom"}
TRUE_COLOUR = "1.2.840.10008.5.1.4.1.1.7.4"


def test_its_mask_is_that_of_the_same_photo(server: ServerProcess) -> None:
    wanted = httpx.post(f"{server.url}/segment", content=PNG).raise_for_status()
    found = httpx.post(f"{server.url}/segment", content=PHOTO, headers=DICOM).raise_for_status()
    assert found.content == wanted.content
    assert found.headers["Content-Type"] == "image/png"
    part = {"file": ("IM0001", PHOTO, "application/dicom")}
    assert httpx.post(f"{server.url}/segment", files=part).content == wanted.content


def test_json_has_millimetres_where_the_object_does(server: ServerProcess) -> None:
    url = f"{server.url}/segment/json?features=true"
    answer = httpx.post(url, content=PHOTO, headers=DICOM).raise_for_status().json()
    lesion, features = answer["lesion"], answer["features"]
    found = lesion["millimetres"]
    assert found["pixel"] == [0.025, 0.05]
    assert found["area"] == pytest.approx(lesion["area"] * 0.025 * 0.05, rel=1e-3)
    _, _, width, height = lesion["bounding_box"]
    assert max(width * 0.025, height * 0.05) <= found["diameter"] + 0.06
    assert found["diameter"] <= np.hypot(width * 0.025, height * 0.05) + 0.06
    assert found["minor_axis"] <= found["major_axis"] <= found["diameter"] * 1.2
    assert 2 * found["diameter"] <= found["perimeter"] <= 4 * found["diameter"]
    # With pixels that are squares, it is the number of pixels times their size.
    square = dicom_bytes(PIXELS, PixelSpacing=[0.1, 0.1])
    found = httpx.post(f"{server.url}/segment/json", content=square).json()["lesion"]["millimetres"]
    for name in ("perimeter", "major_axis", "minor_axis"):
        assert found[name] == pytest.approx(features[name] * 0.1, rel=2e-3)
    for without in (PNG, dicom_bytes(PIXELS)):
        answer = httpx.post(f"{server.url}/segment/json", content=without).json()
        assert "millimetres" not in answer["lesion"]


def test_a_frame_is_chosen_in_query_and_form(server: ServerProcess) -> None:
    frames = dicom_bytes(np.stack([PIXELS[::-1], PIXELS]), "rle", kind=TRUE_COLOUR)
    wanted = httpx.post(f"{server.url}/segment", content=PNG).content
    url = f"{server.url}/segment"
    assert httpx.post(f"{url}?frame=2", content=frames).content == wanted
    form = {"frame": "2", "format": "overlay-png"}
    drawn = httpx.post(url, files={"file": frames}, data=form)
    assert drawn.content == httpx.post(f"{url}?format=overlay-png", content=PNG).content
    assert_problem(httpx.post(url, content=frames), 422, "2 frames", "parameter frame")
    assert_problem(httpx.post(f"{url}?frame=0", content=frames), 422, "frame")
    assert_problem(httpx.post(f"{url}?frame=1", content=PNG), 422, "frame=1 is for DICOM")


def test_a_batch_takes_it_among_others(server: ServerProcess) -> None:
    ct = dicom_bytes(PIXELS, kind="1.2.840.10008.5.1.4.1.1.2")
    files = [("file", PNG), ("file", PHOTO), ("file", ct)]
    answer = httpx.post(f"{server.url}/segment/batch?mask=rle", files=files).raise_for_status()
    lines = sorted(map(json.loads, answer.text.splitlines()), key=lambda line: int(line["index"]))
    assert [line["status"] for line in lines] == [200, 200, 415]
    assert lines[0]["result"]["mask"] == lines[1]["result"]["mask"]
    assert "millimetres" in lines[1]["result"]["lesion"]
    assert "CT Image Storage" in lines[2]["error"]["detail"]


def test_nothing_of_the_patient_is_told_or_logged(server: ServerProcess) -> None:
    broken = dicom_bytes(PIXELS, PixelData=b"\0" * 100)
    answers = [
        httpx.post(f"{server.url}/segment/json?features=true&borders=true", content=PHOTO),
        httpx.post(f"{server.url}/segment/json", content=broken),
        httpx.post(f"{server.url}/segment/json", content=PHOTO[:700]),
        httpx.post(f"{server.url}/segment/json", content=dicom_bytes(PIXELS, kind="1.2.3")),
    ]
    assert [answer.status_code for answer in answers] == [200, 422, 422, 415]
    told = "".join(answer.text + str(answer.headers) for answer in answers)
    told += server.log() + httpx.get(f"{server.url}/metrics").text
    for part in (*PATIENT.split("^"), "4711-0815", "19570203", "A123", "Arzt"):
        assert part not in told


def test_its_pixels_are_those_that_an_overlay_is_drawn_on() -> None:
    assert np.array_equal(read_photo(PHOTO).pixels, read_photo(PNG).pixels)
