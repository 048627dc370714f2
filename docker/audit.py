"""Look for known vulnerabilities in what is shipped: every package of the images' lock files, and
what is installed beside them.

    python -m docker.audit

`pip-audit` asks a service that some machines cannot reach. If it cannot be asked, or does not know
a package, this is printed and is no failure. A known vulnerability is a failure.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent
# gRPC, traces and Ray are installed by who wants them; all else is in an image.
SHIPPED = (
    *sorted((_ROOT / "docker").glob("requirements*.lock")),
    _ROOT / "requirements-grpc.txt",
    _ROOT / "requirements-otel.txt",
    _ROOT / "requirements-heif.txt",
    _ROOT / "requirements-dicom.txt",
    _ROOT / "requirements-openvino.txt",
    _ROOT / "requirements-ray.txt",
)


def verdict(report: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether nothing is known against what was asked about, and lines that say it.

    Args:
        report: pip-audit's, as JSON has it.
    """
    asked = report["dependencies"]
    skipped = [package["name"] for package in asked if "skip_reason" in package]
    lines = [
        f"{package['name']} {package['version']}: {hole['id']}"
        f" ({', '.join(hole['aliases']) or 'no other name'}), fixed in"
        f" {', '.join(hole['fix_versions']) or 'no version yet'}"
        for package in asked
        for hole in package.get("vulns", ())
    ]
    if lines:
        return False, lines
    if len(skipped) == len(asked):
        return True, ["NOT AUDITED: the service knows none of the packages here."]
    unknown = f"; NOT AUDITED: {', '.join(skipped)}" if skipped else ""
    return True, [f"{len(asked) - len(skipped)} packages, no known vulnerability{unknown}"]


def _audit(requirements: Path) -> tuple[bool, list[str]]:
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements)]
    # All that is installed is named with its version: nothing is left to be resolved.
    command += ["--disable-pip", "--format", "json", "--progress-spinner", "off"]
    if requirements.suffix != ".lock":
        command.append("--no-deps")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return verdict(json.loads(result.stdout))
    except ValueError:
        why = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return True, [f"NOT AUDITED: the service cannot be asked: {why[:300]}"]


def main() -> int:
    """The command; gives its exit code."""
    good = True
    with ThreadPoolExecutor(4) as pool:  # each is a process, which mostly waits for the service
        for requirements, (is_good, lines) in zip(SHIPPED, pool.map(_audit, SHIPPED), strict=True):
            good = good and is_good
            for line in lines:
                print(f"audit: {requirements.relative_to(_ROOT)}: {line}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
