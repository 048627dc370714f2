"""The networks that SLSNet is compared with: one file each, one way to build them.

    network = build("unet", width=64)

A network takes images in [0, 1] and gives lesion logits at their size, as SLSNet's generator does.
So it is trained, scored, exported and served by the same commands. The head of its file names the
paper and the licence, and says what is faithful and what is substituted.

Importing this package imports no torch; a network's libraries are imported when it is built.
"""

import inspect
import math
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from model.names import ZOO, Option

if TYPE_CHECKING:
    from model.zoo.network import ZooNetwork

__all__ = ["build", "check", "networks"]


def networks() -> tuple[str, ...]:
    """The names that `build` knows."""
    return tuple(ZOO)


def build(name: str, **options: Option) -> "ZooNetwork":
    """A network with fresh weights.

    Args:
        name: one of `networks()`.
        options: what its constructor takes, such as a width.

    Raises:
        ValueError: there is no such network or option, an option has a value of another kind or
            below 1, or a library that the network needs is missing.
    """
    network = check(name, **options)(**options)
    network.name, network.options = name, options
    return network


# What an option may be, by the kind of its default. True is an int to Python, and no number here.
_KINDS: dict[type, tuple[Callable[[Option], bool], str]] = {
    bool: (lambda value: type(value) is bool, "true or false"),
    int: (lambda value: type(value) is int and value >= 1, "a whole number from 1"),
    float: (lambda value: type(value) in (int, float) and math.isfinite(float(value)), "a number"),
}


def check(name: str, **options: Option) -> "type[ZooNetwork]":
    """The class of a network; what `build` refuses is refused, at no cost.

    Raises:
        ValueError: as for `build`.
    """
    if name not in ZOO:
        raise ValueError(f"no network {name!r}; there are: slsnet, {', '.join(ZOO)}")
    module, _, class_name = ZOO[name].partition(":")
    try:
        found: type[ZooNetwork] = getattr(import_module(module), class_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name}: {error}: pip install -r requirements-zoo.txt") from error
    known = inspect.signature(found).parameters
    if unknown := [option for option in options if option not in known]:
        said = f"it takes {', '.join(known)}" if known else "it takes none"
        raise ValueError(f"{name} has no option {unknown[0]!r}; {said}")
    for option, value in options.items():
        kind = type(known[option].default)
        fits, wanted = _KINDS[kind]
        if not fits(value):
            raise ValueError(f"{name}: {option} must be {wanted}, not {value!r}")
    return found
