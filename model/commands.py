"""How a program of several commands runs the one that it was asked for."""

import argparse
from collections.abc import Sequence

__all__ = ["run_command"]


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    requirements: str = "requirements-train.txt",
) -> None:
    """Run a command, and print what it says.

    Args:
        parser: its default `run` takes the options, and gives what is to be printed.
        arguments: None is those of the process.
        requirements: the list of packages that the commands need.

    Raises:
        SystemExit: with 1 and the reason on stderr, if the command fails or a package is missing;
            with 2 if the arguments are wrong.
    """
    options = parser.parse_args(arguments)
    try:
        print(options.run(options))
    except ModuleNotFoundError as error:
        parser.exit(1, f"{parser.prog}: error: {error}: pip install -r {requirements}\n")
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
