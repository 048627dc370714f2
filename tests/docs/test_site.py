"""The documentation builds without a warning, fetches nothing, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from server.settings import settings_table
from tests.support import ROOT

# What a page loads; links that a reader may follow are not of them.
_LOADED = re.compile(r'<(?:script|img|iframe)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    flags = ["-q", "-E", "-W", "--keep-going", "-b", "html", "-d", str(out / "doctrees")]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *flags, "docs", str(out / "html")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return out / "html"


def test_every_page_is_there(site: Path) -> None:
    written = {p.relative_to(ROOT / "docs").with_suffix("") for p in (ROOT / "docs").rglob("*.md")}
    written = {p for p in written if p.parts[0] not in ("generated", "training")}
    built = {p.relative_to(site).with_suffix("") for p in site.rglob("*.html")}
    assert written <= built | {Path("training")}
    settings = (site / "reference/settings.html").read_text()
    for flag, variable, _, _ in settings_table():
        assert flag in settings and variable in settings
    assert "slsnet_requests_total" in (site / "reference/metrics.html").read_text()
    assert "/segment/batch" in (site / "_static/openapi.json").read_text()


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        for loaded in _LOADED.findall(page.read_text()):
            address = "".join(loaded)
            assert not re.match(r"https?:|//", address), f"{page.name} loads {address}"


def test_the_readmes_links_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", readme):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_lines_fit_on_a_screen() -> None:
    """Those of tables aside, and those of pages that a program wrote."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("client*/README.md")]
    long = [
        f"{page.relative_to(ROOT)}, line {number}"
        for page in pages
        if page.relative_to(ROOT).parts[:2] not in (("docs", "generated"), ("docs", "training"))
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120 and not line.lstrip().startswith("|")
    ]
    assert not long
