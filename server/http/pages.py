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

__all__ = ["page_for_device", "page_router"]

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
    "icon.png": "image/png",
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


def page_router(*, offers_device: bool) -> APIRouter:
    """The routes of the page.

    Args:
        offers_device: whether it offers to run the network in the browser.
    """
    router = APIRouter(include_in_schema=False)
    pages = {**_FILES}
    headers = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"}
    if offers_device:
        pages["index.html"] = page_for_device(_FILES["index.html"], has_server=True)
        # Threads are for pages that are isolated from others.
        headers["Cross-Origin-Embedder-Policy"] = "require-corp"
    compressed = {**_COMPRESSED, "index.html": gzip.compress(pages["index.html"])}

    def file(request: Request, name: str, media_type: str, headers: dict[str, str]) -> Response:
        headers = {**headers, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
        data = pages[name]
        if "gzip" in request.headers.get("accept-encoding", ""):
            data = compressed[name]
            headers["Content-Encoding"] = "gzip"
        return Response(data, media_type=media_type, headers=headers)

    @router.get("/")
    async def page(request: Request) -> Response:
        return file(request, "index.html", "text/html", headers)

    @router.get("/sw.js")
    async def worker(request: Request) -> Response:
        # At the top, since it may only serve what lies below it.
        policy = {"Content-Security-Policy": "default-src 'none'; connect-src 'self'"}
        return file(request, "sw.js", "text/javascript", policy)

    @router.get("/page/{name}")
    async def asset(request: Request, name: str) -> Response:
        if name not in _TYPES:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return file(request, name, _TYPES[name], {})

    return router


def page_for_device(html: bytes, *, has_server: bool) -> bytes:
    """The page's HTML, with the choice to compute in the browser, or without any other way."""
    script = b'<script type="module" src="page/app.js">'
    choice = b'<script type="module" src="page/device/compute.js"></script>\n'
    # It comes first, so that it is settled where photos go before the page takes any.
    html = _replaced(html, script, choice + script)
    if has_server:
        return html
    policy = _POLICY.replace("; frame-ancestors 'none'", "").encode()
    viewport = b'<meta name="viewport"'
    meta = b'<meta http-equiv="Content-Security-Policy" content="' + policy + b'">\n'
    html = _replaced(html, viewport, meta + viewport)
    return _replaced(html, b"<html ", b'<html data-server="none" ')


def _replaced(html: bytes, old: bytes, new: bytes) -> bytes:
    assert html.count(old) == 1, old
    return html.replace(old, new)
