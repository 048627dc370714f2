"""Parameters of a request, in query, form and headers, that several paths share.

The choice by `Accept` is hand-written: neither FastAPI nor Starlette has one, and werkzeug's would
be a second framework.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import Header, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import WithJsonSchema
from pydantic.json_schema import SkipJsonSchema
from starlette.datastructures import Headers

from photos.forms import Form, sample_bytes
from server.http.answers import MaskFormat
from server.http.errors import NotAcceptable
from server.http.uploads import Fields
from server.inference.errors import Unprocessable

__all__ = [
    "Clean",
    "Features",
    "FileNames",
    "MaskForm",
    "MaskSize",
    "Priority",
    "Threshold",
    "TimeoutMs",
    "WithBorders",
    "answer_type",
    "check_names",
    "is_bulk",
    "is_original",
    "json_for",
    "only_known",
    "parameter_names",
    "with_fields",
]

Threshold = Annotated[
    float,
    Query(
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="lesion is where the probability is above it",
    ),
]

Clean = Annotated[
    bool,
    Query(
        description="whether to leave only the largest region, without its holes: networks see a"
        " second lesion in hair, ink or a colour patch now and then",
    ),
]

Features = Annotated[
    bool,
    Query(
        description="whether JSON has measurements of the lesion's shape and colours too, which are"
        " no diagnosis",
    ),
]

WithBorders = Annotated[
    bool,
    Query(
        description="whether a JSON answer also has a tight and a generous outline, between which"
        " most of an annotator's outline lies; it asks for JSON",
    ),
]

FileNames = Annotated[
    bool,
    Query(description="whether each answer has the photo's file name, as its sender gave it"),
]

MaskSize = Annotated[
    Literal["original", "model"] | SkipJsonSchema[None],
    Query(
        description="of the mask: the photo's, or the network's 128×128; default: the photo's, but"
        " for probabilities the network's",
        examples=["original"],
    ),
]

MaskForm = Annotated[
    MaskFormat,
    # Inlined: client generators ignore the type of a reference that has a description.
    WithJsonSchema({"type": "string", "enum": [str(form) for form in MaskFormat]}),
    Query(description="how a JSON answer holds the mask; all but `png` ask for JSON"),
]

TimeoutMs = Annotated[
    float | None,
    Header(
        gt=0,
        allow_inf_nan=False,
        description="milliseconds within which the answer is of use; more than the server's own"
        " limit means that limit",
        examples=[2000],
    ),
]

Priority = Annotated[
    str,
    Header(
        description="`bulk` lets requests that do not say so go first",
        examples=["bulk"],
    ),
]


def is_bulk(priority: str) -> bool:
    """Whether a `Priority` header says `bulk`, alone or in a list (RFC 9218, 4)."""
    return any(entry.partition(";")[0].strip().lower() == "bulk" for entry in priority.split(","))


async def only_known(request: Request) -> None:
    """Refuse a query with unknown parameters; a dependency of the path.

    It is `async` because FastAPI would run it in a thread otherwise.

    Raises:
        Unprocessable: the path has no such parameter, or one comes twice.
    """
    names = [name for name, _ in request.query_params.multi_items()]
    check_names(parameter_names(request), names)


def with_fields(request: Request, given: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The request's parameters, with those that came as fields of its form.

    A field has the meaning and the limits of the query's parameter of the same name.

    Args:
        request: the request, whose route knows the parameters.
        given: the value of each parameter by its name, from the query or by default.
        fields: the fields of the form.

    Raises:
        Unprocessable: a field is no parameter, comes twice, or contradicts the query.
        RequestValidationError: a value that would be wrong in the query too.
    """
    names = [name for name, _ in fields]
    check_names(parameter_names(request), names, "The form's field {} is no parameter: there")
    asked = dict(given)
    errors: list[Any] = []
    for parameter in request.scope["route"].dependant.query_params:
        name = parameter.alias
        for value in (value for field, value in fields if field == name):
            asked[name], found = parameter.validate(value, {}, loc=("form", name))
            errors += found or []
            if not found and name in request.query_params and asked[name] != given[name]:
                raise Unprocessable(
                    f"The query says {name}={request.query_params[name][:40]}, the form's field"
                    f" {value[:40]!r}: say it once."
                )
    if errors:
        raise RequestValidationError(errors)
    return asked


