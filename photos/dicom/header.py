"""What an object's header says, and what is refused by it. Runs in the processes for DICOM.

No text of the object is repeated in a message: it can be a patient's name. Names of the standard
are told, and numbers.
"""

import contextlib
import math
import warnings
from dataclasses import dataclass
from io import BytesIO

import pydicom
from pydicom import config, uid
from pydicom._uid_dict import UID_dictionary
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import UID

__all__ = ["Header", "Refusal", "header", "of_frame", "parsed"]

_PHOTOS = (
    uid.VLPhotographicImageStorage,
    uid.DermoscopicPhotographyImageStorage,
    uid.SecondaryCaptureImageStorage,
    uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
)

_READ = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.JPEGBaseline8Bit,
    uid.JPEGExtended12Bit,
    uid.JPEGLossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEGLSNearLossless,
    uid.JPEG2000Lossless,
    uid.JPEG2000,
    uid.RLELossless,
)

# Photometric interpretation -> samples of a pixel.
_SAMPLES = {
    "MONOCHROME1": 1,
    "MONOCHROME2": 1,
    "PALETTE COLOR": 1,
    "RGB": 3,
    "YBR_FULL": 3,
    "YBR_FULL_422": 3,
    "YBR_ICT": 3,
    "YBR_RCT": 3,
}

# Of PS3.3, 10.7.1.3: the distance on the patient, then that on the detector, then that on what was
# scanned. The first two differ where a picture is magnified, which tells little of a photo.
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")

# Millimetres that a pixel of a photo of skin can have.
_LEAST_MM, _MOST_MM = 1e-5, 100.0

_MOST_FRAMES = 1_000_000


class Refusal(Exception):
    """The object is not read; the message says why, and what to send."""

    def __init__(self, message: str, *, is_kind: bool = False) -> None:
        super().__init__(message)
        self.is_kind = is_kind
        """Whether no object of its kind is read."""


@dataclass(frozen=True)
class Header:
    """What the pixels of one frame are."""

    columns: int
    rows: int
    frame: int
    """From 1."""
    frames: int
    spacing: tuple[float, float] | None
    """Millimetres between pixels: of rows, then of columns, in DICOM's order."""


def parsed(data: bytes) -> FileDataset:
    """The object, whose values are not validated.

    Raises:
        Refusal: it does not parse.
    """
    warnings.simplefilter("ignore")
    config.settings.reading_validation_mode = config.IGNORE
    damaged = "The DICOM file does not parse (damaged, or cut off): send the original object again."
    try:
        dataset = pydicom.dcmread(BytesIO(data))
    except MemoryError:
        raise
    except Exception as error:
        raise Refusal(damaged) from error
    if not dataset:
        # It is so if the file ends within compressed pixels.
        raise Refusal(damaged)
    return dataset


def header(dataset: FileDataset, frame: int | None) -> Header:
    """Check that the object is a photo that is read.

    Args:
        dataset: the object.
        frame: which one is wanted, from 1; None for the only one.

    Raises:
        Refusal: it is not.
    """
    _check_kind(dataset)
    for keyword, tag in (
        ("SOPInstanceUID", "0008,0018"),
        ("StudyInstanceUID", "0020,000D"),
        ("SeriesInstanceUID", "0020,000E"),
    ):
        value = dataset.get(keyword)
        if not isinstance(value, str) or not UID(value).is_valid:
            raise Refusal(
                f"The DICOM object has no valid {keyword} ({tag}), which every object has: send"
                " the object as its archive has it."
            )
    rows, columns = (_number(dataset, name, 1, 65_535) for name in ("Rows", "Columns"))
    _check_pixels(dataset)
    frames = 1
    if dataset.get("NumberOfFrames") is not None:
        frames = _number(dataset, "NumberOfFrames", 1, _MOST_FRAMES)
    if frame is None and frames > 1:
        raise Refusal(
            f"The DICOM object has {frames} frames: choose one with the parameter frame, from 1 to"
            f" {frames}."
        )
    if (frame or 1) > frames:
        raise Refusal(
            f"frame={frame} is asked for, and the DICOM object has"
            f" {'one frame' if frames == 1 else f'{frames} frames'}."
        )
    return Header(columns, rows, frame or 1, frames, _spacing(dataset, frame or 1))


