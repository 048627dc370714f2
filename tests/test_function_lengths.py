"""A function fits on a screen."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, python_files

_MOST_LINES = 60
_ROOMS = (
    *("common", "photos", "engines", "model", "trt_build", "server"),
    *("benchmarks", "client", "docker"),
)
_FILES = [path for room in _ROOMS for path in python_files(room)]


def _lengths(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", _FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    assert not [(name, lines) for name, lines in _lengths(path) if lines > _MOST_LINES]
