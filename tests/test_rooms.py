"""What tests share is in `tests/support`."""

import ast

from tests.support import ROOT


def test_no_test_module_is_imported_by_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("tests."):
                assert f"{node.module}.".startswith("tests.support."), path
