"""The name of a command in its help and errors, and the form of its help."""

import argparse
import sys

__all__ = ["Help", "program"]


def program(module: str) -> str:
    """`slsnet COMMAND` if it was called so, else `python -m MODULE`."""
    called = sys.argv[0]
    return called if called.startswith("slsnet ") else f"python -m {module}"


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
