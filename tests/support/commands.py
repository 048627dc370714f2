"""The help of all commands of the repository, as JSON: `python -m tests.support.commands`.

A process of its own, since some commands change the whole process when they are imported.
"""

import argparse
import contextlib
import json
import runpy
import sys
from collections.abc import Iterator
from typing import Any, NoReturn
from unittest.mock import patch

from tests.support import ROOT, python_files

_FOLDERS = [
    "benchmarks",
    "client/slsnet_client",
    "docker",
    "docs",
    "model",
    "photos",
    "server",
    "trt_build",
]


def modules() -> list[str]:
    """The modules that read a command line, as `python -m` names them."""
    found = []
    for folder in _FOLDERS:
        for path in python_files(folder):
            text = path.read_text(encoding="utf-8")
            if "ArgumentParser(" in text:
                parts = path.relative_to(ROOT).with_suffix("").parts
                name = ".".join(part for part in parts if part not in ("client", "__init__"))
                # `server` has its parser from its settings.
                name = "server.__main__" if name == "server.settings" else name
                found.append(("import locust" not in text, name))
    # Locust wants to be the first to be imported.
    return [name for _, name in sorted(found)]


class _ParserError(Exception):
    """Stops a command where it would read its arguments."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


def _stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
    raise _ParserError(parser)


def _parser(module: str) -> argparse.ArgumentParser:
    with (
        patch.object(argparse.ArgumentParser, "parse_args", _stop),
        patch.object(sys, "argv", [module]),
        contextlib.redirect_stdout(sys.stderr),
    ):
        try:
            runpy.run_module(module, run_name="__main__")
        except _ParserError as stopped:
            return stopped.parser
    raise AssertionError(f"{module} reads no command line")


def _each(parser: argparse.ArgumentParser) -> Iterator[dict[str, Any]]:
    """The command, and those below it."""
    arguments: list[dict[str, Any]] = []
    below: list[dict[str, Any]] = []
    parsers: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = [
                {"name": entry.dest, "summary": entry.help} for entry in action._choices_actions
            ]
            parsers = dict(action.choices)
        elif action.help is not argparse.SUPPRESS:
            name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            arguments.append({"name": name, "help": action.help})
    text = parser.format_help()
    yield {"program": parser.prog, "text": text, "arguments": arguments, "below": below}
    for entry in below:
        # Those of `slsnet` have parsers of their own, in their modules.
        if parsers[entry["name"]].add_help:
            yield from _each(parsers[entry["name"]])


if __name__ == "__main__":
    told = {module: list(_each(_parser(module))) for module in modules()}
    json.dump(told, sys.stdout)
