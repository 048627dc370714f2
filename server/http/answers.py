"""The bodies of answers: how a segmentation becomes one, and their schemas for `GET /docs`."""

import base64
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from photos.archived import Model, archived
from photos.drawings import LARGEST_OVERLAY
from photos.fitness import is_unfit
from photos.forms import (
    Form,
    Found,
    coco_annotation,
    encoded,
    in_millimetres,
    measured,
    sample_bytes,
)
from photos.image import THRESHOLD, Room, always_room, encode_png, upsampled
from photos.masks import coco_rle, polygons
from photos.quality import Grade, grade
from photos.regions import largest_region, mask_of
from server import VERSION
from server.backends import BackendInfo
from server.inference.networks import Networks
from server.inference.served import Served
from server.inference.submission import Segmentation

__all__ = [
    "BackendAnswer",
    "BatchItemAnswer",
    "ErrorAnswer",
    "MaskFormat",
    "ModelAnswer",
    "ProblemAnswer",
    "SegmentationAnswer",
    "StatusAnswer",
    "answer_bytes",
    "dicom_answer",
    "form_answer",
    "json_answer",
    "model_answer",
    "png_answer",
]


# Pixels converted at a time, so that their floats stay in cache.
_LEVELS_AT_ONCE = 1 << 17


class MaskFormat(StrEnum):
    """How a JSON answer holds the mask."""

    PNG = "png"
    RLE = "rle"
    POLYGONS = "polygons"
    PROBABILITIES = "probabilities"
    OVERLAY = "overlay"
    PROBABILITY8 = "probability8"
    PROBABILITY16 = "probability16"
    NPY = "npy"
    SVG = "svg"
    COCO = "coco"


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageSize(_Answer):
    """The photo's size, its EXIF orientation applied."""

    width: int = Field(description="pixels", examples=[1024])
    height: int = Field(description="pixels", examples=[768])
    orientation: int = Field(
        ge=1,
        le=8,
        description="that was applied to the picture as it is stored, in EXIF's numbers, wherever"
        " the file has it: 1 for none",
        examples=[1],
    )


class CocoRle(_Answer):
    """COCO's compressed run-length encoding; `pycocotools.mask.decode` reads it."""

    size: tuple[int, int] = Field(description="height, width", examples=[[768, 1024]])
    counts: str = Field(examples=["Ygf21fg0O1O1N2N2N2N1O1O1O"])


class CocoAnnotation(_Answer):
    """The mask as an annotation of a COCO data set; the ids are to be changed."""

    id: int
    image_id: int
    category_id: int
    segmentation: CocoRle
    area: int
    bbox: tuple[int, int, int, int] = Field(description="x, y, width, height")
    iscrowd: int


class Mask(_Answer):
    """The mask, in the one form that was asked for."""

    format: MaskFormat
    width: int = Field(description="pixels", examples=[1024])
    height: int = Field(description="pixels", examples=[768])
    png: str | None = Field(
        None, description="a 1-bit PNG, lesion white, in base64", examples=["iVBORw0KGgoAAAANSUhEU"]
    )
    rle: CocoRle | None = None
    polygons: list[list[list[tuple[float, float]]]] | None = Field(
        None,
        description="for each separate part its rings of [x, y], the outer one first, holes after"
        " it; in pixels of the mask, from its upper left corner",
        examples=[[[[412.5, 300.25], [530.75, 310.5], [470.0, 402.25]]]],
    )
    probabilities: str | None = Field(
        None,
        description="the network's map: unsigned integers of 16 bits, the lower byte first, row by"
        " row, 65535 for 1; in base64. Up-sampled bilinearly, with half-pixel centres and clamped"
        " edges, as it is at the photo's size, it gives the mask of any threshold",
        examples=["AAABAAMA//8="],
    )
    overlay: str | None = Field(
        None,
        description="the photo with the outline drawn on it, at most 2048 pixels a side: a JPEG in"
        " base64",
        examples=["/9j/4AAQSkZJRgABAQ"],
    )
    probability8: str | None = Field(
        None,
        description="the map that `probabilities` has, as a greyscale PNG of 8 bits in base64",
        examples=["iVBORw0KGgoAAAANSUhEU"],
    )
    probability16: str | None = Field(
        None,
        description="the same with 16 bits",
        examples=["iVBORw0KGgoAAAANSUhEU"],
    )
    npy: str | None = Field(
        None,
        description="the same as a NumPy file, float32 [height, width], in base64",
        examples=["k05VTVBZAQB2AHsn"],
    )
    svg: str | None = Field(
        None,
        description="the outlines that `polygons` has, as an SVG document",
        examples=['<svg xmlns="http://www.w3.org/2000/svg" width="1024" height="768">…</svg>'],
    )
    coco: CocoAnnotation | None = None


