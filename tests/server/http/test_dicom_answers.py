"""`format=dicom`: objects that refer to the photo's, which archives take and viewers read."""

import email
import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.answers import assert_problem
from tests.support.dicom import PATIENT, dicom_bytes, needs_dicom
from tests.support.launch import ServerProcess
from tests.support.lesions import encode_photo, lesion_photo

pytest.importorskip("pydicom", reason="needs requirements-dicom.txt")
needs_dicom()

PIXELS = lesion_photo(2, 322, 240).pixels
PHOTO = dicom_bytes(PIXELS, PixelSpacing=[0.05, 0.05])
ALL = "seg,probability,overlay,sr"
TRUE_COLOUR = "1.2.840.10008.5.1.4.1.1.7.4"
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"


def ask(server: ServerProcess, query: str, photo: bytes = PHOTO) -> httpx.Response:
    headers = {"Content-Type": "application/dicom"}
    return httpx.post(f"{server.url}/segment?{query}", content=photo, headers=headers)


def parts(answer: httpx.Response) -> list[bytes]:
    """The objects of an answer that has several."""
    head = f"Content-Type: {answer.headers['Content-Type']}\r\n\r\n".encode()
    message = email.message_from_bytes(head + answer.content)
    assert message.get_content_type() == "multipart/related"
    assert message.get_param("type") == "application/dicom"
    found = []
    for part in message.get_payload():
        assert isinstance(part, email.message.Message)
        assert part.get_content_type() == "application/dicom"
        found.append(part.get_payload(decode=True))
    return found  # type: ignore[return-value] # bytes, since they are decoded


def read(data: bytes) -> Any:
    import pydicom

    return pydicom.dcmread(BytesIO(data))


def assert_valid(data: bytes, folder: Path) -> None:
    """Held against the standard by dicom3tools, where they are."""
    if shutil.which("dciodvfy") is None:
        return
    path = folder / "object.dcm"
    path.write_bytes(data)
    said = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
    assert "Error" not in said.stdout + said.stderr, said.stderr


@pytest.fixture(scope="module")
def objects(server: ServerProcess) -> dict[str, bytes]:
    answer = ask(server, f"format=dicom&objects={ALL}").raise_for_status()
    return dict(zip(ALL.split(","), parts(answer), strict=True))


@pytest.fixture(scope="module")
def mask(server: ServerProcess) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(BytesIO(ask(server, "").content)))


@pytest.mark.parametrize("name", ALL.split(","))
def test_each_object_is_valid_and_of_the_same_patient_and_study(
    objects: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("needs dciodvfy (Debian's dicom3tools)")
    assert_valid(objects[name], tmp_path)
    source, found = read(PHOTO), read(objects[name])
    for keyword in ("StudyInstanceUID", "PatientID", "PatientBirthDate", "AccessionNumber"):
        assert found[keyword].value == source[keyword].value
    assert str(found.PatientName) == PATIENT
    assert found.SeriesInstanceUID != source.SeriesInstanceUID
    assert source.SOPInstanceUID in str(found), "it names its source"
    assert "slsnet" in str(found.SoftwareVersions)


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        ("ISO_IR 144", "Иванов^Пётр"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
        ("ISO 2022 IR 100", PATIENT),
        ("ISO_IR 6", "Somebody"),
        (None, "Somebody"),
    ],
)
def test_results_have_the_patients_name_in_every_writing(
    server: ServerProcess, tmp_path: Path, character_set: Any, name: str
) -> None:
    photo = dicom_bytes(PIXELS, SpecificCharacterSet=character_set, PatientName=name)
    answer = ask(server, f"format=dicom&objects={ALL}", photo).raise_for_status()
    for content in parts(answer):
        assert str(read(content).PatientName) == name
        assert_valid(content, tmp_path)


def test_segmentations_have_the_mask_and_say_what_made_it(
    objects: dict[str, bytes], mask: np.ndarray[Any, Any], server: ServerProcess
) -> None:
    import highdicom

    card = httpx.get(f"{server.url}/model").json()
    quality = ask(server, "format=json").json()["quality"]
    found = highdicom.seg.segread(BytesIO(objects["seg"]))
    assert np.array_equal(found.pixel_array.reshape(mask.shape) > 0, mask)
    segment = found.get_segment_description(1)
    assert segment.segmented_property_type.value == "52988006"  # a lesion
    assert segment.algorithm_identification is not None
    (algorithm,) = segment.algorithm_identification
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == (card["name"], card["version"])
    assert f"weights_sha256={card['weights_sha256']}" in algorithm.AlgorithmParameters
    assert f"{quality['jaccard']:.3f} ({quality['grade']})" in segment.SegmentDescription
    fractional = highdicom.seg.segread(BytesIO(objects["probability"]))
    levels = np.asarray(
        Image.open(BytesIO(ask(server, "format=probability8&size=original").content))
    )
    values = fractional.pixel_array.reshape(levels.shape)
    assert fractional.SegmentationFractionalType == "PROBABILITY"
    assert np.abs(values.astype(int) - levels).max() <= 1


