"""The parameters of `/segment` and `/segment/batch`, and the form of answer that they ask for.

A parameter is a field of one of these models. FastAPI reads it from the query and describes it, and
`with_fields` reads it from a form.
"""

import uuid
from dataclasses import replace
from typing import Annotated, Literal, Self

from fastapi import Query, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema
from starlette.datastructures import Headers

from photos.archived import OBJECTS, names_of
from photos.forms import Form, sample_bytes
from photos.image import THRESHOLD
from server.http.answers import MaskFormat
from server.http.parameters import (
    PLAIN,
    Clean,
    NetworkName,
    RejectUnfit,
    Threshold,
    answer_type,
    check_names,
    validated,
)
from server.http.segment.masks import DICOM_FORM, JSON, MEDIA_TYPES, PNG, Asked
from server.http.uploads import Fields
from server.inference.errors import Unprocessable

__all__ = [
    "MIXED",
    "NDJSON",
    "BatchJsonParameters",
    "BatchParameters",
    "JsonParameters",
    "MaskParameters",
    "SegmentParameters",
]

NDJSON = "application/x-ndjson"
MIXED = "multipart/mixed"

# What the answers of a path may be. The last one is the first one too, for clients that take bytes
# only under this name.
_SEGMENT_TYPES = (PNG, JSON, "application/octet-stream")
_BATCH_TYPES = (NDJSON, MIXED, "application/octet-stream")

_BY_FORMAT: dict[str | None, str] = {"png": PNG, "json": JSON}

# Forms that `Accept` may name. A type that several forms have is the mask's.
_BY_ACCEPT = {
    media_type: form for form, media_type in MEDIA_TYPES.items() if media_type not in (PNG, JSON)
}


class MaskParameters(BaseModel):
    """How a mask is drawn, in whatever form."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: Threshold = THRESHOLD
    size: Annotated[
        Literal["original", "model"] | SkipJsonSchema[None],
        Query(
            description="of the mask: the photo's, or the network's 128×128; default: the photo's,"
            " but for probabilities the network's",
            examples=["original"],
        ),
    ] = None
    clean: Clean = False
    model: NetworkName = None
    frame: Annotated[
        int | SkipJsonSchema[None],
        PLAIN,
        Query(
            ge=1,
            le=1_000_000,
            description="which frame of a DICOM object is meant; needed only if it has several",
            examples=[1],
        ),
    ] = None
    reject_unfit: RejectUnfit = False

    def with_fields(self, request: Request, fields: Fields) -> Self:
        """These parameters of the query, and those that came as fields of the request's form.

        A field has the meaning and the limits of the query's parameter of the same name.

        Raises:
            Unprocessable: a field is no parameter, is out of range, comes twice, or contradicts the
                query.
        """
        kind = type(self)
        check_names(
            kind.model_fields,
            [name for name, _ in fields],
            "The form's field {} is no parameter: there",
        )
        given = validated(kind, fields, "form")
        for name, value in fields:
            if name in self.model_fields_set and getattr(given, name) != getattr(self, name):
                raise Unprocessable(
                    f"The query says {name}={request.query_params[name][:40]}, the form's field"
                    f" {value[:40]!r}: say it once."
                )
        return self.model_copy(update=given.model_dump(exclude_unset=True))


class _WithFormat(MaskParameters):
    format: (
        Literal[
            "png",
            "json",
            "overlay",
            "overlay-png",
            "probability8",
            "probability16",
            "npy",
            "svg",
            "coco",
            "dicom",
        ]
        | None
    ) = None


class JsonParameters(MaskParameters):
    """Those of an answer in JSON."""

    mask: Annotated[
        MaskFormat,
        # Inlined: client generators ignore the type of a reference that has a description.
        WithJsonSchema({"type": "string", "enum": [str(form) for form in MaskFormat]}),
        Query(description="how a JSON answer holds the mask; all but `png` ask for JSON"),
    ] = MaskFormat.PNG
    borders: Annotated[
        bool,
        Query(
            description="whether a JSON answer also has a tight and a generous outline, between"
            " which most of an annotator's outline lies; it asks for JSON",
        ),
    ] = False
    features: Annotated[
        bool,
        Query(
            description="whether JSON has measurements of the lesion's shape and colours too, which"
            " are no diagnosis",
        ),
    ] = False

    def asked(self, request: Request) -> Asked:
        """The form of the answer to a request with these parameters.

        Raises:
            NotAcceptable, Unprocessable: see `answer_type`; or parameters contradict each other.
        """
        media_type = self._media_type(request.headers)
        form = self._form(media_type)
        return Asked(
            threshold=self.threshold,
            original=_is_original(self.size, self.mask if form == "json" else form),
            clean=self.clean,
            mask=self.mask,
            features=self.features,
            form=form,
            media_type=media_type,
            request_id=request.state.request_id,
            borders=self.borders,
            frame=self.frame,
            reject_unfit=self.reject_unfit,
            network=self.model,
        )

    def _media_type(self, headers: Headers) -> str:
        return answer_type(headers, (JSON,), self._json_for())

    def _form(self, media_type: str) -> str:
        del media_type
        return "json"

    def _json_for(self) -> str:
        """The parameter that only JSON can follow, such as `mask=rle`; empty for none."""
        if self.mask is not MaskFormat.PNG:
            return f"mask={self.mask}"
        return next((f"{name}=true" for name in ("borders", "features") if getattr(self, name)), "")


class _WithObjects(JsonParameters):
    objects: Annotated[
        Annotated[str, AfterValidator(lambda text: ",".join(names_of(text)))]
        | SkipJsonSchema[None],
        Query(
            description=f"with commas between, what a DICOM answer has: {', '.join(OBJECTS)};"
            " default: seg",
            examples=["seg,sr"],
        ),
    ] = None

    def asked(self, request: Request) -> Asked:
        """As of all paths; and the objects of a DICOM answer."""
        asked = super().asked(request)
        if asked.form != DICOM_FORM:
            if self.objects is not None:
                raise Unprocessable(
                    f"objects={self.objects} is for format=dicom, which is not asked for: leave it"
                    " out, or ask for that."
                )
            return asked
        names = names_of(self.objects or "seg")
        return replace(asked, objects=names, boundary=uuid.uuid4().hex if len(names) > 1 else "")


class SegmentParameters(_WithObjects, _WithFormat):
    """Those of `/segment`, whose answer may have any form."""

    def asked(self, request: Request) -> Asked:
        """As of all paths; the answer is the photo's own."""
        asked = super().asked(request)
        return replace(asked, media_type=asked.file_type) if asked.boundary else asked

    def _media_type(self, headers: Headers) -> str:
        json_for = self._json_for()
        if self.format in MEDIA_TYPES:
            if json_for:
                raise Unprocessable(
                    f"{json_for} is for format=json, and format={self.format} is asked for: leave"
                    " one of them out."
                )
            return MEDIA_TYPES[self.format]
        by_name = _BY_FORMAT.get(self.format)
        return answer_type(headers, _SEGMENT_TYPES, json_for, by_name, others=tuple(_BY_ACCEPT))

    def _form(self, media_type: str) -> str:
        if self.format in MEDIA_TYPES:
            return self.format
        return _BY_ACCEPT.get(media_type) or ("json" if media_type == JSON else "png")


