"""`/page/device/…`: what the page needs to run the network in the browser, where the server has it.

`python -m server.static` writes the network and its runtime; without them the page does not offer
it. Of all answers only these scripts may compile WebAssembly, by a policy of their own.
"""

import json
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

__all__ = ["FOLDER", "LISTING", "SOURCES", "DeviceFiles", "DeviceFilesError", "device_router"]

FOLDER = "page/device"
LISTING = "files.json"
SOURCES = ("compute.js", "judge.js", "pixels.js", "worker.js")

_TYPES = {".js": "text/javascript", ".json": "application/json", ".mjs": "text/javascript"}
_TYPES |= {".wasm": "application/wasm"}

_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; connect-src 'self';"
    " frame-ancestors 'none'"
)

# A worker of a page that may use threads has to ask for the same isolation.
_HEADERS = {"Content-Security-Policy": _POLICY, "Cross-Origin-Embedder-Policy": "require-corp"}


class DeviceFilesError(RuntimeError):
    """The folder does not hold what `python -m server.static` writes."""


class DeviceFiles:
    """The files for browsers in a folder that `python -m server.static` wrote.

    Raises:
        DeviceFilesError: some are missing.
    """

    def __init__(self, site: Path) -> None:
        folder = site / FOLDER
        try:
            self.listing = (folder / LISTING).read_bytes()
            told = json.loads(self.listing)
            digest = str(told["folder"])
            names = {*told["names"].values(), *(n for ns in told["runtimes"].values() for n in ns)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DeviceFilesError(
                f"{site} was not written by `python -m server.static`: {error}"
            ) from error
        self.paths = {f"{digest}/{name}": folder / digest / name for name in names}
        compressed = {name: path.with_name(f"{path.name}.gz") for name, path in self.paths.items()}
        self.compressed = {name: path for name, path in compressed.items() if path.is_file()}
        missing = [str(path) for path in self.paths.values() if not path.is_file()]
        if missing:
            raise DeviceFilesError(f"{site} is not whole, write it again: {missing[0]} is missing")


def device_router(found: DeviceFiles | None) -> APIRouter:
    """The route `/page/device/…`; none without files."""
    router = APIRouter(include_in_schema=False)
    if found is None:
        return router
    package = files("server") / FOLDER
    small = {name: (package / name).read_bytes() for name in SOURCES} | {LISTING: found.listing}

    @router.get(f"/{FOLDER}/{{name:path}}")
    async def device(request: Request, name: str) -> Response:
        headers = _HEADERS | {"Cache-Control": "no-cache"}
        media_type = _TYPES.get(Path(name).suffix, "application/octet-stream")
        if name in small:
            return Response(small[name], media_type=media_type, headers=headers)
        if name in found.paths:
            # Their folder is named by their digest.
            headers["Cache-Control"] = "public, max-age=31536000, immutable"
            path, compressed = found.paths[name], found.compressed.get(name)
            if compressed is not None:
                headers["Vary"] = "Accept-Encoding"
                if "gzip" in request.headers.get("accept-encoding", ""):
                    path = compressed
                    headers["Content-Encoding"] = "gzip"
            return FileResponse(path, media_type=media_type, headers=headers)
        raise HTTPException(HTTPStatus.NOT_FOUND)

    return router
