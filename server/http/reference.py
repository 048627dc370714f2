"""The API's reference: what FastAPI cannot infer for OpenAPI, and the page at `GET /docs`.

The server has the page's scripts itself, since a hospital's browser may not reach the internet.
"""

from copy import deepcopy
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from server.http.access import OPEN
from server.http.answers import ErrorAnswer, ProblemAnswer
from server.http.context import REQUEST_ID
from server.http.problems import EXAMPLES, PROBLEM_JSON

__all__ = [
    "BINARY",
    "DESCRIPTION",
    "HEADERS",
    "error_content",
    "error_headers",
    "inlined",
    "problem_response",
    "problem_responses",
    "router",
    "unknown_network",
]

DESCRIPTION = """\
Send a photo of a skin lesion, get the lesion's mask at the photo's own size:

    curl -F file=@lesion.jpg localhost:8000/segment -o mask.png

Every answer to a request has `X-Request-ID` (yours, if you send one) and `Server-Timing`
(milliseconds by stage). Errors are RFC 9457 problem documents whose `detail` says what to do.
Photos are only in memory, while they are worked on. This is not a medical device.
"""

_PROBLEMS = {
    400: "The body is empty, the form is malformed, or it has no image.",
    401: "There is no API key, or it is unknown; only where the server has keys.",
    403: "The key does not open this path.",
    404: "The path does not exist.",
    405: "The path takes another method; Allow says which.",
    406: "Accept rules out (`q=0`) every form of the answer.",
    408: "Headers or body came too slowly; the connection is closed.",
    413: "There are more bytes or more pixels than allowed.",
    415: "The server does not read this type of image.",
    422: "The image does not decode, or a parameter is unknown or out of range.",
    429: "The server is full, or a key is used faster than allowed; Retry-After says when to come"
    " back.",
    431: "Path and headers are too long; the connection is closed.",
    500: "The server failed on this request.",
    501: "The body has another Transfer-Encoding than chunked; the connection is closed.",
    503: "The server is not ready, drains, fails, or has no connection left.",
    504: "The request's deadline passed.",
}

_EXAMPLES = {
    400: "The form has no field 'file': put the photo there. It has 'image'.",
    401: "This path needs an API key: send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`.",
    403: "This path needs an administrator's key: send one.",
    404: "There is nothing here unless the server has an administrator's key: see `python -m"
    " server.keys new --help`.",
    405: "/segment does not take GET: use POST.",
    406: "Accept rules out every form of the answer: image/png, application/json. Leave it out, or"
    " name one.",
    408: "The body came slower than 1024 bytes a second for 10 s.",
    413: "The image has 12000×9000 = 108000000 pixels, 64000000 are allowed: send a smaller"
    " version of it.",
    415: "The bytes are not an image of a known format: send JPEG, PNG, WEBP, TIFF, BMP or AVIF.",
    422: "The JPEG image ends too early (truncated): send the whole file again.",
    431: "Path and headers have more than the 32768 bytes that are allowed.",
    501: "No Transfer-Encoding is read but chunked: send the body as it is.",
    **EXAMPLES,
}

# Errors that any path may answer with, unless it describes them itself. They arise before the path
# is known, or whatever it does.
_ANYWHERE = {
    400: (
        "It is not HTTP/1.1, or has two Host headers.",
        "What was sent is not an HTTP/1.1 request.",
    ),
    408: (_PROBLEMS[408], _EXAMPLES[408]),
    429: (
        "A key is used faster than allowed, or too many requests were sent before any was"
        " answered.",
        "This key may send 5 requests a second. Try again in 1 s (Retry-After).",
    ),
    431: (_PROBLEMS[431], _EXAMPLES[431]),
    500: (
        _PROBLEMS[500],
        "The server failed on this request. Trying again may work; if it does"
        " not, report the request_id.",
    ),
    501: (_PROBLEMS[501], _EXAMPLES[501]),
    503: (
        "The server has no connection left.",
        "The server has 1024 connections, and holds no more. Try again in a second.",
    ),
}

# Those that the connection answers, which knows neither paths nor a protocol's errors.
_BY_CONNECTION = (400, 408, 429, 431, 501, 503)

HEADERS: dict[str, Any] = {
    "X-Request-ID": {
        "description": "the request's id, yours if you sent one",
        "schema": {"type": "string"},
    },
    "Server-Timing": {
        "description": "milliseconds by stage: read, decode, queue, infer, encode, total",
        "schema": {"type": "string"},
        "example": "read;dur=0.4, decode;dur=2.9, queue;dur=0.1, infer;dur=50.2, encode;dur=0.8,"
        ' batch;desc="1", total;dur=54.5',
    },
}


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema with its `$ref`s replaced by their targets: OpenAPI has no `$defs`."""
    definitions = schema.get("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            rest = {key: value for key, value in node.items() if key != "$ref"}
            return resolve({**definitions[node["$ref"].rpartition("/")[2]], **rest})
        return {key: resolve(value) for key, value in node.items() if key != "$defs"}

    resolved: dict[str, Any] = resolve(schema)
    return resolved


def error_headers(status: int) -> dict[str, Any]:
    """Headers of errors of this HTTP status, as OpenAPI describes them."""
    text = {"schema": {"type": "string"}}
    headers = dict(HEADERS)
    if status == 401:
        headers["WWW-Authenticate"] = {"description": "how keys are shown", **text}
    if status == 405:
        headers["Allow"] = {"description": "methods", **text}
    if status == 415:
        headers["Accept-Encoding"] = {
            "description": "`identity`, if the body's Content-Encoding is what is not served",
            **text,
        }
    if status in (429, 503):
        headers["Retry-After"] = {
            "description": "seconds",
            "schema": {"type": "integer", "minimum": 1},
        }
    return headers


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for errors, each with its headers and an example."""
    return {
        status: problem_response(status, _PROBLEMS[status], _EXAMPLES[status])
        for status in statuses
    }


