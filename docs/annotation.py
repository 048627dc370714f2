"""Makes the picture of Label Studio: `python -m docs.annotation LABEL_STUDIO --output docs/guides`.

LABEL_STUDIO is the program, of an environment of its own. A generated photo is imported, the ML
backend is connected and asked for a prediction, and that is opened in Label Studio's editor.
"""

import argparse
import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from selenium.webdriver.common.by import By

from common.program import Help
from tests.support import ROOT
from tests.support.launch import free_port, serve
from tests.support.page import Page, browse
from tests.support.waiting import until

_USER, _PASSWORD, _TOKEN = "annotator@example.org", secrets.token_hex(), secrets.token_hex(20)

_LABELS = """
<View>
  <Image name="photo" value="$image"/>
  <BrushLabels name="mask" toName="photo"><Label value="Lesion" background="#00ebc8"/></BrushLabels>
  <RectangleLabels name="box" toName="photo" smart="true"><Label value="Lesion"/></RectangleLabels>
</View>
"""


@contextlib.contextmanager
def _running(url: str, command: list[str], **environment: str) -> Iterator[None]:
    """A process that answers at `url`, ended with the block."""
    with subprocess.Popen(command, env={**os.environ, **environment}) as process:

        def answers() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{url}/health").status_code == 200
            return False

        try:
            # Label Studio makes its database first, which takes minutes.
            while not answers():
                assert process.poll() is None
                time.sleep(0.2)
            yield
        finally:
            process.terminate()


def _predicted(studio: str, backend: str) -> str:
    """A project with one photo and its prediction; the path of the photo's editor."""
    key = {"Authorization": f"Token {_TOKEN}"}
    with httpx.Client(base_url=studio, headers=key, timeout=120) as client:

        def posted(path: str, **asked: Any) -> Any:
            return client.post(path, **asked).raise_for_status().json()

        about = {"title": "Lesions", "label_config": _LABELS}
        project = posted("/api/projects", json=about)["id"]
        photo = {"file": ("lesion.jpg", (ROOT / "docs/lesion.jpg").read_bytes(), "image/jpeg")}
        posted(f"/api/projects/{project}/import", files=photo)
        posted("/api/ml", json={"project": project, "url": backend, "title": "SLSNet"})
        every = {"selectedItems": {"all": True, "excluded": []}}
        posted(f"/api/dm/actions?id=retrieve_tasks_predictions&project={project}", json=every)
        (prediction,) = client.get("/api/predictions", params={"project": project}).json()
        return f"/projects/{project}/data?task={prediction['task']}"


def _open(page: Page, studio: str, path: str) -> None:
    driver = page.driver
    driver.get(f"{studio}/user/login/")
    driver.find_element(By.NAME, "email").send_keys(_USER)
    driver.find_element(By.NAME, "password").send_keys(_PASSWORD)
    driver.find_element(By.CSS_SELECTOR, "form button[type=submit]").click()
    until(lambda: "login" not in driver.current_url)
    driver.get(f"{studio}{path}")
    until(lambda: bool(driver.find_elements(By.CSS_SELECTOR, ".lsf-outliner-item")))
    # Until it does not change any more.
    shown = b""
    while shown != (shown := driver.get_screenshot_as_png()):
        time.sleep(1)


def main() -> None:
    """Command line: write the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.annotation", description=__doc__, formatter_class=Help
    )
    parser.add_argument(
        "program",
        metavar="LABEL_STUDIO",
        help="the program, such as /opt/label-studio/bin/label-studio",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where it is put")
    given = parser.parse_args()
    ports = free_port(), free_port()
    studio, backend = (f"http://127.0.0.1:{port}" for port in ports)
    with serve() as server, TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        command = [
            *(given.program, "start", "--no-browser", "--internal-host", "127.0.0.1"),
            *("--port", str(ports[0]), "--data-dir", folder),
            *("--username", _USER, "--password", _PASSWORD, "--user-token", _TOKEN),
        ]
        # It asks no backend at a private address otherwise.
        told = {
            "ML_BLOCK_LOCAL_IP": "false",
            "SSRF_PROTECTION_ENABLED": "false",
            "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        }
        running.enter_context(_running(studio, command, **told))
        command = [
            *(sys.executable, "-m", "slsnet_client.label_studio", "--server", server.url),
            *("--label-studio", studio, "--allow-private", "--port", str(ports[1])),
        ]
        told = {"LABEL_STUDIO_API_KEY": _TOKEN, "PYTHONPATH": str(ROOT / "client")}
        running.enter_context(_running(backend, command, **told))
        with browse(studio, Path(folder)) as page:
            _open(page, studio, _predicted(studio, backend))
            page.save_picture(given.output / "label-studio.png", 96)


if __name__ == "__main__":
    main()