def _check_kind(dataset: FileDataset) -> None:
    kind = str(dataset.get("SOPClassUID", ""))
    if not kind:
        raise Refusal(
            "The DICOM object has no SOPClassUID (0008,0016), which says what it is: send the"
            " object as its archive has it."
        )
    if kind not in _PHOTOS:
        raise Refusal(
            f"This DICOM object is {_name_of(kind)}, which is not read: send a photo of skin as VL"
            " Photographic Image, Dermoscopic Photography Image or Secondary Capture Image.",
            is_kind=True,
        )
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", ""))
    if not syntax:
        raise Refusal(
            "The DICOM file has no TransferSyntaxUID (0002,0010), which says how its pixels are"
            " stored: send the file as its archive gives it."
        )
    if syntax not in _READ:
        raise Refusal(
            f"The pixels of this DICOM object are stored as {_name_of(syntax)}, which is not read:"
            " ask its archive for Explicit VR Little Endian or JPEG Baseline.",
            is_kind=True,
        )


def _name_of(identifier: str) -> str:
    """What the standard calls it; whatever else is there is not repeated."""
    if identifier in UID_dictionary:
        return UID(identifier).name
    return "of a kind that the standard does not know"


def _check_pixels(dataset: FileDataset) -> None:
    if "PixelData" not in dataset:
        raise Refusal("The DICOM object has no PixelData (7FE0,0010): send one with a photo.")
    colours = dataset.get("PhotometricInterpretation")
    if colours not in _SAMPLES:
        raise Refusal(
            "The DICOM object has no PhotometricInterpretation (0028,0004) that is read, which are"
            f" {', '.join(_SAMPLES)}.",
            is_kind=True,
        )
    samples = _number(dataset, "SamplesPerPixel", 1, 4)
    if samples != _SAMPLES[colours]:
        raise Refusal(
            f"The DICOM object says SamplesPerPixel {samples}, and {colours} has"
            f" {_SAMPLES[colours]}: send the original object again."
        )
    allocated = _number(dataset, "BitsAllocated", 1, 64)
    stored = _number(dataset, "BitsStored", 1, 64)
    if allocated not in (8, 16) or stored > allocated:
        raise Refusal(
            f"The DICOM object has {stored} bits stored in {allocated}, which is not read: send one"
            " of 8 or 16 bits a sample."
        )
    # Old objects may have them elsewhere, with something else below; the standard has retired that.
    if dataset.get("HighBit") is not None and _number(dataset, "HighBit", 0, 63) >= stored:
        raise Refusal(
            f"The DICOM object has {stored} bits stored and HighBit {int(dataset.HighBit)}, which"
            f" is not read: send one where it is {stored - 1}."
        )


def _number(dataset: Dataset, keyword: str, least: int, most: int) -> int:
    value = dataset.get(keyword)
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if not least <= number <= most:
        raise Refusal(
            f"The DICOM object's {keyword} is missing, or not a number from {least} to {most}: send"
            " the original object again."
        )
    return number


def of_frame(dataset: Dataset, frame: int, keyword: str) -> list[Dataset]:
    """What functional groups of this name say: those of the frame, then those of all frames."""
    found: list[Dataset] = []
    for groups, item in (
        ("PerFrameFunctionalGroupsSequence", frame - 1),
        ("SharedFunctionalGroupsSequence", 0),
    ):
        with contextlib.suppress(AttributeError, IndexError, KeyError, TypeError):
            found.append(dataset[groups].value[item][keyword].value[0])
    return found


def _spacing(dataset: Dataset, frame: int) -> tuple[float, float] | None:
    """Millimetres between the centres of rows, and of columns; None if they are not told."""
    places = [*of_frame(dataset, frame, "PixelMeasuresSequence"), dataset]
    for keyword in _SPACINGS:
        for place in places:
            try:
                down, across = map(float, place.get(keyword))
            except (TypeError, ValueError):
                continue
            if all(_LEAST_MM <= mm <= _MOST_MM for mm in (down, across)) and not math.isnan(down):
                return down, across
    return None