class BatchJsonParameters(JsonParameters):
    """Those of `/segment/batch/json`."""

    file_names: Annotated[
        bool,
        Query(description="whether each answer has the photo's file name, as its sender gave it"),
    ] = False


class BatchParameters(_WithObjects, BatchJsonParameters):
    """Those of `/segment/batch`, whose parts may be files of any form."""

    format: Annotated[
        Literal["dicom"] | SkipJsonSchema[None],
        Query(
            description="`dicom` answers multipart/mixed with DICOM objects for each photo, all of"
            " which have to be DICOM; other files are values of `mask`",
            examples=["dicom"],
        ),
    ] = None

    def _media_type(self, headers: Headers) -> str:
        if self.format == DICOM_FORM:
            return answer_type(headers, (MIXED,), self._json_for())
        is_file = self.mask in MEDIA_TYPES and not self.features and not self.borders
        return answer_type(headers, _BATCH_TYPES, "" if is_file else self._json_for())

    def _form(self, media_type: str) -> str:
        if media_type != MIXED:
            return "json"
        return self.format or str(self.mask)


def _is_original(size: str | None, form: str) -> bool:
    """Whether the mask is to have the photo's size.

    Args:
        size: what was asked for.
        form: of the answer, or of the mask in JSON.

    Raises:
        Unprocessable: an overlay of another size is asked for.
    """
    if form in (Form.OVERLAY, Form.OVERLAY_PNG, DICOM_FORM):
        if size == "model":
            what = "A DICOM answer" if form == DICOM_FORM else "An overlay"
            raise Unprocessable(
                f"{what} has the photo's size: leave size=model out, or ask for another form."
            )
        return True
    if size is None:
        return form != MaskFormat.PROBABILITIES and not sample_bytes(form)
    return size == "original"