@pytest.mark.parametrize(
    "keyword", ["PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"]
)
def test_segmentations_have_the_size_of_the_photos_pixels(
    server: ServerProcess, tmp_path: Path, keyword: str
) -> None:
    import highdicom

    size: dict[str, Any] = {keyword: [0.0512345678, 0.025]}
    photo = dicom_bytes(PIXELS, **size)
    answer = ask(server, "format=dicom&objects=seg,probability", photo).raise_for_status()
    for content in parts(answer):
        assert_valid(content, tmp_path)
        found = highdicom.seg.segread(BytesIO(content))
        (measures,) = found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
        assert list(measures.PixelSpacing) == [0.0512345678, 0.025]


def test_a_segmentation_of_a_photo_without_a_size_has_none(server: ServerProcess) -> None:
    answer = ask(server, "format=dicom", dicom_bytes(PIXELS, PixelSpacing=[0, 0]))
    assert "PixelSpacing" not in str(read(answer.raise_for_status().content))


def test_the_overlay_is_the_photo_with_the_outline(
    objects: dict[str, bytes], server: ServerProcess
) -> None:
    found = read(objects["overlay"])
    drawn = Image.open(BytesIO(ask(server, "format=overlay-png").content))
    assert np.array_equal(found.pixel_array, np.asarray(drawn))
    assert found.Modality == "OT" and list(found.PixelSpacing) == [0.05, 0.05]


def test_the_report_has_the_measures_of_json(
    objects: dict[str, bytes], server: ServerProcess
) -> None:
    import highdicom

    answer = ask(server, "format=json").json()
    report: Any = highdicom.sr.srread(BytesIO(objects["sr"]))
    (group,) = report.content.get_planar_roi_measurement_groups()
    found = {item.name.meaning: (item.value, item.unit.value) for item in group.get_measurements()}
    wanted = answer["lesion"]["millimetres"]
    assert found["Area"] == (wanted["area"], "mm2")
    assert found["Perimeter"] == (wanted["perimeter"], "mm")
    assert found["Diameter"] == (wanted["diameter"], "mm")
    assert found["Expected Jaccard index"] == (answer["quality"]["jaccard"], "1")
    assert read(objects["seg"]).SOPInstanceUID in str(report), "it refers to the segment"


def test_the_same_question_has_the_same_objects(
    objects: dict[str, bytes], server: ServerProcess, tmp_path: Path
) -> None:
    alone = ask(server, "format=dicom").raise_for_status()
    assert alone.headers["Content-Type"] == "application/dicom"
    assert read(alone.content).SOPInstanceUID == read(objects["seg"]).SOPInstanceUID
    other = ask(server, "format=dicom&objects=sr&threshold=0.3").raise_for_status()
    assert read(other.content).SOPInstanceUID != read(objects["sr"]).SOPInstanceUID
    # Without the segment it has the outline.
    assert_valid(other.content, tmp_path)
    assert "SCOORD" in str(read(other.content))


def test_a_photo_without_lesion_has_objects_too(server: ServerProcess, tmp_path: Path) -> None:
    plain = dicom_bytes(np.full((80, 100, 3), 220, np.uint8))
    for found in parts(ask(server, "format=dicom&objects=seg,sr&threshold=1", plain)):
        assert_valid(found, tmp_path)
        if read(found).SOPClassUID == SEGMENTATION:
            assert not read(found).pixel_array.any()


def test_a_frame_of_several_is_named(server: ServerProcess, tmp_path: Path) -> None:
    frames = dicom_bytes(np.stack([PIXELS[::-1], PIXELS]), "rle", kind=TRUE_COLOUR)
    seg, overlay, report = parts(
        ask(server, "format=dicom&objects=seg,overlay,sr&frame=2", frames).raise_for_status()
    )
    for found in (seg, overlay, report):
        assert_valid(found, tmp_path)
    (image,) = read(seg).SourceImageSequence
    assert (image.ReferencedSOPClassUID, image.ReferencedFrameNumber) == (TRUE_COLOUR, 2)
    assert read(overlay).SourceImageSequence[0].ReferencedFrameNumber == 2


def batch(server: ServerProcess, query: str, photos: list[bytes]) -> httpx.Response:
    files = [("file", photo) for photo in photos]
    return httpx.post(f"{server.url}/segment/batch?{query}", files=files)


def items(answer: httpx.Response) -> dict[int, email.message.Message]:
    """The parts of a batch's answer by the index of their photo."""
    head = f"Content-Type: {answer.headers['Content-Type']}\r\n\r\n".encode()
    message = email.message_from_bytes(head + answer.content)
    assert message.get_content_type() == "multipart/mixed"
    found = {}
    for part in message.get_payload():
        assert isinstance(part, email.message.Message)
        found[int(part["Item-Index"])] = part
    return found