class MillimetresAnswer(_Answer):
    """The lesion's measures on the skin, as far as the photo's own scale is right."""

    pixel: tuple[float, float] = Field(
        description="a pixel of the photo, across and down; mm", examples=[[0.02, 0.02]]
    )
    area: float = Field(description="mm²", examples=[62.9])
    perimeter: float = Field(description="of all outlines, mm", examples=[31.4])
    major_axis: float = Field(
        description="of the ellipse with the mask's second moments, mm", examples=[8.05]
    )
    minor_axis: float = Field(description="the same, across", examples=[7.82])
    diameter: float = Field(
        description="greatest distance of two points of the outline, mm", examples=[8.2]
    )


class LesionAnswer(_Answer):
    """The lesion that was found, in pixels of the mask."""

    found: bool = Field(description="whether any pixel is above the threshold")
    area: int = Field(description="pixels", examples=[157286])
    area_fraction: float = Field(description="of the frame, 0 to 1", examples=[0.2])
    bounding_box: tuple[int, int, int, int] | None = Field(
        description="x, y, width, height; null if nothing was found",
        examples=[[310, 205, 402, 391]],
    )
    centroid: tuple[float, float] | None = Field(
        description="x, y; null if nothing was found", examples=[[511.2, 399.8]]
    )
    mean_probability: float | None = Field(
        description="of the pixels above the threshold, at the network's 128×128; null if there are"
        " none",
        examples=[0.9312],
    )
    max_probability: float = Field(
        description="of all pixels, at the network's 128×128", examples=[0.9987]
    )
    millimetres: MillimetresAnswer | None = Field(
        None,
        description="if the photo is DICOM and says how large its pixels are, and something was"
        " found; else absent",
    )


class Outline(_Answer):
    """The outlines at one level of probability."""

    threshold: float = Field(description="the probability that they follow", examples=[0.94])
    polygons: list[list[list[tuple[float, float]]]] = Field(
        description="as in `mask`", examples=[[[[412.5, 300.25], [530.75, 310.5], [470.0, 402.25]]]]
    )


class Borders(_Answer):
    """Where the lesion's border may lie: the mask's own outline is between these two."""

    share: float = Field(
        description="part of an annotator's outline that lies between them, on average",
        examples=[0.8],
    )
    tight: Outline
    generous: Outline


class QualityAnswer(_Answer):
    """How good the mask is likely to be."""

    jaccard: float = Field(
        ge=0,
        le=1,
        description="the Jaccard with an annotator's mask that masks like this one have on average",
        examples=[0.871],
    )
    grade: Grade = Field(
        description="the same in words: `good` from 0.8, `fair` from 0.65, `poor` below",
        examples=["good"],
    )


class FitnessAnswer(_Answer):
    """Whether the picture is one that the network was made for."""

    distance: float = Field(
        ge=0,
        description="of the picture from the dermoscopic photos that the network was trained on, as"
        " statistics of colours and detail tell it; 1 is the limit",
        examples=[0.62],
    )
    unfit: bool = Field(
        description="whether it is above 1: then it is likely no dermoscopic photo, and the mask"
        " means nothing",
        examples=[False],
    )


class ColourShares(_Answer):
    """Shares of the lesion's pixels, 0 to 1, by the nearest of six colours."""

    white: float
    red: float
    light_brown: float
    dark_brown: float
    blue_grey: float
    black: float


