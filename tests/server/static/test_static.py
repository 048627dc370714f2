"""What `python -m server.static` makes of the network, and how it gets its runtime."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.stamp import check_digest, trial_images
from tests.support import MODEL, ROOT

network = pytest.importorskip("server.static.network", reason="needs onnx", exc_type=ImportError)


def test_half_the_size_and_the_same_masks() -> None:
    content = MODEL.read_bytes()
    half = network.small(content)
    check_digest(half)
    assert len(half) <= 5_000_000 < len(content)
    found = network.parity(content, half)
    assert not found.failures()
    assert found.max_difference > 0
    kept = network.metadata(half)
    before = network.metadata(content)
    for key in ("name", "version", "weights_sha256", "attention", "licence"):
        assert kept[key] == before[key]


def test_the_trial_is_what_the_worker_reads() -> None:
    trial = np.frombuffer(network.trial(MODEL.read_bytes()), np.uint8)
    images = trial_images()
    assert trial.size == images.size + 3 * 16 * 16
    assert np.array_equal(trial[: images.size], images.ravel())


def static(tmp_path: Path, *flags: str, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.static", str(tmp_path / "out"), *flags],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_npm_it_says_what_to_do(tmp_path: Path) -> None:
    done = static(tmp_path, path="")
    assert done.returncode == 1 and "npm pack onnxruntime-web@" in done.stderr
    assert not (tmp_path / "out").exists()


def test_another_package_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "other.tgz").write_bytes(b"other")
    done = static(tmp_path, "--runtime", str(tmp_path / "other.tgz"), path="")
    assert done.returncode == 1 and "sha512-" in done.stderr
    done = static(tmp_path, "--runtime", str(tmp_path / "absent.tgz"), path="")
    assert done.returncode == 1 and "cannot be read" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
