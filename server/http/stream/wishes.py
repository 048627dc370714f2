"""What a stream asks for at its start, and frames of bare pixels."""

import struct
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.websockets import WebSocket

from server.http.answers import MaskFormat
from server.http.parameters import (
    PLAIN,
    Clean,
    NetworkName,
    RejectUnfit,
    Threshold,
    check_names,
    validated,
)
from server.http.segment.masks import JSON, Asked
from server.inference.errors import Unprocessable
from server.settings import Settings

__all__ = ["Wishes", "read_wishes"]

_MAX_SIDE = 65_535

# Tags of a TIFF of one strip (TIFF 6.0, section 6), and the types of their numbers.
_SHORT, _LONG = 3, 4


class Wishes(BaseModel):
    """The parameters of `/stream`, which are those of `/segment` as far as both have them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: Threshold = 0.5
    size: Literal["original", "model"] = Field(
        "original", description="of the mask: the frame's, or the network's 128×128"
    )
    clean: Clean = False
    mask: Literal["png", "rle", "polygons"] = Field(
        "png", description="the form of the masks; all are as `/segment/json` gives them"
    )
    deadline_ms: Annotated[float, PLAIN] = Field(
        2000,
        gt=0,
        allow_inf_nan=False,
        description="milliseconds from a frame's arrival within which its mask is of use; more than"
        " the server's own limit means that limit",
    )
    model: NetworkName = None
    reject_unfit: RejectUnfit = False
    frames: Literal["photo", "rgb"] = Field(
        "photo",
        description="what a frame is: a file as `/segment` takes it, or bare pixels, three bytes"
        " each, in lines from the top",
    )
    width: Annotated[int | None, PLAIN] = Field(
        None, ge=1, le=_MAX_SIDE, description="pixels of a bare frame"
    )
    height: Annotated[int | None, PLAIN] = Field(
        None, ge=1, le=_MAX_SIDE, description="pixels of a bare frame"
    )

    def asked(self, request_id: str) -> Asked:
        """The form of the answers."""
        return Asked(
            threshold=self.threshold,
            original=self.size == "original",
            clean=self.clean,
            mask=MaskFormat(self.mask),
            features=False,
            form="json",
            media_type=JSON,
            request_id=request_id,
            reject_unfit=self.reject_unfit,
        )

    def photo_of(self, frame: bytes) -> bytes:
        """A frame as a photo's file. Bare pixels get the header of a TIFF.

        Raises:
            Unprocessable: there are more or fewer pixels than the stream's start says.
        """
        if self.width is None or self.height is None:
            return frame
        expected = 3 * self.width * self.height
        if len(frame) != expected:
            raise Unprocessable(
                f"The frame has {len(frame)} bytes, {self.width}×{self.height} pixels have"
                f" {expected}. For another size open another stream."
            )
        return _tiff_header(self.width, self.height) + frame


def read_wishes(websocket: WebSocket, settings: Settings) -> Wishes:
    """The parameters in the query.

    Raises:
        Unprocessable: one is unknown, comes twice, is out of range, or misses another.
    """
    given = websocket.query_params.multi_items()
    check_names(Wishes.model_fields, [name for name, _ in given])
    wishes = validated(Wishes, given)
    sides = (wishes.width, wishes.height)
    if wishes.frames == "photo":
        if sides != (None, None):
            raise Unprocessable("width and height are for frames=rgb: a photo's file says its own.")
    elif wishes.width is None or wishes.height is None:
        raise Unprocessable("frames=rgb needs width and height: bare pixels do not say theirs.")
    elif 3 * wishes.width * wishes.height > settings.stream_frame_bytes:
        raise Unprocessable(
            f"Frames of {wishes.width}×{wishes.height} pixels are larger than the"
            f" {settings.stream_frame_bytes} bytes that are allowed: send smaller ones, or JPEG."
        )
    return wishes


def _tiff_header(width: int, height: int) -> bytes:
    """The bytes before the pixels in an uncompressed RGB TIFF."""
    entries = 9
    bits_at = 8 + 2 + 12 * entries + 4
    pixels_at = bits_at + 6
    tags = (
        (256, _LONG, 1, width),
        (257, _LONG, 1, height),
        (258, _SHORT, 3, bits_at),
        (259, _SHORT, 1, 1),  # not compressed
        (262, _SHORT, 1, 2),  # RGB
        (273, _LONG, 1, pixels_at),
        (277, _SHORT, 1, 3),  # samples a pixel
        (278, _LONG, 1, height),  # lines in the strip
        (279, _LONG, 1, 3 * width * height),
    )
    return b"".join(
        (
            struct.pack("<2sHIH", b"II", 42, 8, entries),
            *(struct.pack("<HHII", *tag) for tag in tags),
            struct.pack("<IHHH", 0, 8, 8, 8),
        )
    )
