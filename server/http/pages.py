"""The page for people at `GET /`: drop photos, see their masks.

Its files are in `page/`, and are read and compressed once. The Content-Security-Policy allows only
these files, and no inline script or style.
"""

import gzip
from http import HTTPStatus
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

__all__ = ["page_router"]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
    " media-src blob:; connect-src 'self'; manifest-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)

_TYPES = {
    "app.js": "text/javascript",
    "dom.js": "text/javascript",
    "edit.js": "text/javascript",
    "example.jpg": "image/jpeg",
    "files.js": "text/javascript",
    "icon.svg": "image/svg+xml",
    "live.js": "text/javascript",
    "manifest.webmanifest": "application/manifest+json",
    "mask.js": "text/javascript",
    "measure.js": "text/javascript",
    "segment.js": "text/javascript",
    "server.js": "text/javascript",
    "stream.js": "text/javascript",
    "strip.js": "text/javascript",
    "style.css": "text/css",
    "view.js": "text/javascript",
}

_FOLDER = files("server") / "page"
_FILES = {name: (_FOLDER / name).read_bytes() for name in (*_TYPES, "index.html", "sw.js")}
_COMPRESSED = {name: gzip.compress(data) for name, data in _FILES.items()}

page_router = APIRouter(include_in_schema=False)


@page_router.get("/")
async def page(request: Request) -> Response:
    """The page."""
    headers = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"}
    return _file(request, "index.html", "text/html", headers)


@page_router.get("/sw.js")
async def worker(request: Request) -> Response:
    """The service worker; at the top, since it may only serve what lies below it."""
    headers = {"Content-Security-Policy": "default-src 'none'; connect-src 'self'"}
    return _file(request, "sw.js", "text/javascript", headers)


@page_router.get("/page/{name}")
async def asset(request: Request, name: str) -> Response:
    """A file of the page."""
    if name not in _TYPES:
        raise HTTPException(HTTPStatus.NOT_FOUND)
    return _file(request, name, _TYPES[name], {})


def _file(request: Request, name: str, media_type: str, headers: dict[str, str]) -> Response:
    headers = {**headers, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    data = _FILES[name]
    if "gzip" in request.headers.get("accept-encoding", ""):
        data = _COMPRESSED[name]
        headers["Content-Encoding"] = "gzip"
    return Response(data, media_type=media_type, headers=headers)