def parameter_names(request: Request) -> list[str]:
    """The names of the parameters that the request's path has."""
    return [field.alias for field in request.scope["route"].dependant.query_params]


def check_names(
    known: Sequence[str], names: Sequence[str], unknown: str = "There is no parameter {}: there"
) -> None:
    """Check that each of `names` is known, and comes once.

    Raises:
        Unprocessable: it is not so.
    """
    seen: set[str] = set()
    for name in names:
        if name not in known:
            raise Unprocessable(f"{unknown.format(repr(name[:40]))} are {', '.join(known)}.")
        if name in seen:
            raise Unprocessable(f"The parameter {name!r} comes more than once: send it once.")
        seen.add(name)


def is_original(size: str | None, form: str) -> bool:
    """Whether the mask is to have the photo's size.

    Args:
        size: what was asked for.
        form: of the answer, or of the mask in JSON.

    Raises:
        Unprocessable: an overlay of another size is asked for.
    """
    if form in (Form.OVERLAY, Form.OVERLAY_PNG):
        if size == "model":
            raise Unprocessable(
                "An overlay has the photo's size: leave size=model out, or ask for another form."
            )
        return True
    if size is None:
        return form != MaskFormat.PROBABILITIES and not sample_bytes(form)
    return size == "original"


def answer_type(
    headers: Headers,
    offers: Sequence[str],
    json_for: str,
    asked: str | None = None,
    *,
    others: Sequence[str] = (),
) -> str:
    """The media type of `offers` to answer with; the first is the default.

    Args:
        headers: headers of the request.
        offers: a form of PNG, and JSON.
        json_for: the parameter that asks for JSON, if any; see `json_for`.
        asked: the type that a parameter names, whatever `Accept` says.
        others: taken only if `Accept` prefers them to each of `offers`. Browsers name
            `image/svg+xml` beside `image/*` wherever they ask for an image.

    Raises:
        NotAcceptable: `Accept` rules all of them out.
        Unprocessable: `json_for` needs JSON, and another type is asked for.
    """
    if json_for:
        offers, others = sorted(offers, key=_is_json, reverse=True), ()
    chosen = asked or _preferred(headers, offers, others)
    if json_for and not _is_json(chosen):
        raise Unprocessable(
            f"{json_for} is for JSON answers, and {chosen} is asked for: leave"
            f" {json_for.partition('=')[0]} out, or ask for JSON."
        )
    return chosen


def json_for(given: Mapping[str, Any]) -> str:
    """The parameter that only a JSON answer can follow, such as `mask=rle`; empty for none."""
    if given["mask"] is not MaskFormat.PNG:
        return f"mask={given['mask']}"
    return next((f"{name}=true" for name in ("borders", "features") if given[name]), "")


def _is_json(media_type: str) -> bool:
    return media_type.endswith("json")


def _preferred(headers: Headers, offers: Sequence[str], others: Sequence[str]) -> str:
    """Which of `offers` the `Accept` headers prefer (RFC 9110, 12.5.1).

    Of equal ones it takes the one that they name, then the first. Headers that name no offer are
    ignored, but `q=0` rules an offer out.
    """
    qualities: dict[str, float] = {}
    for entry in ",".join(headers.getlist("accept")).lower().split(","):
        media_type, *parameters = (part.strip() for part in entry.split(";"))
        quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        with contextlib.suppress(ValueError):
            qualities[media_type] = float(quality)

    def rank(offer: str) -> tuple[float, int]:
        ranges = ("*/*", f"{offer.partition('/')[0]}/*", offer)
        for specificity, media_range in reversed(list(enumerate(ranges))):
            quality = qualities.get(media_range, -1)
            if 0 <= quality <= 1:
                return quality or _RULED_OUT, specificity
        return 0, 0

    best = max(offers, key=rank)
    other = max(others, key=rank, default=best)
    if rank(other)[0] > max(rank(best)[0], 0):
        return other
    if rank(best)[0] == _RULED_OUT:
        raise NotAcceptable(
            f"Accept rules out every form of the answer: {', '.join(offers)}. Leave it out, or"
            " name one."
        )
    return best


_RULED_OUT = -1