class FeaturesAnswer(_Answer):
    """Measurements of the lesion's shape and colours, and no diagnosis.

    P is the perimeter, A the area, a and b are the long and the short axis.
    """

    perimeter: float = Field(description="of all outlines, pixels of the photo", examples=[1571.0])
    major_axis: float = Field(
        description="of the ellipse with the mask's second moments, pixels", examples=[402.5]
    )
    minor_axis: float = Field(description="the same, across", examples=[391.0])
    orientation: float = Field(
        description="of the long axis: degrees from the x axis towards the y axis, which points"
        " down; above -90, up to 90",
        examples=[-31.4],
    )
    eccentricity: float = Field(description="√(1 - b²/a²), 0 for a circle", examples=[0.24])
    asymmetry_major: float = Field(
        description="share of the lesion whose mirror image at the long axis is no lesion",
        examples=[0.05],
    )
    asymmetry_minor: float = Field(description="the same at the short axis", examples=[0.07])
    compactness: float = Field(description="P²/(4πA), 1 for a circle", examples=[1.25])
    irregularity: float = Field(
        description="P²ab/(2π(a²+b²)A), about 1 for any ellipse", examples=[1.2]
    )
    solidity: float = Field(description="A over that of the convex hull", examples=[0.97])
    colours: ColourShares
    colour_mean: tuple[float, float, float] = Field(
        description="mean red, green and blue inside, 0 to 255", examples=[[121.4, 82.3, 70.1]]
    )
    colour_deviation: tuple[float, float, float] = Field(
        description="their standard deviations", examples=[[24.1, 20.6, 19.2]]
    )


Attention = Annotated[
    str,
    Field(
        description="form of the position attention at half resolution: `exact` compares all"
        " positions, `pooled` averages of keys and values",
        examples=["pooled"],
    ),
]


class ModelId(_Answer):
    """The network that answered."""

    name: str = Field(examples=["slsnet"])
    version: str = Field(examples=["1.1.0"])
    weights_sha256: str = Field(
        examples=["5f2c3d0e5f0f4e6bb4a7c9e1f7f0f1f4d1c5a3b2e8d7c6b5a4f3e2d1c0b9a8f7"]
    )
    attention: Attention
    file_sha256: str = Field(
        description="of the file that was loaded; the others are what it says of itself",
        examples=["7bb66a195e36a16171a0e3da07af8b635f169986c705e9e7f4dcbef5f2b75db3"],
    )


class SegmentationAnswer(_Answer):
    """A segmentation as JSON."""

    request_id: str = Field(examples=["6f1d4cb1f0a84a0f9f0e6a9fbb7c3d1e"])
    model: ModelId
    image: ImageSize
    threshold: float = Field(description="lesion is where the probability is above it")
    clean: bool = Field(description="whether all but the largest region was left out")
    mask: Mask
    lesion: LesionAnswer
    quality: QualityAnswer | None = Field(
        description="null where nothing is known of how good the network's masks are"
    )
    fitness: FitnessAnswer | None = Field(
        description="null where the network has no detector of other pictures"
    )
    borders: Borders | None = Field(
        None,
        description="if `borders` asks for them; null where nothing is known of the network's"
        " borders",
    )
    features: FeaturesAnswer | None = Field(
        None, description="if `features` asks for them; null if nothing was found"
    )
    timings_ms: dict[str, float] = Field(
        description="milliseconds by stage; Server-Timing has the last stage too",
        examples=[{"read": 0.4, "decode": 2.9, "queue": 0.1, "infer": 50.2}],
    )


class BorderLevels(_Answer):
    """Where the uncertain part of a border begins and ends."""

    share: float = Field(
        description="of an annotator's outline, that lies between the two", examples=[0.8]
    )
    tight: float = Field(description="probability at the tight outline", examples=[0.87])
    generous: float = Field(description="probability at the generous outline", examples=[0.08])


class ModelAnswer(_Answer):
    """The model card."""

    name: str = Field(examples=["slsnet"])
    version: str = Field(examples=["1.1.0"])
    weights_sha256: str = Field(description="of the training's weights, as the file says")
    attention: Attention
    file_sha256: str = Field(description="of the file's bytes, as they were loaded")
    parameters: int = Field(examples=[2347900])
    training_data: str
    validation_jaccard: float = Field(
        description="mean over the official ISIC 2017 validation set", examples=[0.77]
    )
    threshold: float = Field(description="that the figures were measured at", examples=[0.5])
    licence: str = Field(examples=["Apache-2.0"])
    input: str = Field(examples=["image: uint8 [n, 128, 128, 3] RGB"])
    output: str = Field(examples=["probability: float32 [n, 128, 128]"])
    borders: BorderLevels | None = Field(
        description="null where nothing is known of the network's borders"
    )
    backend: "BackendAnswer"
    networks: list["NetworkAnswer"] = Field(description="all that serve; this is the card of one")


