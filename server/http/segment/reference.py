"""What FastAPI cannot infer of `/segment` and `/segment/batch` for the API's document."""

from typing import Any

from server.http.answers import BatchItemAnswer, SegmentationAnswer
from server.http.reference import BINARY, HEADERS, problem_responses, unknown_network
from server.http.segment.parameters import MIXED, NDJSON
from server.http.uploads import FIELD, MULTIPART, RAW_TYPES

__all__ = [
    "BATCH_BODY",
    "BATCH_JSON_RESPONSES",
    "BATCH_RESPONSES",
    "SEGMENT_BODY",
    "SEGMENT_JSON_RESPONSES",
    "SEGMENT_RESPONSES",
]

_PNG_HEADERS: dict[str, Any] = {
    **HEADERS,
    "Mask-Quality": {
        "description": "what JSON has as `quality`: the Jaccard to be expected of the mask, and its"
        " grade, for PNG; absent where it is not known",
        "schema": {"type": "string"},
        "example": "0.871;grade=good",
    },
    "Photo-Fitness": {
        "description": "what JSON has as `fitness`, for PNG: `fit` or `unfit`, and the distance;"
        " absent where it is not known",
        "schema": {"type": "string"},
        "example": "fit;distance=0.620",
    },
}

SEGMENT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": f"The photo: as the field `{FIELD}` of a form, or as the body itself. JPEG,"
        " PNG, WebP, TIFF or BMP, and AVIF, HEIC or DICOM where the server has their decoders;"
        " the type is told by the bytes, not by a name. The form's other fields are parameters, as"
        " in the query.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {
                        FIELD: {"type": "string", "format": "binary", "description": "the photo"}
                    },
                }
            },
            **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in RAW_TYPES},
        },
    }
}

_SEGMENT_PROBLEMS = {
    **problem_responses(400, 406, 413, 415, 422, 429, 500, 503, 504),
    **unknown_network(),
}

SEGMENT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The mask: a 1-bit PNG with the lesion white. If `Accept` prefers JSON, or"
        " `format=json` asks for it, what `POST /segment/json` answers, whose parameters `mask` and"
        " `features` are known here too. `format` also knows `overlay` (JPEG), `overlay-png`,"
        " `probability8` and `probability16` (PNG), `npy`, `svg`, `coco` and, for a DICOM"
        " object, `dicom`, whose `objects` are one or several of `seg`, `probability`, `overlay`"
        " and `sr`; `Accept` may prefer image/jpeg, application/x-npy, image/svg+xml or"
        " application/dicom.",
        "headers": _PNG_HEADERS,
        # The second name is for clients that know no image types, if `Accept` prefers it.
        "content": {"image/png": BINARY, "application/octet-stream": BINARY},
    },
    **_SEGMENT_PROBLEMS,
}

SEGMENT_JSON_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The mask in the form that was asked for, and what was found.",
        "headers": HEADERS,
        "model": SegmentationAnswer,
    },
    **_SEGMENT_PROBLEMS,
}

BATCH_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A form with a photo in every field, whatever the fields are called; names"
        " may repeat. A field without a file name and with a short text is one of the parameters,"
        " as in the query.",
        "content": {
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "photos",
                        }
                    },
                }
            }
        },
    }
}

_BATCH_PROBLEMS = {
    **problem_responses(400, 406, 413, 415, 422, 429, 503, 504),
    **unknown_network(),
}

BATCH_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One answer for each photo, in the order in which they get done: a line of"
        " JSON, such as the items of what `POST /segment/batch/json` answers, or, if `Accept`"
        " prefers multipart/mixed, a part with the mask as PNG, or as another form of file that"
        " `mask` names, or for format=dicom as DICOM (or a problem document), and the headers"
        " Item-Index, Item-Name (percent-encoded) and Item-Status; with file_names,"
        " Item-File-Name (percent-encoded) too, and Mask-Quality and Photo-Fitness where they are"
        " known.",
        "headers": HEADERS,
        "content": {
            # There are many JSON values, which a schema cannot describe.
            NDJSON: BINARY,
            MIXED: BINARY,
            # These are lines too, if `Accept` prefers it, for clients that do not know lines.
            "application/octet-stream": BINARY,
        },
    },
    **_BATCH_PROBLEMS,
}

BATCH_JSON_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One answer for each photo, in the order in which they get done.",
        "headers": HEADERS,
        "model": list[BatchItemAnswer],
    },
    **_BATCH_PROBLEMS,
}
