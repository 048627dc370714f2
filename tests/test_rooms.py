"""What tests share is in `tests/support`."""

import ast

from tests.support import ROOT


def test_only_tests_of_benchmarks_import_benchmarks() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        if ROOT / "tests/benchmarks" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            assert not [name for name in names if f"{name}.".startswith("benchmarks.")], path


def test_no_test_module_is_imported_by_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("tests."):
                assert f"{node.module}.".startswith("tests.support."), path
