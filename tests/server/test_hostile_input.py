"""Requests made from the API's own reference: never a 500, never a crash."""

import subprocess
import sys
from pathlib import Path

import pytest

from server.keys import new_key
from tests.support.launch import ServerProcess, serve

pytestmark = pytest.mark.usefixtures("small_networks")

_CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)

# 504 is what a deadline gives that is far too short. Lines of JSON are beyond the tool;
# `test_segment_batch.py` looks at them.
_CONFIG = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "4xx", "504"]
[[operations]]
include-path = "/segment/batch"
checks.response_schema_conformance.enabled = false
"""


def test_the_api_does_what_its_reference_says(tmp_path: Path) -> None:
    """No 500, and each answer as the document has it (schemathesis)."""
    with serve("--request-timeout-ms", "600000") as server:
        ask(server, tmp_path)


def test_what_keys_open_does_what_its_reference_says(tmp_path: Path) -> None:
    key, line = new_key("ops", "admin")
    keys = tmp_path / "keys"
    keys.write_text(line + "\n", encoding="utf-8")
    with serve("--api-keys-file", str(keys)) as server:
        bearer = f"--header=Authorization: Bearer {key}"
        ask(server, tmp_path, "--include-path-regex=^/(admin|model|metrics)", bearer)


def ask(server: ServerProcess, tmp_path: Path, *arguments: str) -> None:
    config = tmp_path / "schemathesis.toml"
    config.write_text(_CONFIG, encoding="utf-8")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"),
        f"{server.url}/openapi.json",
        f"--checks={','.join(_CHECKS)}",
        "--phases=examples,coverage,fuzzing",
        "--max-examples=5",
        "--generation-deterministic",
        "--request-timeout=600",
        *arguments,
    ]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=3600, check=False
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
