"""What tests share is in `tests/support`."""

import ast

from tests.support import ROOT

PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"slsnet_client"}

PRIVATE_IMPORTS = {
    # Clients have to come between the last accept and the end of the port.
    ("tests/server/test_drain.py", "server.process.worker", "_Server"),
}
"""Private names that tests import, each with its reason."""


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


def test_tests_import_no_private_names() -> None:
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            if node.module.split(".")[0] not in PACKAGES:
                continue
            for name in node.names:
                if name.name.startswith("_") and not name.name.startswith("__"):
                    found.add((path.relative_to(ROOT).as_posix(), node.module, name.name))
    assert found == PRIVATE_IMPORTS
