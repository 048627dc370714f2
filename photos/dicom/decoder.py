"""Decodes one frame of a DICOM object from standard input; `photos.dicom.process` runs it.

Reads the object, with its length before it (8 bytes, little-endian). Writes a line of JSON: the
header, or what is refused. After one more byte of input it writes such a line again, and then
SIZE×SIZE pixels in RGB, by area average. Exit code: 0, or 3 if memory did not suffice; anything
else if it does not decode.
"""

import sys
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import uid
from pydicom.dataset import FileDataset
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import (
    apply_color_lut,
    apply_modality_lut,
    apply_voi_lut,
    convert_color_space,
)

from photos.dicom.header import Header, Refusal, header, of_frame, parsed
from photos.formats import jpeg_frame
from photos.processes.child import NO_MEMORY, limit, taken, told

__all__ = ["main"]

# Bytes of memory for a header, which may be deflated, beyond copies of the file; and for each
# pixel: planes, their RGB, floats of a grey one under a window.
_OTHER_BYTES = 256 << 20
_COPIES = 6
_PIXEL_BYTES = 48

# The markers of a JPEG's frame, by transfer syntax. Baseline decoders take progressive ones too.
_JPEG_FRAMES = {
    uid.JPEGBaseline8Bit: (0xC0, 0xC1, 0xC2),
    uid.JPEGExtended12Bit: (0xC0, 0xC1, 0xC2),
    uid.JPEGLossless: (0xC3,),
    uid.JPEGLosslessSV1: (0xC3,),
    uid.JPEGLSLossless: (0xF7,),
    uid.JPEGLSNearLossless: (0xF7,),
}

# Of PS3.3, C.7.6.16.2: what a frame's functional groups may say of its brightness.
_GREY_GROUPS = {
    "PixelValueTransformationSequence": ("RescaleIntercept", "RescaleSlope"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
}


def main() -> int:
    """Decode; return the exit code."""
    size, frame, cpu_s = map(int, sys.argv[1:])
    data = taken()
    memory = _OTHER_BYTES + _COPIES * len(data)
    limit(memory, cpu_s)
    try:
        dataset = parsed(data)
        found = header(dataset, frame or None)
        told({"rows": found.rows, "columns": found.columns, "spacing": found.spacing})
        if not sys.stdin.buffer.read(1):
            return 0
        limit(memory + _PIXEL_BYTES * found.rows * found.columns, cpu_s)
        square = picture(dataset, found, size).resize((size, size), Image.Resampling.BOX)
        told({})
        sys.stdout.buffer.write(square.tobytes())
        sys.stdout.buffer.flush()
    except MemoryError:
        return NO_MEMORY
    except Refusal as refusal:
        told({"refused": str(refusal), "is_kind": refusal.is_kind})
    return 0


def picture(dataset: FileDataset, found: Header, least: int | None = None) -> Image.Image:
    """One frame in RGB, at its own size, or a smaller one that is twice `least` or more a side.

    Raises:
        Refusal: its pixels do not decode.
    """
    try:
        coded = _coded(dataset, found)
        if coded is not None and _is_plain_jpeg(dataset):
            return _plain_jpeg(coded, found, least)
        stored, colours = _samples(dataset, found)
        if stored.shape[:2] != (found.rows, found.columns):
            raise ValueError("the pixels have another size than the header says")
        if colours == "PALETTE COLOR":
            stored = _eight_bits(apply_color_lut(stored, dataset))
        elif colours.startswith("MONOCHROME"):
            _take_groups(dataset, found.frame)
            stored = _grey(stored, dataset)
        elif stored.dtype != np.uint8 or int(dataset.BitsStored) < 8:
            stored = _scaled(stored, 0, (1 << int(dataset.BitsStored)) - 1)
        if colours.startswith("YBR"):
            stored = convert_color_space(stored, "YBR_FULL", "RGB")
        return Image.fromarray(stored).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        raise Refusal(
            "The pixels of the DICOM object do not decode (damaged, cut off, or stored in another"
            " way than its header says): send the original object again, or save the photo as JPEG"
            " or PNG."
        ) from error


def _samples(dataset: FileDataset, found: Header) -> tuple[NDArray[Any], str]:
    """The samples of the frame, and what they are: its photometric interpretation by now."""
    syntax, bits = dataset.file_meta.TransferSyntaxUID, int(dataset.BitsStored)
    if syntax == uid.JPEGExtended12Bit and bits > 8:
        # pydicom gives these to a decoder under the GPL alone. GDCM decodes them too, and goes by
        # the JPEG itself.
        dataset.file_meta.TransferSyntaxUID = syntax = uid.JPEGLosslessSV1
    # pydicom makes RGB of 8 bits only.
    is_deep = int(dataset.BitsAllocated) > 8
    # Each option is annotated as all of them.
    as_rgb: Any = not is_deep
    stored, said = get_decoder(syntax).as_array(dataset, index=found.frame - 1, as_rgb=as_rgb)
    return stored, str(said["photometric_interpretation"])


def _is_plain_jpeg(dataset: FileDataset) -> bool:
    """Whether Pillow alone gives the colours: it is many times as fast, and takes less memory."""
    return (
        dataset.file_meta.TransferSyntaxUID in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit)
        and int(dataset.BitsAllocated) == 8
        and dataset.PhotometricInterpretation in ("YBR_FULL", "YBR_FULL_422")
    )


