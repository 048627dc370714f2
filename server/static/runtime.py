"""ONNX Runtime for browsers: fetched as an npm package, and held against its known digest.

Its WebAssembly is not in git. npm fetches the package, or somebody brings it as a file; either way
the same bytes are taken or none.
"""

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

__all__ = ["PACKAGE", "RUNTIMES", "RuntimeMissingError", "fetched", "runtime_files"]

PACKAGE = "onnxruntime-web@1.30.0"

# Of the package's file, as package managers write it.
_INTEGRITY = (
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02V"
    "b7QmRMDs1SigqR4CXAfKYQ=="
)

RUNTIMES = {
    "wasm": (
        "ort.wasm.min.mjs",
        "ort-wasm-simd-threaded.mjs",
        "ort-wasm-simd-threaded.wasm",
    ),
    "webgpu": (
        "ort.webgpu.min.mjs",
        "ort-wasm-simd-threaded.asyncify.mjs",
        "ort-wasm-simd-threaded.asyncify.wasm",
    ),
}
"""The files of each way to run a network; the first imports the others."""

_FETCH_TIMEOUT_S = 300


class RuntimeMissingError(RuntimeError):
    """The package cannot be had, or is not the one that is known. The message says what to do."""


def runtime_files(package: Path | None = None) -> dict[str, bytes]:
    """The files of `RUNTIMES` by name.

    Args:
        package: the package's file, as `npm pack` writes it; without it npm fetches it.

    Raises:
        RuntimeMissingError: see there.
    """
    try:
        data = fetched() if package is None else package.read_bytes()
    except OSError as error:
        raise RuntimeMissingError(f"{package} cannot be read: {error}") from error
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if f"sha512-{digest}" != _INTEGRITY:
        raise RuntimeMissingError(
            f"{package or 'what npm fetched'} is not {PACKAGE}: its digest is sha512-{digest},"
            f" not {_INTEGRITY}"
        )
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        found = {}
        for name in sorted({name for names in RUNTIMES.values() for name in names}):
            file = archive.extractfile(f"package/dist/{name}")
            assert file is not None  # The digest says that it is there.
            found[name] = file.read()
    return found


def fetched() -> bytes:
    """The package's file, fetched by npm.

    Raises:
        RuntimeMissingError: npm is missing, or cannot fetch it.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeMissingError(
            f"npm is needed to fetch {PACKAGE}, and is not installed. Install Node.js; or run"
            f" `npm pack {PACKAGE}` on another machine, and name the file that it writes:"
            " --runtime FILE"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", PACKAGE, "--silent", "--ignore-scripts"]
        try:
            done = subprocess.run(
                [*command, "--pack-destination", folder],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=_FETCH_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeMissingError(f"npm did not fetch {PACKAGE} in time") from error
        files = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(files) != 1:
            said = (done.stderr or done.stdout).strip()
            raise RuntimeMissingError(f"npm could not fetch {PACKAGE}: {said or 'it says nothing'}")
        return files[0].read_bytes()
