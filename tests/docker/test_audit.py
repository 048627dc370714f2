"""What is said of known vulnerabilities, and when it is a failure."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from docker import audit

CLEAN = {"name": "numpy", "version": "2.4.6", "vulns": []}
UNKNOWN = {"name": "uvloop", "skip_reason": "Dependency not found and could not be audited"}
HOLE = {"id": "PYSEC-1", "aliases": ["CVE-2026-1"], "fix_versions": ["13.0.1"], "description": ""}
KNOWN = {"name": "pillow", "version": "13.0.0", "vulns": [HOLE]}


@pytest.mark.parametrize(
    ("dependencies", "good", "words"),
    [
        ([CLEAN, CLEAN], True, ["2 packages, no known vulnerability"]),
        ([CLEAN, UNKNOWN], True, ["1 packages", "NOT AUDITED: uvloop"]),
        ([UNKNOWN], True, ["NOT AUDITED", "none of the packages"]),
        ([CLEAN, KNOWN, UNKNOWN], False, ["pillow 13.0.0: PYSEC-1 (CVE-2026-1)", "13.0.1"]),
    ],
)
def test_a_known_vulnerability_is_a_failure_and_ignorance_is_said(
    dependencies: list[dict[str, Any]], good: bool, words: list[str]
) -> None:
    is_good, lines = audit.verdict({"dependencies": dependencies, "fixes": []})
    assert is_good is good
    for word in words:
        assert word in "\n".join(lines)


@pytest.mark.parametrize(
    ("program", "code", "words"),
    [
        (f"print({json.dumps({'dependencies': [CLEAN]})!r})", 0, "1 packages, no known"),
        (f"print({json.dumps({'dependencies': [KNOWN]})!r}); raise SystemExit(1)", 1, "PYSEC-1"),
        ("raise ConnectionError('no such host')", 0, "NOT AUDITED: the service cannot be asked"),
    ],
)
def test_the_command_goes_by_what_pip_audit_says(
    program: str,
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!{sys.executable}\n{program}\n", encoding="utf-8")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    assert audit.main() == code
    said = capsys.readouterr().out
    assert said.count(words) == len(audit.SHIPPED)
    assert "docker/requirements.lock" in said