class NetworkAnswer(_Answer):
    """A network that requests can name, with `model` or in `/v2/models`."""

    name: str = Field(examples=["slsnet"])
    default: bool = Field(description="whether it answers requests that name none")
    ready: bool = Field(description="false while it is loaded, or fails")
    version: str | None = Field(description="null while it is loaded", examples=["1.1.0"])
    file_sha256: str | None = Field(description="null while it is loaded")


class BackendAnswer(_Answer):
    """The backend that runs the network."""

    name: str = Field(examples=["onnxruntime"])
    version: str = Field(examples=["1.32.0"])
    device: str = Field(examples=["cpu"])
    precision: str = Field(examples=["fp32"])
    max_batch: int = Field(examples=[8])
    slots: int = Field(description="inferences that run at the same time", examples=[1])
    buckets: list[int] = Field(description="batch sizes it is built for; empty for any")


class StatusAnswer(_Answer):
    """The server's health."""

    status: Literal["live", "ready"]
    backend: str | None = Field(None, description="what runs the network", examples=["onnxruntime"])


class ProblemAnswer(_Answer):
    """RFC 9457 problem details."""

    type: str = Field(examples=["about:blank"])
    title: str = Field(description="the status in words")
    status: int
    detail: str = Field(description="what is wrong, and what to do")
    instance: str | None = Field(
        None,
        description="path of the request; absent where the connection was refused before it came",
        examples=["/segment"],
    )
    request_id: str | None = Field(None, description="also in X-Request-ID; quote it in a report")


class ErrorAnswer(_Answer):
    """An error in the form of the Open Inference Protocol."""

    error: str = Field(examples=["The input is called 'image', not 'input_0'."])


class BatchItemAnswer(_Answer):
    """One photo of several: a line of the answer. It has either `result` or `error`."""

    index: int = Field(description="of the photo in the form, from 0", examples=[0])
    name: str = Field(description="of the photo's field in the form", examples=["file"])
    file_name: str | None = Field(
        None, description="of the photo, if `file_names` asks for it", examples=["left arm.jpg"]
    )
    status: int = Field(description="what `POST /segment` would have answered with", examples=[200])
    result: SegmentationAnswer | None = None
    error: ProblemAnswer | None = None


def png_answer(
    segmentation: Segmentation, threshold: float, original: bool, *, clean: bool
) -> tuple[bytes, float | None]:
    """The mask as PNG, and its quality if that is known.

    Args:
        segmentation: the photo's.
        threshold: lesion is where the probability is above it.
        original: whether the mask has the photo's size; otherwise the network's.
        clean: whether to leave only the largest region, without its holes.
    """
    width, height = _mask_size(segmentation, original)
    shown, packed = mask_of(segmentation.probability, width, height, threshold, clean=clean)
    return encode_png(packed, width, height), _quality(segmentation, shown, threshold)


def form_answer(
    segmentation: Segmentation,
    threshold: float,
    original: bool,
    form: Form,
    *,
    clean: bool,
    photo: bytes,
    room: Room,
    max_pixels: int,
) -> tuple[bytes, float | None]:
    """What was found as a file of another form, and its quality; arguments: see `png_answer`.

    Args:
        form: of the file.
        photo: the photo's bytes; only an overlay needs them.
        room, max_pixels: as for `read_photo`, which reads the photo again for an overlay.
    """
    found = _found(segmentation, threshold, original, clean=clean)
    room = room if original else always_room
    content = encoded(form, found, photo, max_pixels=max_pixels, room=room)
    return content, _quality(segmentation, found.probability, threshold)


def dicom_answer(
    segmentation: Segmentation,
    threshold: float,
    objects: Sequence[str],
    *,
    clean: bool,
    photo: bytes,
    room: Room,
    max_pixels: int,
) -> tuple[list[bytes], float | None]:
    """What was found as DICOM objects (`photos.archived.OBJECTS`), and its quality.

    Arguments: see `form_answer`; `photo` is a DICOM object.
    """
    found = _found(segmentation, threshold, True, clean=clean)
    quality = _quality(segmentation, found.probability, threshold)
    said = _model_id(segmentation.backend)
    made = archived(
        *(objects, found, photo),
        model=Model(said.name, said.version, said.weights_sha256, VERSION),
        quality=quality,
        pixel=segmentation.spacing,
        max_pixels=max_pixels,
        room=room,
    )
    return made, quality


