"""Every command's help shows its defaults; none writes over the repository's files unasked."""

import argparse
import importlib
import shutil
import subprocess
import sys

import pytest

from server.settings import Settings
from tests.support import ROOT, python_files

PARTS = ("server", "model", "engines", "trt_build", "benchmarks", "docs")
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for part in PARTS
    for path in python_files(part)
    if path != ROOT / "benchmarks/load.py"
    # It changes ssl and sockets of the process that imports it.
    and "argparse.ArgumentParser(" in (text := path.read_text())
    and "def main(" in text
)


class Parsed(BaseException):
    """A command has made its parser."""


@pytest.fixture(params=[*COMMANDS, "server.__main__"])
def parser(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> argparse.ArgumentParser:
    try:
        module = importlib.import_module(request.param)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    made: list[argparse.ArgumentParser] = []

    def parse(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        made.append(self)
        raise Parsed

    for method in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, parse)
    monkeypatch.setattr(sys, "argv", [request.param])
    with pytest.raises(Parsed):
        module.main()
    return made[0]


def test_defaults_are_shown(parser: argparse.ArgumentParser) -> None:
    parser.format_help()
    for action in parser._actions:
        if action.nargs == 0 or isinstance(action, argparse._HelpAction):
            continue
        default = action.default
        if default == argparse.SUPPRESS:
            # The server's settings have theirs in words alone.
            default = Settings.model_fields[action.dest].default
        if default not in (None, "", [], (), {}, frozenset()):
            assert "default" in (action.help or ""), action.dest


def test_defaults_of_the_load_test_are_shown() -> None:
    command = [sys.executable, "-m", "benchmarks.load", "--help"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "ModuleNotFoundError" in ran.stderr:
        pytest.skip("needs requirements-bench.txt")
    assert ran.stdout.count("default") >= 5


def test_nothing_of_the_repository_is_written_over(parser: argparse.ArgumentParser) -> None:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs git, and a clone")
    for action in parser._actions:
        if action.dest in ("output", "out", "report", "gallery") and action.default is not None:
            listed = ["git", "ls-files", str(action.default)]
            found = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True)
            assert str(action.default) not in found.stdout.splitlines(), action.dest
