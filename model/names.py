"""The names of networks, as files of weights and graphs hold them. It imports no torch."""

import argparse
from collections.abc import Mapping
from pathlib import Path

ZOO = {
    "lraspp": "model.zoo.lraspp:LRASPP",
    "lite0-unet": "model.zoo.lite0_unet:Lite0UNet",
    "enet": "model.zoo.enet:ENet",
    "unet": "model.zoo.unet:UNet",
    "segnet": "model.zoo.segnet:SegNet",
    "fcn8s": "model.zoo.fcn8s:FCN8s",
    "egeunet": "model.zoo.egeunet:EGEUNet",
    "segformer-b0": "model.zoo.segformer:SegFormer",
    "slsdeep": "model.zoo.slsdeep:SLSDeep",
    "segan": "model.zoo.segan:SegAN",
    "frcn": "model.zoo.frcn:FrCN",
    "gan-fcn": "model.zoo.gan_fcn:GANFCN",
}
"""The networks that SLSNet is compared with, and their classes (`model.zoo`)."""

SERVED = ("slsnet", *ZOO)
"""The networks that can be exported and served."""

Option = bool | int | float | str
"""What the constructor of a network of the zoo takes, as YAML and JSON store it."""


class OtherNetworkError(ValueError):
    """A file holds another network than the one that was asked for."""


def name_of(metadata: Mapping[str, str]) -> str:
    """The name in a file's metadata. Files of SLSNet have none."""
    return metadata.get("network", "slsnet")


def check_name(path: Path, said: str, asked: str | None) -> None:
    """Compare the network that a file says it holds with the one that was asked for.

    Raises:
        OtherNetworkError: they differ; the message names both.
    """
    if asked not in (None, said):
        raise OtherNetworkError(f"{path} holds the network {said}, not {asked}")


def add_network_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--network`, which takes a name of `SERVED`; `what` ends its help."""
    names = ", ".join(SERVED)
    parser.add_argument("--network", choices=SERVED, metavar="NAME", help=f"{what}: one of {names}")