def json_answer(
    segmentation: Segmentation,
    threshold: float,
    original: bool,
    mask_format: MaskFormat,
    *,
    clean: bool,
    borders: bool,
    features: bool,
    distance: float | None,
    photo: bytes,
    request_id: str,
    timings_ms: dict[str, float],
    room: Room,
    max_pixels: int,
) -> tuple[bytes, float | None]:
    """The mask with its measures as JSON, in ASCII, and its quality; arguments: see `form_answer`.

    `borders` adds a tight and a generous outline, `features` measurements of shape and colours.
    `distance` is what `Detector` says of the photo, if that is known.
    """
    found = _found(segmentation, threshold, original, clean=clean)
    quality = _quality(segmentation, found.probability, threshold)
    answer = SegmentationAnswer(
        request_id=request_id,
        model=_model_id(segmentation.backend),
        image=ImageSize(
            width=segmentation.width,
            height=segmentation.height,
            orientation=segmentation.orientation,
        ),
        threshold=threshold,
        clean=clean,
        mask=_mask(
            found, mask_format, photo, room if original else always_room, max_pixels=max_pixels
        ),
        lesion=LesionAnswer(found=found.lesion.area > 0, **asdict(found.lesion)),
        quality=None if quality is None else QualityAnswer(jaccard=quality, grade=grade(quality)),
        fitness=(
            None if distance is None else FitnessAnswer(distance=distance, unfit=is_unfit(distance))
        ),
        timings_ms=timings_ms,
    )
    # A mask has one form; the others are left out.
    absent: dict[str, Any] = {"mask": {str(form) for form in MaskFormat} - {str(mask_format)}}
    whole = _found(segmentation, threshold, True, clean=clean)
    if segmentation.spacing and (on_skin := in_millimetres(whole, segmentation.spacing)):
        answer.lesion.millimetres = MillimetresAnswer.model_validate(asdict(on_skin))
    else:
        absent["lesion"] = {"millimetres"}
    if borders:
        size = (found.width, found.height)
        answer.borders = _borders(segmentation, found.probability, size, threshold, clean=clean)
    else:
        absent["borders"] = True
    if not features:
        absent["features"] = True
    elif measures := measured(whole):
        answer.features = FeaturesAnswer.model_validate(asdict(measures))
    return answer.model_dump_json(exclude=absent, ensure_ascii=True).encode(), quality


def _quality(
    segmentation: Segmentation, shown: NDArray[np.float32], threshold: float
) -> float | None:
    """The Jaccard to be expected of the mask that was drawn from `shown`, if that is known."""
    table = segmentation.backend.quality
    return None if table is None else table.quality(segmentation.probability, shown > threshold)


def _borders(
    segmentation: Segmentation,
    shown: NDArray[np.float32],
    size: tuple[int, int],
    threshold: float,
    *,
    clean: bool,
) -> Borders | None:
    """The tight and the generous outline beside that of the mask, which was drawn from `shown`.

    Neither crosses the mask's own, whatever its threshold is.
    """
    table = segmentation.backend.quality
    if table is None:
        return None
    tight, generous = max(table.tight, threshold), min(table.generous, threshold)
    inner, outer = shown, segmentation.probability
    if clean:
        inner = largest_region(inner, tight)
        outer = largest_region(outer, generous, around=shown > threshold)
    tight_rings, generous_rings = (
        polygons(drawn, *size, level, clean=clean)
        for drawn, level in ((inner, tight), (outer, generous))
    )
    return Borders(
        share=table.share,
        tight=Outline(threshold=tight, polygons=tight_rings),
        generous=Outline(threshold=generous, polygons=generous_rings),
    )


def _found(segmentation: Segmentation, threshold: float, original: bool, *, clean: bool) -> Found:
    width, height = _mask_size(segmentation, original)
    return Found(
        *(segmentation.probability, width, height, threshold),
        clean=clean,
        pixels=segmentation.pixels,
        frame=segmentation.frame,
    )


