"""Dockerfiles and scripts are linted, and images install nothing that is not locked."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

FOLDER = ROOT / "docker"
DOCKERFILES = [FOLDER / name for name in ("Dockerfile", "Dockerfile.gpu", "Dockerfile.load")]
SCRIPTS = [ROOT / ".ci/run", *sorted(FOLDER.glob("*.sh")), *sorted(FOLDER.glob("test/*.sh"))]
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent)
SHELLCHECK = shutil.which("shellcheck", path=Path(sys.executable).parent)


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint (docker/requirements-tools.txt)")
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    assert HADOLINT is not None
    result = subprocess.run(
        [HADOLINT, "--failure-threshold", "style", path], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck (docker/requirements-tools.txt)")
def test_shellcheck_finds_nothing() -> None:
    assert SHELLCHECK is not None
    result = subprocess.run(
        [SHELLCHECK, "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_tools_that_could_not_be_installed_are_not_taken_for_installed(tmp_path: Path) -> None:
    """Given a pip that fails, the next run installs again."""
    (tmp_path / "tools/bin").mkdir(parents=True)
    for name, code in (("python3", 0), ("tools/bin/pip", 1)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    script = """
set -eu
eval "$(sed -n '/^tools()/,/^}/p' docker/test/engine.sh)"
folder=$(tools)
"""
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "STORE": str(tmp_path)}
    result = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment)
    assert result.returncode == 1
    assert not (tmp_path / "tools/.installed").exists()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_packages_are_known_by_their_hash(path: Path) -> None:
    steps = path.read_text().replace("\\\n", " ").replace("\n", "&&").split("&&")
    installs = [step.split() for step in steps if "/bin/pip " in step]
    assert installs
    for install in installs:
        # What is of this tree has none, and fetches nothing.
        assert {"--require-hashes", "--no-index"} & set(install)
        assert "--no-deps" in install
