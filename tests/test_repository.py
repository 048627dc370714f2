"""What is in git is source: nothing compiled, nothing that nobody can read."""

import subprocess

import pytest

from tests.support import ROOT


def test_no_binaries_but_pictures_and_the_shipped_network() -> None:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git, and a clone")
    names = listed.stdout.decode().split("\0")[:-1]
    # As git itself tells what is binary.
    binary = {
        name
        for name in names
        if (ROOT / name).is_file() and b"\0" in (ROOT / name).read_bytes()[:8000]
    }
    network = {"model/weights/slsnet.onnx", "model/weights/slsnet.safetensors"}
    assert {name for name in binary if not name.endswith((".png", ".jpg"))} == network
