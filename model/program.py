"""What a command calls itself in its help and errors."""

import sys


def program(module: str) -> str:
    """`slsnet COMMAND` where it was called so, else `python -m MODULE`."""
    called = sys.argv[0]
    return called if called.startswith("slsnet ") else f"python -m {module}"