def test_a_batch_of_objects_is_answered_with_objects(
    server: ServerProcess, objects: dict[str, bytes]
) -> None:
    png = encode_photo(PIXELS, "PNG")
    ct = dicom_bytes(PIXELS, kind="1.2.840.10008.5.1.4.1.1.2")
    alone = items(batch(server, "format=dicom", [png, PHOTO, ct]).raise_for_status())
    assert [alone[index]["Item-Status"] for index in range(3)] == ["422", "200", "415"]
    assert "photo that is DICOM itself" in str(alone[0].get_payload())
    assert alone[1].get_content_type() == "application/dicom" and alone[1]["Mask-Quality"]
    found = read(alone[1].get_payload(decode=True))  # type: ignore[arg-type] # bytes
    assert found.SOPInstanceUID == read(objects["seg"]).SOPInstanceUID
    every = items(batch(server, f"format=dicom&objects={ALL}", [PHOTO]).raise_for_status())[0]
    assert every.get_content_type() == "multipart/related"
    uids = [
        read(part.get_payload(decode=True)).SOPInstanceUID  # type: ignore[union-attr,arg-type]
        for part in every.get_payload()
    ]
    assert uids == [read(objects[name]).SOPInstanceUID for name in ALL.split(",")]


def test_a_batch_takes_one_frame_of_each_object(
    server: ServerProcess, mask: np.ndarray[Any, Any]
) -> None:
    frames = dicom_bytes(np.stack([PIXELS[::-1], PIXELS]), "rle", kind=TRUE_COLOUR)
    found = items(batch(server, "format=dicom&frame=2", [frames, PHOTO]).raise_for_status())
    assert np.array_equal(read(found[0].get_payload(decode=True)).pixel_array > 0, mask)  # type: ignore[arg-type]
    assert found[1]["Item-Status"] == "422"
    assert "frame=2 is asked for, and the DICOM object has one" in str(found[1].get_payload())


def test_a_batch_that_contradicts_itself_is_refused(server: ServerProcess) -> None:
    for query, words in (
        ("objects=seg", ("objects=seg is for format=dicom",)),
        ("format=dicom&mask=rle", ("mask=rle is for JSON answers",)),
        ("format=dicom&size=model", ("DICOM answer has the photo's size",)),
        ("format=svg", ("format",)),
    ):
        assert_problem(batch(server, query, [PHOTO]), 422, *words)


def test_objects_with_odd_headers_are_answered(server: ServerProcess, tmp_path: Path) -> None:
    odd = dicom_bytes(
        PIXELS,
        StudyDate=None,
        StudyID=None,
        AccessionNumber=None,
        PatientSex="",
        FrameOfReferenceUID="1.2.3",
    ).replace(b"19570203", b"unknown ")
    answer = ask(server, f"format=dicom&objects={ALL}", odd)
    if answer.status_code == 422:
        assert_problem(answer, 422, "attributes have values that DICOM does not allow")
    else:
        assert len(parts(answer)) == 4


@pytest.mark.parametrize(
    ("query", "photo", "words"),
    [
        (
            "format=dicom",
            encode_photo(PIXELS, "PNG"),
            ("is for a photo that is DICOM itself",),
        ),
        ("format=dicom&objects=seg,mask", PHOTO, ("objects", "'mask'", "seg, probability")),
        ("format=dicom&objects=", PHOTO, ("objects",)),
        ("format=json&objects=seg", PHOTO, ("objects=seg is for format=dicom",)),
        ("format=dicom&size=model", PHOTO, ("DICOM answer has the photo's size",)),
        ("format=dicom&mask=rle", PHOTO, ("mask=rle is for format=json",)),
    ],
)
def test_what_contradicts_itself_is_refused(
    server: ServerProcess, query: str, photo: bytes, words: tuple[str, ...]
) -> None:
    assert_problem(ask(server, query, photo), 422, *words)


def test_a_body_that_is_missing_is_named(server: ServerProcess) -> None:
    assert_problem(ask(server, "format=dicom", b""), 400, "no body")


def test_accept_may_ask_for_it(server: ServerProcess) -> None:
    headers = {"Accept": "application/dicom", "Content-Type": "application/dicom"}
    answer = httpx.post(f"{server.url}/segment", content=PHOTO, headers=headers)
    assert read(answer.raise_for_status().content).SOPClassUID == SEGMENTATION
    form = {"format": "dicom", "objects": "seg"}
    posted = httpx.post(f"{server.url}/segment", files={"file": PHOTO}, data=form)
    assert read(posted.content).SOPInstanceUID == read(answer.content).SOPInstanceUID
