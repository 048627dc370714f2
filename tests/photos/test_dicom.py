"""DICOM: read as other formats are, within the same limits, in a process of its own."""

import struct
import sys
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from photos.dicom import process
from photos.image import (
    CorruptImageError,
    ImageError,
    ImageTooLargeError,
    NoDecoderError,
    UnsupportedImageError,
    read_photo,
)
from tests.support.dicom import PATIENT, WAYS, dicom_bytes, needs_dicom
from tests.support.lesions import encode_photo, lesion_photo

pytest.importorskip("pydicom", reason="needs requirements-dicom.txt")
needs_dicom()

PIXELS = lesion_photo(2, 160, 120).pixels
GREY = PIXELS[..., 1].copy()
SECONDARY = "1.2.840.10008.5.1.4.1.1.7"
TRUE_COLOUR = "1.2.840.10008.5.1.4.1.1.7.4"


def decoded(data: bytes, frame: int | None = None) -> NDArray[np.uint8]:
    """What the process decodes, without the time to start one."""
    from photos.dicom.decoder import picture
    from photos.dicom.header import header, parsed

    dataset = parsed(data)
    return np.asarray(picture(dataset, header(dataset, frame)))


def assert_looks_like(found: NDArray[np.uint8], wanted: NDArray[Any], within: float = 0.6) -> None:
    if wanted.ndim == 2:
        wanted = np.repeat(wanted[..., None], 3, axis=2)
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).mean() <= within


def test_it_looks_as_the_same_photo_in_another_format() -> None:
    asked: list[int] = []

    def room(pixels: int) -> Any:
        asked.append(pixels)
        return memoryview(b"")

    found, same = (
        read_photo(dicom_bytes(PIXELS), room=room),
        read_photo(encode_photo(PIXELS, "PNG")),
    )
    assert (found.width, found.height, found.orientation) == (160, 120, 1)
    assert np.array_equal(found.pixels, same.pixels)
    assert found.spacing is None
    assert asked == [160 * 120]


@pytest.mark.parametrize("way", WAYS)
def test_it_is_read_however_its_pixels_are_stored(way: str) -> None:
    is_lossy = way in ("jpeg", "jpeg-422", "jpeg-extended", "jpeg2000-lossy")
    for pixels in (PIXELS, GREY):
        if way == "jpeg-lossless" and pixels.ndim == 3:
            continue  # nothing here stores one
        found = decoded(dicom_bytes(pixels, way))
        assert_looks_like(found, pixels, 2 if is_lossy else 0)


REAL = (
    "SC_rgb_dcmtk_+eb+cy+n1",  # JPEG of YBR_FULL and its kin
    "SC_rgb_dcmtk_+eb+cy+n2",
    "SC_rgb_dcmtk_+eb+cy+np",
    "SC_rgb_dcmtk_+eb+cy+s2",
    "SC_rgb_dcmtk_+eb+cy+s4",
    "SC_rgb_jpeg_dcmtk",
    "SC_rgb_jpeg_gdcm",  # lossless
    "SC_rgb_jpeg_lossy_gdcm",
    "SC_rgb_gdcm_KY",  # JPEG 2000
    "SC_rgb_rle",
    "SC_rgb_rle_16bit",
    "SC_ybr_full_422_uncompressed",
)


@pytest.mark.parametrize("name", REAL)
def test_files_of_other_programs_look_alike(name: str) -> None:
    import pydicom

    folder = Path(pydicom.__file__).parent / "data/test_files"
    if not (folder / f"{name}.dcm").is_file():
        pytest.skip("pydicom came without its test files")
    found = decoded((folder / f"{name}.dcm").read_bytes())
    # Stripes of eight colours, and of three greys.
    wanted = decoded((folder / "SC_rgb_dcmtk_+eb+cr.dcm").read_bytes())
    assert_looks_like(found, wanted, 3)


