"""Parameters of a request, in query, form and headers, that several paths share.

The choice by `Accept` is hand-written: neither FastAPI nor Starlette has one, and werkzeug's would
be a second framework.
"""

import contextlib
import functools
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Header, Query, Request, params
from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers

from server.http.errors import NotAcceptable
from server.http.problems import of_invalid
from server.inference.errors import Unprocessable

__all__ = [
    "PLAIN",
    "Clean",
    "NetworkName",
    "Priority",
    "RejectUnfit",
    "Threshold",
    "TimeoutMs",
    "answer_type",
    "check_names",
    "is_bulk",
    "only_known",
    "validated",
]

Model = TypeVar("Model", bound=BaseModel)


def _plain(number: Any) -> Any:
    if isinstance(number, str) and "_" in number:
        raise PydanticCustomError("number", "a number has no underscores")
    return number


PLAIN = BeforeValidator(_plain)
"""For numbers: Python takes `0.1_5` for 0.15, and nobody else does."""

Threshold = Annotated[
    float,
    PLAIN,
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

RejectUnfit = Annotated[
    bool,
    Query(
        description="whether a picture that is likely no dermoscopic photo is refused (422),"
        " and not only told of",
    ),
]

NetworkName = Annotated[
    str | SkipJsonSchema[None],
    Query(
        description="name of the network, of those that GET /model lists; default: the server's"
        " default one",
        examples=["slsnet"],
    ),
]

TimeoutMs = Annotated[
    float | None,
    PLAIN,
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


def only_known(model: type[BaseModel]) -> params.Depends:
    """A dependency of a path that refuses a query with parameters that `model` does not have.

    It raises Unprocessable for them, and for one that comes twice.
    """

    # It is `async` because FastAPI would run it in a thread otherwise.
    async def check(request: Request) -> None:
        check_names(model.model_fields, [name for name, _ in request.query_params.multi_items()])

    return params.Depends(check)


def validated(model: type[Model], given: Iterable[tuple[str, str]], *where: str) -> Model:
    """The parameters as `model` has them.

    Args:
        model: their names and limits.
        given: name and value of each.
        where: they are, for the text of an error.

    Raises:
        Unprocessable: a value is out of range.
    """
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        errors = [{**item, "loc": (*where, item["loc"][0])} for item in error.errors()]
        raise Unprocessable(of_invalid(errors)) from error


def check_names(
    known: Collection[str], names: Iterable[str], unknown: str = "There is no parameter {}: there"
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
    accept = ",".join(headers.getlist("accept"))
    chosen = asked or _preferred(accept.lower(), tuple(offers), tuple(others))
    if json_for and not _is_json(chosen):
        raise Unprocessable(
            f"{json_for} is for JSON answers, and {chosen} is asked for: leave"
            f" {json_for.partition('=')[0]} out, or ask for JSON."
        )
    return chosen


def _is_json(media_type: str) -> bool:
    return media_type.endswith("json")


# Clients send a handful of different ones, and it would take a twentieth of a small photo's time.
@functools.lru_cache(maxsize=64)
def _preferred(accept: str, offers: tuple[str, ...], others: tuple[str, ...]) -> str:
    """Which of `offers` an `Accept` in lower case prefers (RFC 9110, 12.5.1).

    Of equal ones it takes the one that they name, then the first. Headers that name no offer are
    ignored, but `q=0` rules an offer out.
    """
    qualities: dict[str, float] = {}
    for entry in accept.split(","):
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
