"""Client of SLSNet Server: photos of skin lesions in, masks out."""

from slsnet_client.client import AsyncClient, Client, Outcome
from slsnet_client.errors import (
    DeadlinePassed,
    KeyRefused,
    RequestRefused,
    ServerBusy,
    ServerFailed,
    SlsnetError,
    Unreachable,
)
from slsnet_client.photos import Photo, overlay
from slsnet_client.result import Lesion, Network, Result
from slsnet_client.stream import Streamed
from slsnet_client.version import VERSION

__all__ = [
    "VERSION",
    "AsyncClient",
    "Client",
    "DeadlinePassed",
    "KeyRefused",
    "Lesion",
    "Network",
    "Outcome",
    "Photo",
    "RequestRefused",
    "Result",
    "ServerBusy",
    "ServerFailed",
    "SlsnetError",
    "Streamed",
    "Unreachable",
    "overlay",
]
