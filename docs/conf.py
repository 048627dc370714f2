"""The documentation as a site, built by Sphinx: `make docs` writes it to `build/docs`.

Pages under `docs/generated` are made from the code at each build, so that they are true; git does
not keep them.
"""

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import fastapi_offline
import httpx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
sys.path.insert(0, str(ROOT))

from server.http.app import create_app  # noqa: E402 - only found once the root is on the path
from server.observe.metrics import Metrics  # noqa: E402
from server.settings import Settings, settings_table  # noqa: E402

project = "SLSNet Server"
author = "the SLSNet Server developers"
extensions = ["myst_parser", "swagger_plugin_for_sphinx"]
exclude_patterns = ["generated/*", "training/*"]
source_suffix = {".md": "markdown"}
nitpicky = True

html_theme = "furo"
html_title = project
html_static_path = ["generated/static"]
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# Nothing is fetched from elsewhere: the same files that a server's own /docs are made of.
swagger_present_uri = ""
swagger_bundle_uri = "swagger-ui-bundle.js"
swagger_css_uri = "swagger-ui.css"


def _table(head: str, columns: int, rows: list[str]) -> str:
    return "\n".join([head, "|---" * columns + "|", *rows, ""])


def settings_table_page() -> str:
    """Every setting: flag, environment variable, default and meaning."""
    rows = [
        f"| `{flag}` | `{variable}` | {default} | {meaning} |"
        for flag, variable, default, meaning in settings_table()
    ]
    return _table("| flag | variable | default | meaning |", 4, rows)


def metrics_table_page() -> str:
    """Every metric that `GET /metrics` can show: name, kind and meaning."""
    rows = []
    for family in Metrics().registry.collect():
        total = "_total" if family.type == "counter" else ""
        rows.append(f"| `{family.name}{total}` | {family.type} | {family.documentation} |")
    return _table("| name | kind | meaning |", 3, sorted(rows))


async def _openapi() -> Any:
    # No lifespan, so that no network is loaded for it.
    served = httpx.ASGITransport(create_app(Settings())[0])
    async with httpx.AsyncClient(transport=served, base_url="http://docs") as client:
        return (await client.get("/openapi.json")).raise_for_status().json()


def generate() -> None:
    """Write what is made from the code."""
    static = GENERATED / "static"
    static.mkdir(parents=True, exist_ok=True)
    (GENERATED / "settings.md").write_text(settings_table_page(), encoding="utf-8")
    (GENERATED / "metrics.md").write_text(metrics_table_page(), encoding="utf-8")
    document = json.dumps(asyncio.run(_openapi()), indent=1)
    (static / "openapi.json").write_text(document, encoding="utf-8")
    swagger = Path(fastapi_offline.__file__).parent / "static"
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        shutil.copyfile(swagger / name, static / name)


generate()