def _mask(
    found: Found, mask_format: MaskFormat, photo: bytes, room: Room, *, max_pixels: int
) -> Mask:
    width, height = found.width, found.height
    mask = Mask(format=mask_format, width=width, height=height)
    match mask_format:
        case MaskFormat.PNG:
            mask.png = _base64(encode_png(found.packed, width, height))
        case MaskFormat.RLE:
            mask.rle = CocoRle.model_validate(coco_rle(found.packed, width))
        case MaskFormat.POLYGONS:
            mask.polygons = found.outlines
        case MaskFormat.PROBABILITIES:
            with room(width * height):
                mask.probabilities = _levels(found.probability, width, height)
        case MaskFormat.COCO:
            mask.coco = CocoAnnotation.model_validate(coco_annotation(found))
        case _:
            content = encoded(Form(mask_format), found, photo, max_pixels=max_pixels, room=room)
            is_text = mask_format is MaskFormat.SVG
            setattr(mask, mask_format, content.decode() if is_text else _base64(content))
    return mask


def answer_bytes(
    segmentation: Segmentation,
    original: bool,
    form: str,
    *,
    as_json: bool,
    objects: Sequence[str] = (),
) -> int:
    """Bytes of an answer that may be larger than its photo, at most; 0 for all others."""
    pixels = segmentation.width * segmentation.height
    if objects:
        drawn = min(pixels, LARGEST_OVERLAY**2)
        sizes = {"seg": pixels // 8, "probability": pixels, "overlay": 3 * drawn}
        return sum(sizes.get(name, 0) for name in objects)
    if form in (Form.OVERLAY, Form.OVERLAY_PNG):
        size = min(pixels, LARGEST_OVERLAY**2) * (3 if form == Form.OVERLAY_PNG else 1)
    elif original:
        size = pixels * (2 if form == MaskFormat.PROBABILITIES else sample_bytes(form))
    else:
        return 0
    return 4 * -(-size // 3) if as_json else size


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _levels(probability: NDArray[np.float32], width: int, height: int) -> str:
    # The bytes of three lines are a whole number of base64 groups.
    lines = 3 * max(1, _LEVELS_AT_ONCE // (3 * width))
    text = []
    for strip in upsampled(probability, width, height, lines):
        strip *= 65535
        text.append(base64.b64encode(np.rint(strip).astype("<u2").tobytes()))
    return b"".join(text).decode("ascii")


def _model_id(backend: BackendInfo) -> ModelId:
    said = {
        key: backend.model.get(key, "unknown")
        for key in ("name", "version", "weights_sha256", "attention")
    }
    return ModelId(**said, file_sha256=backend.file_sha256 or "unknown")


def model_answer(networks: Networks, network: str | None = None) -> ModelAnswer:
    """The card of one of these networks, the default one if `network` is None.

    Raises:
        UnknownNetwork: there is none of this name.
        Unavailable: it is still being loaded.
    """
    backend = networks.named(network).current.info
    card, table = backend.model, backend.quality
    levels = table and BorderLevels(share=table.share, tight=table.tight, generous=table.generous)
    return ModelAnswer(
        name=card.get("name", "unknown"),
        version=card.get("version", "unknown"),
        weights_sha256=card.get("weights_sha256", "unknown"),
        attention=card.get("attention", "unknown"),
        file_sha256=backend.file_sha256 or "unknown",
        parameters=int(card.get("parameters", 0)),
        training_data=card.get("training_data", "unknown"),
        validation_jaccard=float(card.get("validation_jaccard", 0)),
        threshold=float(card.get("threshold", THRESHOLD)),
        licence=card.get("licence", "unknown"),
        input="image: uint8 [n, 128, 128, 3] RGB",
        output="probability: float32 [n, 128, 128]",
        borders=levels,
        backend=BackendAnswer(
            name=backend.name,
            version=backend.version,
            device=backend.device,
            precision=backend.precision,
            max_batch=backend.max_batch,
            slots=backend.slots,
            buckets=list(backend.buckets),
        ),
        networks=[_network_answer(served, served is networks.default) for served in networks],
    )


def _network_answer(served: Served, is_default: bool) -> NetworkAnswer:
    info = served.info
    return NetworkAnswer(
        name=served.name,
        default=is_default,
        ready=served.works,
        version=info and info.model.get("version", "unknown"),
        file_sha256=info and (info.file_sha256 or "unknown"),
    )


def _mask_size(segmentation: Segmentation, original: bool) -> tuple[int, int]:
    if original:
        return segmentation.width, segmentation.height
    rows, columns = segmentation.probability.shape
    return columns, rows
