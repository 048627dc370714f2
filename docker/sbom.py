"""Write the image's bill of materials: Python packages, Debian's packages, interpreter, network.

    python docker/sbom.py /opt/venv/bin/python sbom.cdx.json

CycloneDX 1.6. Needs cyclonedx-bom (requirements-build.lock) in the Python that runs it, and runs in
the repository's root. The same image gives the same bytes: no time, no serial number.
"""

import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

_NETWORK = Path("model/weights/slsnet.onnx")


def main(python: str, output: Path) -> None:
    """Describe the environment of the interpreter `python` and the system around it."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible"]
    command += ["--sv", "1.6", "--pyproject", "pyproject.toml", python]
    bill = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    bill["components"] += [_interpreter(), _network(), *_debian()]
    output.write_text(json.dumps(bill, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _interpreter() -> dict[str, Any]:
    version = platform.python_version()
    return {
        "type": "platform",
        "name": "CPython",
        "version": version,
        "bom-ref": f"cpython=={version}",
        "cpe": f"cpe:2.3:a:python:python:{version}:*:*:*:*:*:*:*",
    }


def _network() -> dict[str, Any]:
    sha256 = hashlib.sha256(_NETWORK.read_bytes()).hexdigest()
    return {
        "type": "machine-learning-model",
        "name": str(_NETWORK),
        "bom-ref": f"{_NETWORK}@{sha256}",
        "hashes": [{"alg": "SHA-256", "content": sha256}],
    }


def _debian() -> list[dict[str, Any]]:
    release = platform.freedesktop_os_release()
    distribution = f"{release['ID']}-{release['VERSION_ID']}"
    form = "${Package}\t${Version}\t${Architecture}\n"
    listing = subprocess.run(
        ["dpkg-query", "--show", f"--showformat={form}"], check=True, capture_output=True, text=True
    ).stdout
    components = []
    for line in sorted(listing.splitlines()):
        name, version, architecture = line.split("\t")
        escaped = version.replace("+", "%2B").replace(":", "%3A")
        purl = f"pkg:deb/{release['ID']}/{name}@{escaped}?arch={architecture}&distro={distribution}"
        components.append(
            {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}
        )
    return components


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
