"""The page for people at `GET /`: drop a photo, see its mask.

Its files are in `page/`, and are read once. The Content-Security-Policy allows only these files,
and no inline script or style.
"""

from http import HTTPStatus
from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

__all__ = ["page_router"]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_TYPES = {
    "app.js": "text/javascript",
    "example.jpg": "image/jpeg",
    "icon.svg": "image/svg+xml",
    "mask.js": "text/javascript",
    "style.css": "text/css",
}

_FOLDER = files("server") / "page"
_PAGE = (_FOLDER / "index.html").read_bytes()
_ASSETS = {name: (_FOLDER / name).read_bytes() for name in _TYPES}

page_router = APIRouter(include_in_schema=False)


@page_router.get("/")
async def page() -> Response:
    """The page."""
    headers = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"}
    return Response(_PAGE, media_type="text/html", headers=headers)


@page_router.get("/page/{name}")
async def asset(name: str) -> Response:
    """A file of the page."""
    if name not in _ASSETS:
        raise HTTPException(HTTPStatus.NOT_FOUND)
    return Response(_ASSETS[name], media_type=_TYPES[name], headers={"Cache-Control": "no-cache"})
