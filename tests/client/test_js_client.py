"""The JavaScript client: its own tests, and its types against the API of today."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import server as served
from tests.support import ROOT
from tests.support.launch import ServerProcess
from tests.support.node import needs_node, npm_installed

CLIENT = ROOT / "client-js"


@pytest.mark.slow
@needs_node
def test_its_own_tests_pass() -> None:
    environment = {**os.environ, "SLSNET_PYTHON": sys.executable}
    # Before Node 22 a WebSocket of its own has to be asked for.
    command = ["node", "--experimental-websocket", "--test", "test/client.test.js"]
    done = subprocess.run(
        command, cwd=CLIENT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_node
def test_its_types_fit_the_api(server: ServerProcess, tmp_path: Path) -> None:
    folder = tmp_path / "client"
    shutil.copytree(CLIENT, folder, ignore=shutil.ignore_patterns("node_modules"))
    npm_installed(folder)
    compiled = ["node_modules/.bin/tsc", "--project", "test"]
    document = tmp_path / "openapi.json"
    document.write_bytes(httpx.get(f"{server.url}/openapi.json").content)
    generated = ["node", "types.js", str(document)]
    for command in (compiled, generated, compiled):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_client_and_server_have_one_version() -> None:
    assert json.loads((CLIENT / "package.json").read_text())["version"] == served.VERSION


def test_it_needs_no_other_package() -> None:
    assert "dependencies" not in json.loads((CLIENT / "package.json").read_text())
