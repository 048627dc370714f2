"""DICOM objects as cameras and archives make them, of made-up patients."""

from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, Any, cast

import pytest
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["PATIENT", "WAYS", "dicom_bytes", "dicom_photo", "needs_dicom", "saved"]

PATIENT = "Sørensen^Åse"
"""Name of the patient of every object."""

_DERMOSCOPIC = "1.2.840.10008.5.1.4.1.1.77.1.7"


def needs_dicom() -> None:
    """Skip the test where DICOM is not installed."""
    if not all(map(find_spec, ("pydicom", "highdicom", "gdcm", "jpeg_ls"))):
        pytest.skip("needs requirements-dicom.txt", allow_module_level=True)


def dicom_photo(pixels: NDArray[Any], kind: str = _DERMOSCOPIC, **attributes: Any) -> "Dataset":
    """A photo as an object that is not compressed.

    Args:
        pixels: uint8 or uint16, [height, width] in grey or [height, width, 3] in RGB; one more
            dimension before these for several frames.
        kind: its SOP class.
        attributes: set on the object, or taken from it where None.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    is_colour = pixels.shape[-1] == 3
    frames = pixels.shape[0] if pixels.ndim == (4 if is_colour else 3) else None
    rows, columns = pixels.shape[-3:-1] if is_colour else pixels.shape[-2:]
    found: Any = Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = kind
    found.SpecificCharacterSet = "ISO_IR 100"
    found.SOPClassUID = kind
    found.SOPInstanceUID = generate_uid()
    found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID
    found.StudyInstanceUID, found.SeriesInstanceUID = generate_uid(), generate_uid()
    found.StudyDate, found.StudyTime, found.ContentDate = "20260102", "101112", "20260102"
    found.ContentTime, found.AcquisitionDateTime = "101112", "20260102101112"
    found.PatientName, found.PatientID = PATIENT, "4711-0815"
    found.PatientBirthDate, found.PatientSex = "19570203", "F"
    found.AccessionNumber, found.StudyID = "A123", "S1"
    found.ReferringPhysicianName = "Arzt^Anna"
    found.Modality = "XC" if kind != "1.2.840.10008.5.1.4.1.1.7" else "OT"
    found.Manufacturer, found.SeriesNumber, found.InstanceNumber = "Camera", 1, 1
    found.ImageType = ["ORIGINAL", "PRIMARY"]
    found.BodyPartExamined, found.Laterality = "SKIN", "L"
    found.SamplesPerPixel = 3 if is_colour else 1
    found.PhotometricInterpretation = "RGB" if is_colour else "MONOCHROME2"
    if is_colour:
        found.PlanarConfiguration = 0
    if frames is not None:
        found.NumberOfFrames = frames
    found.Rows, found.Columns = rows, columns
    bits = 8 * pixels.dtype.itemsize
    found.BitsAllocated, found.BitsStored, found.HighBit = bits, bits, bits - 1
    found.PixelRepresentation = 0
    found.PixelData = pixels.tobytes()
    found["PixelData"].VR = "OB" if bits == 8 else "OW"
    for name, value in attributes.items():
        if value is None:
            delattr(found, name)
        else:
            setattr(found, name, value)
    return cast("Dataset", found)


def saved(found: "Dataset") -> bytes:
    """The object's bytes."""
    out = BytesIO()
    found.save_as(out, enforce_file_format=True)
    return out.getvalue()


def dicom_bytes(pixels: NDArray[Any], way: str = "native", **attributes: Any) -> bytes:
    """The bytes of `dicom_photo`, with the pixels stored in one of `WAYS`.

    Or in "jpeg-12", which is for uint16 with BitsStored=12.
    """
    from pydicom import uid

    found = dicom_photo(pixels, **attributes)
    if way in ("deflated", "implicit", "big-endian"):
        syntax = {
            "deflated": uid.DeflatedExplicitVRLittleEndian,
            "implicit": uid.ImplicitVRLittleEndian,
            "big-endian": uid.ExplicitVRBigEndian,
        }[way]
        found.file_meta.TransferSyntaxUID = syntax
        if way == "big-endian" and pixels.dtype.itemsize == 2:
            found.PixelData = pixels.astype(">u2").tobytes()
    elif way == "rle":
        found.compress(uid.RLELossless)
    elif way == "jpeg-ls":
        found.compress(uid.JPEGLSLossless)
    elif way != "native":
        _encapsulate(found, pixels, way)
    return saved(found)


WAYS = (
    "native",
    "implicit",
    "big-endian",
    "deflated",
    "rle",
    "jpeg",
    "jpeg-422",
    "jpeg-extended",
    "jpeg-lossless",
    "jpeg-ls",
    "jpeg2000",
    "jpeg2000-lossy",
)
"""How pixels are stored."""


def _encapsulate(found: "Dataset", pixels: NDArray[Any], way: str) -> None:
    from pydicom import uid
    from pydicom.encaps import encapsulate

    is_colour = pixels.shape[-1] == 3
    out = BytesIO()
    if way == "jpeg-lossless":
        imagecodecs = pytest.importorskip("imagecodecs")
        coded = imagecodecs.ljpeg_encode(pixels)
        found.file_meta.TransferSyntaxUID = uid.JPEGLosslessSV1
    elif way == "jpeg-12":
        imagecodecs = pytest.importorskip("imagecodecs")
        coded = bytes(imagecodecs.jpeg8_encode(pixels, level=95, bitspersample=12))
        found.file_meta.TransferSyntaxUID = uid.JPEGExtended12Bit
        if is_colour:
            found.PhotometricInterpretation = "YBR_FULL"
    elif way.startswith("jpeg2000"):
        is_lossy = way == "jpeg2000-lossy"
        options: dict[str, Any] = {"irreversible": is_lossy, "no_jp2": True, "mct": is_colour}
        if is_lossy:
            options |= {"quality_mode": "dB", "quality_layers": [45]}
        Image.fromarray(pixels).save(out, "JPEG2000", **options)
        coded = out.getvalue()
        found.file_meta.TransferSyntaxUID = uid.JPEG2000 if is_lossy else uid.JPEG2000Lossless
        if is_colour:
            found.PhotometricInterpretation = "YBR_ICT" if is_lossy else "YBR_RCT"
    else:
        sub = 1 if way == "jpeg-422" else 0
        Image.fromarray(pixels).save(out, "JPEG", quality=95, subsampling=sub)
        coded = out.getvalue()
        is_extended = way == "jpeg-extended"
        found.file_meta.TransferSyntaxUID = (
            uid.JPEGExtended12Bit if is_extended else uid.JPEGBaseline8Bit
        )
        if is_colour:
            found.PhotometricInterpretation = "YBR_FULL_422" if sub else "YBR_FULL"
        found.LossyImageCompression = "01"
        found.LossyImageCompressionRatio = "10"
        found.LossyImageCompressionMethod = "ISO_10918_1"
    found.PixelData = encapsulate([coded])
    found["PixelData"].is_undefined_length = True
    found["PixelData"].VR = "OB"