def test_every_way_to_store_colours_is_read() -> None:
    ycbcr = np.asarray(Image.fromarray(PIXELS).convert("YCbCr"))
    full = dicom_bytes(ycbcr, PhotometricInterpretation="YBR_FULL")
    assert_looks_like(decoded(full), PIXELS, 1)
    planes = np.ascontiguousarray(PIXELS.transpose(2, 0, 1)).tobytes()
    by_plane = dicom_bytes(PIXELS, PlanarConfiguration=1, PixelData=planes)
    assert_looks_like(decoded(by_plane), PIXELS, 0)
    inverted = dicom_bytes(255 - GREY, PhotometricInterpretation="MONOCHROME1")
    assert_looks_like(decoded(inverted), GREY, 0)
    deep = dicom_bytes((PIXELS.astype(np.uint16) << 4), BitsStored=12, HighBit=11)
    assert_looks_like(decoded(deep), PIXELS, 1)


def test_luminance_and_chroma_of_more_than_8_bits_give_colours() -> None:
    ycbcr = np.asarray(Image.fromarray(PIXELS).convert("YCbCr")).astype(np.uint16)
    for way in ("native", "implicit"):
        sixteen = dicom_bytes(ycbcr * 257, way, PhotometricInterpretation="YBR_FULL")
        assert_looks_like(decoded(sixteen), PIXELS, 1)
    twelve = dicom_bytes(
        ycbcr << 4 | 8, PhotometricInterpretation="YBR_FULL", BitsStored=12, HighBit=11
    )
    assert_looks_like(decoded(twelve), PIXELS, 1.5)


def test_jpeg_of_12_bits_is_read() -> None:
    bits = {"BitsStored": 12, "HighBit": 11}
    for pixels in (PIXELS, GREY):
        deep = pixels.astype(np.uint16) << 4 | 8
        assert_looks_like(decoded(dicom_bytes(deep, "jpeg-12", **bits)), pixels, 1.5)
    inverted = dicom_bytes(
        4095 - (GREY.astype(np.uint16) << 4),
        "jpeg-12",
        PhotometricInterpretation="MONOCHROME1",
        **bits,
    )
    assert_looks_like(decoded(inverted), GREY, 1.5)
    # The limits of the process suffice.
    found = read_photo(dicom_bytes(PIXELS.astype(np.uint16) << 4, "jpeg-12", **bits))
    assert (found.width, found.height) == (160, 120)


def test_jpeg_of_12_bits_that_is_not_what_its_header_says_is_refused() -> None:
    from photos.dicom.header import Refusal

    deep = GREY.astype(np.uint16) << 4
    bits = {"BitsStored": 12, "HighBit": 11}
    good = dicom_bytes(deep, "jpeg-12", **bits)
    for broken in (
        good.replace(b"\xff\xc1", b"\xff\xc3"),
        good[: int(0.7 * len(good))],
        dicom_bytes(deep, "jpeg-12", Rows=60, **bits),
        dicom_bytes(GREY, "jpeg-extended", BitsAllocated=16, **bits),
    ):
        with pytest.raises(Refusal, match=r"do not decode|not parse"):
            decoded(broken)


