"""The name of a command in its help and errors, and the form of its help."""

import argparse
import sys

__all__ = ["Help", "program"]


def program(module: str) -> str:
    """`slsnet COMMAND` if it was called so, else `python -m MODULE`."""
    called = sys.argv[0]
    return called if called.startswith("slsnet ") else f"python -m {module}"


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that shows the default of every option that has one."""

    def add_argument(self, action: argparse.Action) -> None:
        """Show an option, with its default if it has one."""
        says = action.help or ""
        # `in` would not do: 0 is a default to be shown, and equals False.
        hidden = action.default is None or action.default is False or action.default == []
        shown = not hidden and action.default is not argparse.SUPPRESS and action.nargs != 0
        if shown and action.help is not argparse.SUPPRESS and "default" not in says:
            action.help = f"{says} (default: %(default)s)".strip()
        super().add_argument(action)
