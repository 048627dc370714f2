"""What commands share: their name in help and errors, the form of help, and a type of option."""

import argparse
import sys

__all__ = ["Help", "fraction", "program"]


def program(module: str) -> str:
    """`slsnet COMMAND` if it was called so, else `python -m MODULE`."""
    called = sys.argv[0]
    return called if called.startswith("slsnet ") else f"python -m {module}"


def fraction(text: str) -> float:
    """Read an option from 0 to 1, such as a threshold.

    Raises:
        argparse.ArgumentTypeError: it is a number outside.
        ValueError: it is no number.
    """
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and 1")
    return value


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that shows the default of every option that has one that says something."""

    def add_argument(self, action: argparse.Action) -> None:
        """Show an option, with its default if it has one."""
        says, default = action.help or "", action.default
        # `in` would not do for False: 0 is a default to be shown, and equals it.
        hidden = default is None or default is False or default in ("", [], ())
        shown = not hidden and default is not argparse.SUPPRESS and action.nargs != 0
        if shown and says is not argparse.SUPPRESS and "default" not in says:
            # As it is given: several values have spaces between them.
            given = default if isinstance(default, list | tuple) else [default]
            value = " ".join(str(item) for item in given).replace("%", "%%")
            action.help = f"{says} (default: {value})".strip()
        super().add_argument(action)
