"""`slsnet`: one command for all that the project does.

Each subcommand is the `main` of a module, which `python -m` runs too. A module is imported only
when its subcommand runs, so that serving does not load what training needs.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from server import VERSION

__all__ = ["COMMANDS", "main"]


@dataclass(frozen=True)
class Command:
    """What `slsnet NAME` runs, and what `slsnet --help` says of it."""

    module: str
    """The module whose `main` it runs."""
    summary: str
    extra: str = ""
    """The requirements that it needs beside the package's own, such as `requirements-train.txt`."""


COMMANDS = {
    "serve": Command("server.__main__", "serve masks over HTTP"),
    "segment": Command("server.command.segment", "write masks of a few photos, without a server"),
    "bulk": Command("server.bulk.__main__", "segment a folder or list of any length"),
    "archive": Command("server.archive.__main__", "between DICOM archives and a server", "dicom"),
    "keys": Command("server.keys", "make API keys"),
    "static": Command("server.static.__main__", "write the page as files, to compute in browsers"),
    "train": Command("model.train", "train a network", "train"),
    "evaluate": Command("model.evaluate", "score a network on photos and masks"),
    "quality": Command("model.quality", "learn, and test, how far masks can be trusted", "train"),
    "fitness": Command("model.fitness", "learn, and test, what is no dermoscopic photo", "train"),
    "export": Command("model.export", "write trained weights as an ONNX file", "train"),
    "build-engine": Command("trt_build.__main__", "build a TensorRT engine", "gpu"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="slsnet",
        description="Lesion masks from dermoscopic photos.",
        epilog="slsnet COMMAND --help says more of each.",
    )
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    # The subcommand reads its own arguments.
    name = parser.parse_args(given[:1]).command
    try:
        run = _load(name, parser)
        # Each subcommand takes its name in help and errors from the command line's first word.
        sys.argv = [f"slsnet {name}", *given[1:]]
        return run() or 0
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


def _load(name: str, parser: argparse.ArgumentParser) -> Callable[[], int | None]:
    command = COMMANDS[name]
    try:
        run: Callable[[], int | None] = import_module(command.module).main
    except ModuleNotFoundError as error:
        if not command.extra or (error.name or "").partition(".")[0] in ("model", "trt_build"):
            raise
        parser.exit(
            1,
            f"slsnet {name} needs {error.name}: pip install -r requirements-{command.extra}.txt\n",
        )
    return run