def test_a_palette_gives_its_colours() -> None:
    image = Image.fromarray(PIXELS).quantize(200)
    palette = np.zeros((256, 3), np.uint16)
    flat = image.getpalette() or []
    palette[: len(flat) // 3] = np.array(flat, np.uint16).reshape(-1, 3)
    tables: dict[str, Any] = {
        f"{colour}PaletteColorLookupTableDescriptor": [256, 0, 16]
        for colour in ("Red", "Green", "Blue")
    }
    data: dict[str, Any] = {
        f"{colour}PaletteColorLookupTableData": (palette[:, index] * 257).tobytes()
        for index, colour in enumerate(("Red", "Green", "Blue"))
    }
    stored = dicom_bytes(
        np.asarray(image), PhotometricInterpretation="PALETTE COLOR", **tables, **data
    )
    assert_looks_like(decoded(stored), np.asarray(image.convert("RGB")), 0)


def test_grey_of_16_bits_is_seen_through_its_window() -> None:
    values = GREY.astype(np.uint16) * 16 + 1000
    windowed = dicom_bytes(values, WindowCenter=1000 + 2040, WindowWidth=4081)
    assert_looks_like(decoded(windowed), GREY, 1)
    rescaled = dicom_bytes(
        values, RescaleSlope=0.5, RescaleIntercept=-500, WindowCenter=1020, WindowWidth=2041
    )
    assert_looks_like(decoded(rescaled), GREY, 1)
    plain = dicom_bytes(GREY.astype(np.uint16) << 4, BitsStored=12, HighBit=11)
    assert_looks_like(decoded(plain), GREY, 1)
    for no_window in (
        dicom_bytes(GREY, WindowCenter=0, WindowWidth=0),
        dicom_bytes(GREY, WindowCenter=0),
    ):
        assert_looks_like(decoded(no_window), GREY, 0)
    signed = dicom_bytes(
        np.arange(-60, 60).astype(np.int16)[:, None].repeat(4, 1).view(np.uint16),
        PixelRepresentation=1,
    )
    ramp = np.linspace(0, 255, 120)[:, None].repeat(4, 1)
    assert_looks_like(decoded(signed), ramp, 1)


def test_a_table_of_values_of_interest_is_applied() -> None:
    from pydicom.dataset import Dataset

    table = Dataset()
    table.LUTDescriptor = [256, 0, 16]
    table.add_new(0x00283006, "US", [257 * level for level in range(255, -1, -1)])
    stored = dicom_bytes(GREY, VOILUTSequence=[table])
    assert_looks_like(decoded(stored), 255 - GREY, 0)
    # The usual one: many values to few.
    table.LUTDescriptor = [4096, 0, 8]
    table.add_new(0x00283006, "US", [level >> 4 for level in range(4096)])
    deep = GREY.astype(np.uint16) << 4
    stored = dicom_bytes(deep, VOILUTSequence=[table], BitsStored=12, HighBit=11)
    assert_looks_like(decoded(stored), GREY, 0)


def test_a_frames_own_window_is_taken() -> None:
    from pydicom.dataset import Dataset

    def groups(dark: int) -> Dataset:
        """A window from `dark` to 4080 above it, over values of which each counts twice."""
        window, values, found = Dataset(), Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = dark + 2040, 4081
        values.RescaleIntercept, values.RescaleSlope, values.RescaleType = 0, 2, "US"
        found.FrameVOILUTSequence = [window]
        found.PixelValueTransformationSequence = [values]
        return found

    deep = GREY.astype(np.uint16) * 8
    frames = np.stack([deep + 500, deep + 9000])
    kind = "1.2.840.10008.5.1.4.1.1.7.3"
    shared = dicom_bytes(frames, kind=kind, SharedFunctionalGroupsSequence=[groups(18_000)])
    assert_looks_like(decoded(shared, 2), GREY, 1)
    each = [groups(1000), groups(18_000)]
    own = dicom_bytes(frames, kind=kind, PerFrameFunctionalGroupsSequence=each)
    for number in (1, 2):
        assert_looks_like(decoded(own, number), GREY, 1)


def test_one_of_several_frames_is_chosen_by_its_number() -> None:
    frames = np.stack([PIXELS, 255 - PIXELS])
    data = dicom_bytes(frames, "rle", kind=TRUE_COLOUR)
    for number, wanted in ((1, PIXELS), (2, 255 - PIXELS)):
        assert_looks_like(decoded(data, number), wanted, 0)
    with pytest.raises(ImageError, match="has 2 frames: choose one with the parameter frame"):
        read_photo(data)
    with pytest.raises(ImageError, match="frame=3 is asked for, and the DICOM object has 2 frames"):
        read_photo(data, frame=3)
    assert read_photo(dicom_bytes(PIXELS), frame=1).width == 160
    with pytest.raises(ImageError, match="frame=1 is for DICOM, and this is a PNG"):
        read_photo(encode_photo(PIXELS, "PNG"), frame=1)


def spacing(**attributes: Any) -> tuple[float, float] | None:
    from photos.dicom.header import header, parsed

    return header(parsed(dicom_bytes(PIXELS, **attributes)), None).spacing


def test_the_size_of_a_pixel_is_taken_in_the_standards_order() -> None:
    from pydicom.dataset import Dataset

    measures, groups = Dataset(), Dataset()
    measures.PixelSpacing = [0.05, 0.06]
    groups.PixelMeasuresSequence = [measures]
    scanned, detector, patient = [0.03, 0.04], [0.02, 0.02], [0.01, 0.015]
    assert spacing(NominalScannedPixelSpacing=scanned) == (0.03, 0.04)
    assert spacing(NominalScannedPixelSpacing=scanned, ImagerPixelSpacing=detector) == (0.02, 0.02)
    assert spacing(ImagerPixelSpacing=detector, PixelSpacing=patient) == (0.01, 0.015)
    assert spacing(SharedFunctionalGroupsSequence=[groups]) == (0.05, 0.06)
    # Nothing is better than a size that no photo has.
    assert spacing(PixelSpacing=[0, 0]) is None
    assert spacing(PixelSpacing=[1000, 1000]) is None
    found = read_photo(dicom_bytes(PIXELS, PixelSpacing=patient))
    assert found.spacing == (0.015, 0.01), "across, then down"


REFUSED: dict[str, dict[str, Any]] = {
    "CT Image Storage": {"kind": "1.2.840.10008.5.1.4.1.1.2"},
    "Encapsulated PDF Storage": {"kind": "1.2.840.10008.5.1.4.1.1.104.1"},
    "Comprehensive SR Storage": {"kind": "1.2.840.10008.5.1.4.1.1.88.33"},
    "VL Whole Slide Microscopy": {"kind": "1.2.840.10008.5.1.4.1.1.77.1.6"},
    "of a kind that the standard does not know": {"kind": "1.2.3.4"},
    "no SOPClassUID": {"SOPClassUID": None},
    "no valid SOPInstanceUID": {"SOPInstanceUID": None},
    "no valid StudyInstanceUID": {"StudyInstanceUID": None},
    "no valid SeriesInstanceUID": {"SeriesInstanceUID": ""},
    "no PixelData": {"PixelData": None},
    "Rows is missing": {"Rows": None},
    "Columns is missing": {"Columns": 0},
    "no PhotometricInterpretation": {"PhotometricInterpretation": "CMYK"},
    "SamplesPerPixel 1, and RGB has 3": {"SamplesPerPixel": 1},
    "32 bits stored in 32": {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31},
    "8 bits stored and HighBit 15": {"BitsAllocated": 16, "BitsStored": 8, "HighBit": 15},
    "do not decode": {"PixelData": PIXELS.tobytes()[:5000]},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_no_photo_is_refused_by_its_name(said: str) -> None:
    from photos.dicom.header import Refusal

    with pytest.raises(Refusal, match=said) as refused:
        decoded(dicom_bytes(PIXELS, **REFUSED[said]))
    assert not any(part in str(refused.value) for part in (*PATIENT.split("^"), "4711", "1957"))


def test_pixels_stored_in_another_way_than_said_are_refused() -> None:
    from pydicom import uid

    from photos.dicom.header import Refusal

    for way, syntax, said in (
        ("jpeg", uid.JPEG2000Lossless, "do not decode"),
        ("jpeg", uid.ExplicitVRLittleEndian, "do not"),
        ("native", uid.JPEGBaseline8Bit, "do not"),
        ("jpeg", uid.MPEG2MPML, "MPEG2 Main Profile"),
    ):
        data = dicom_bytes(PIXELS, way)
        own = {"jpeg": uid.JPEGBaseline8Bit, "native": uid.ExplicitVRLittleEndian}[way]
        # The names have different lengths, so that the header's has to follow.
        changed = with_syntax(data, own, syntax)
        with pytest.raises(Refusal, match=said):
            decoded(changed)


def with_syntax(data: bytes, own: str, other: str) -> bytes:
    def element(value: str) -> bytes:
        padded = value.encode() + b"\0" * (len(value) % 2)
        return b"\2\0\x10\0UI" + struct.pack("<H", len(padded)) + padded

    assert data.count(element(own)) == 1
    (length,) = struct.unpack_from("<I", data, 140)
    changed = data.replace(element(own), element(other))
    return changed[:140] + struct.pack("<I", length + len(changed) - len(data)) + changed[144:]


@pytest.mark.parametrize("way", ["native", "jpeg"])
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_truncated_one_is_refused(way: str, share: float) -> None:
    data = dicom_bytes(PIXELS, way)
    with pytest.raises(CorruptImageError, match=r"DICOM.* (damaged|cut off)"):
        read_photo(data[: int(share * len(data))])


def test_an_object_of_another_kind_is_an_unsupported_type() -> None:
    with pytest.raises(UnsupportedImageError, match="CT Image Storage, which is not read"):
        read_photo(dicom_bytes(PIXELS, kind="1.2.840.10008.5.1.4.1.1.2"))


def test_one_without_its_head_is_named() -> None:
    with pytest.raises(UnsupportedImageError, match="DICOM without its head"):
        read_photo(dicom_bytes(PIXELS)[132:])


def test_too_many_pixels_are_refused_before_anything_is_decoded() -> None:
    data = dicom_bytes(PIXELS, PixelData=b"")
    with pytest.raises(ImageTooLargeError, match="160×120 = 19200 pixels, 19000 are allowed"):
        read_photo(data, max_pixels=19_000)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' limits")
def test_an_object_that_unpacks_to_gigabytes_is_refused() -> None:
    data = dicom_bytes(PIXELS[:8, :8], "deflated")
    (length,) = struct.unpack_from("<I", data, 140)
    head = data[: 144 + length]
    # One element of private data, of 3 GB, in blocks that do not depend on those before.
    compressor = zlib.compressobj(wbits=-15)
    start = compressor.compress(b"\x09\0\x10\0UN\0\0" + struct.pack("<I", 3 << 30))
    start += compressor.flush(zlib.Z_FULL_FLUSH)
    block = compressor.compress(bytes(1 << 24)) + compressor.flush(zlib.Z_FULL_FLUSH)
    with pytest.raises(ImageError, match=r"memory|parse"):
        read_photo(head + start + block * (3 << 6) + compressor.flush())


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", CorruptImageError),
        ("raise OSError", CorruptImageError),
        ("import sys; sys.exit(3)", ImageTooLargeError),
        ("print('no')", CorruptImageError),
        ("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", CorruptImageError),
    ],
)
def test_what_a_process_does_costs_its_photo_only(
    monkeypatch: pytest.MonkeyPatch, code: str, error: type[Exception]
) -> None:
    # Private: the process cannot be made to misbehave in another way.
    monkeypatch.setattr(process, "_START", code)
    with pytest.raises(error):
        read_photo(dicom_bytes(PIXELS))


def test_a_process_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    # Private: as above, and the real limit would be waited for.
    monkeypatch.setattr(process, "_START", "import time; time.sleep(600)")
    monkeypatch.setattr(process, "_MAX_S", 0.5)
    with pytest.raises(CorruptImageError, match="too long"):
        read_photo(dicom_bytes(PIXELS))


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(process, "find_spec", lambda _: None)
    process.missing.cache_clear()
    yield
    process.missing.cache_clear()


@pytest.mark.usefixtures("nothing_installed")
def test_without_its_packages_the_way_out_is_named() -> None:
    with pytest.raises(NoDecoderError, match=r"requirements-dicom.txt.*JPEG or PNG"):
        read_photo(bytes(128) + b"DICM")


def test_the_process_gets_neither_this_folder_nor_the_environments_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pydicom.py").write_text("raise SystemExit('loaded from the wrong place')")
    data = dicom_bytes(PIXELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert read_photo(data).width == 160


def test_a_tiff_that_is_dicom_too_is_read_as_dicom() -> None:
    out = BytesIO()
    Image.fromarray(PIXELS).save(out, "TIFF")
    data = dicom_bytes(PIXELS)
    assert read_photo(out.getvalue()[:128] + data[128:]).height == 120
