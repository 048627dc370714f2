"""What is in git is source: nothing compiled, nothing that nobody can read."""

import subprocess

import pytest

from tests.support import ROOT


def test_no_binaries_but_pictures_and_the_shipped_networks() -> None:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git, and a clone")
    names = listed.stdout.decode().split("\0")[:-1]
    # As git itself tells what is binary, but of the whole file.
    binary = {
        name for name in names if (ROOT / name).is_file() and b"\0" in (ROOT / name).read_bytes()
    }
    networks = {
        f"model/weights/{name}"
        for name in ("slsnet.onnx", "slsnet.safetensors", "lite0-unet.onnx", "enet.onnx")
    }
    assert {name for name in binary if not name.endswith((".png", ".jpg"))} == networks
