"""Makes the pictures of the page: `python -m docs.page --output docs/guides`.

A generated photo is opened in Chromium, at a desk's and at a phone's width, light and dark.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from common.program import Help
from tests.support import ROOT
from tests.support.launch import serve
from tests.support.page import browse

_SHOWN = ((1440, False, "light"), (1440, False, "dark"), (390, True, "light"), (390, True, "dark"))


def main() -> None:
    """Command line: write the four pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.page", description=__doc__, formatter_class=Help
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="where they are replaced"
    )
    folder: Path = parser.parse_args().output
    with serve() as server, TemporaryDirectory() as downloads:
        for width, phone, scheme in _SHOWN:
            path = folder / f"page-{width}-{scheme}.png"
            with browse(server.url, Path(downloads), phone=phone) as page:
                media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
                page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
                page.open()
                page.find("choose").send_keys(str(ROOT / "docs" / "lesion.jpg"))
                page.until_done()
                page.save_picture(path, 128)


if __name__ == "__main__":
    main()