def problem_response(
    status: int, description: str, detail: str, instance: str = "/segment"
) -> dict[str, Any]:
    """One OpenAPI response for an error; `detail` and `instance` are the example's."""
    return _response(status, description, _problem(status, detail, instance))


def unknown_network() -> dict[int | str, dict[str, Any]]:
    """The OpenAPI response of a path whose requests may name a network."""
    detail = "There is no network 'lite': the one that serves is 'slsnet'."
    return {404: problem_response(404, "No network has the name.", detail)}


def error_content(detail: str) -> dict[str, Any]:
    """OpenAPI content: an error of the Open Inference Protocol."""
    return {"schema": _reference(ErrorAnswer), "example": {"error": detail}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _response(status: int, description: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "headers": error_headers(status), "content": content}


def _problem(status: int, detail: str, instance: str) -> dict[str, Any]:
    """OpenAPI content: a problem document."""
    return {
        PROBLEM_JSON: {
            "schema": _reference(ProblemAnswer),
            "example": {
                "type": "about:blank",
                "title": HTTPStatus(status).phrase,
                "status": status,
                "detail": detail,
                "instance": instance,
                "request_id": "6f1d4cb1f0a84a0f9f0e6a9fbb7c3d1e",
            },
        }
    }


BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
"""OpenAPI content: bytes."""

_REQUEST_ID: dict[str, Any] = {
    "name": "X-Request-ID",
    "in": "header",
    "required": False,
    "description": "comes back with the answer, and is written to the log; one that does not fit"
    " the pattern is replaced",
    "schema": {"type": "string", "pattern": f"^{REQUEST_ID.pattern}$"},
    "example": "6f1d4cb1f0a84a0f9f0e6a9fbb7c3d1e",
}

# The schemes that `server.http.access` reads.
_KEYS: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "an API key"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "an API key"},
    "basic": {
        "type": "http",
        "scheme": "basic",
        "description": "any user name, an API key as password; does not open /admin",
    },
}

# FastAPI's own schemas for a wrong parameter, which the server does not use.
_NEVER_SENT = ("HTTPValidationError", "ValidationError")


def _with_common_parts(generated: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's document, with the errors, headers and security that all paths share."""
    document = deepcopy(generated)
    schemas = document["components"]["schemas"]
    for model in (ProblemAnswer, ErrorAnswer):
        schemas[model.__name__] = model.model_json_schema()
    for name in _NEVER_SENT:
        del schemas[name]
    document["components"]["securitySchemes"] = _KEYS
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation.setdefault("parameters", []).append(_REQUEST_ID)
            responses = operation["responses"]
            if _NEVER_SENT[0] in str(responses.get("422")):
                del responses["422"]
            for status, response in responses.items():
                if status.startswith("2"):
                    response.setdefault("headers", {}).update(HEADERS)
            # The protocol's paths answer 404 to another method.
            if not path.startswith("/v2"):
                responses["405"] = problem_responses(405)[405]
            if path not in OPEN:
                operation.setdefault("security", [{}, *({name: []} for name in _KEYS)])
                responses.setdefault("401", _anywhere(path, 401))
            for status in _ANYWHERE:
                found = responses.setdefault(str(status), _anywhere(path, status))
                found["content"] = _anywhere(path, status)["content"] | found["content"]
            operation["responses"] = dict(sorted(responses.items()))
    return document


def _anywhere(path: str, status: int) -> dict[str, Any]:
    """The errors that any path may answer with."""
    description, detail = _ANYWHERE.get(status, (_PROBLEMS[status], _EXAMPLES[status]))
    content = _problem(status, detail, path)
    if path.startswith("/v2"):
        # In the form of `problems.answer`, except for those that the connection answers.
        of_protocol = {"application/json": error_content(detail)}
        if status not in _BY_CONNECTION:
            content = of_protocol
        elif status not in (408, 431, 501):
            content |= of_protocol
    return _response(status, description, content)


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>SLSNet Server: API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""

_START = """\
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  presets: [SwaggerUIBundle.presets.apis],
  validatorUrl: null,
});
"""

# Swagger UI sets style attributes and shows its icons as data URIs; all else comes from here.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
    " blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_ASSETS = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
}

router = APIRouter(include_in_schema=False)


@router.get("/openapi.json")
def openapi(request: Request) -> Response:
    """The reference as an OpenAPI document."""
    return JSONResponse(_with_common_parts(request.app.openapi()))


@router.get("/docs")
async def docs() -> Response:
    """The reference as a page."""
    return Response(_PAGE, media_type="text/html", headers={"Content-Security-Policy": _POLICY})


@router.get("/docs/start.js")
async def docs_start() -> Response:
    """Starts the page's viewer."""
    return Response(_START, media_type="text/javascript")


@router.get("/docs/{name}")
def docs_asset(name: str) -> Response:
    """The viewer's own files."""
    if name not in _ASSETS:
        raise HTTPException(HTTPStatus.NOT_FOUND)
    return Response(
        _asset(name), media_type=_ASSETS[name], headers={"Cache-Control": "max-age=86400"}
    )


@cache
def _asset(name: str) -> bytes:
    return (files("fastapi_offline") / "static" / name).read_bytes()