def _plain_jpeg(coded: bytes, found: Header, least: int | None) -> Image.Image:
    image = Image.open(BytesIO(coded), formats=("JPEG",))
    if image.size != (found.columns, found.rows):
        raise ValueError("the pixels have another size than the header says")
    if least is not None:
        # As for photos that are JPEG themselves (`photos.image`).
        image.draft("RGB", (2 * least, 2 * least))
    return image.convert("RGB")


def _coded(dataset: FileDataset, found: Header) -> bytes | None:
    """The frame as it is compressed, which has to be what the header says; None if it is not.

    Decoders would take other kinds too, and their colours would be wrong then.

    Raises:
        ValueError: they are not.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated or syntax == uid.RLELossless:
        return None
    coded = get_frame(dataset.PixelData, found.frame - 1, number_of_frames=found.frames)
    if syntax in uid.JPEG2000TransferSyntaxes:
        is_said = coded.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "))
    else:
        frame = jpeg_frame(coded) if coded.startswith(b"\xff\xd8") else None
        is_said = frame is not None and frame[0] in _JPEG_FRAMES[syntax]
    if not is_said:
        raise ValueError("the pixels are not what the transfer syntax says")
    return coded


def _eight_bits(colours: NDArray[Any]) -> NDArray[np.uint8]:
    """A palette's colours; those of 16 bits that use only 8 are taken as such."""
    if colours.dtype == np.uint8 or colours.max(initial=0) < 256:
        return colours.astype(np.uint8)
    return _scaled(colours, 0, 65_535)


def _grey(stored: NDArray[Any], dataset: FileDataset) -> NDArray[np.uint8]:
    """Brightness as the object's window or table has it, or by the range of its samples."""
    values = apply_modality_lut(stored, dataset)
    if "VOILUTSequence" in dataset or _has_window(dataset):
        if "VOILUTSequence" in dataset:
            descriptor = dataset.VOILUTSequence[0].LUTDescriptor
            low, high = 0.0, float((1 << int(descriptor[2])) - 1)
            # pydicom counts a table's entries in numbers as small as those that it holds.
            descriptor[2] = 16
        else:
            # What lies below and above every window.
            ends = apply_voi_lut(np.array([-1e12, 1e12]), dataset)
            low, high = float(ends[0]), float(ends[1])
        values = apply_voi_lut(values, dataset)
    elif values.dtype == stored.dtype and stored.dtype.kind == "u":
        low, high = 0.0, float((1 << int(dataset.BitsStored)) - 1)
    else:
        low, high = float(values.min()), float(values.max())
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        low, high = high, low
    return _scaled(values, low, high)


def _take_groups(dataset: FileDataset, frame: int) -> None:
    """Set what the frame's functional groups say of its brightness where pydicom looks for it."""
    for group, keywords in _GREY_GROUPS.items():
        for item in of_frame(dataset, frame, group)[:1]:
            for keyword in keywords:
                if keyword in item:
                    dataset[keyword] = item[keyword]


def _has_window(dataset: FileDataset) -> bool:
    """Whether there is a window; one of no width, which some programs write, is none."""
    widths = dataset.get("WindowWidth")
    if widths is None or "WindowCenter" not in dataset:
        return False
    return bool(np.atleast_1d(widths)[0] > 0)


def _scaled(values: NDArray[Any], black: float, white: float) -> NDArray[np.uint8]:
    scaled = (values.astype(np.float32) - black) * (255 / ((white - black) or 1))
    levels: NDArray[np.uint8] = np.clip(np.nan_to_num(scaled) + 0.5, 0, 255).astype(np.uint8)
    return levels
