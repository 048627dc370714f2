"""The files of the site: the page, the network and its runtime, each by its path below the root."""

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from server.backends.model_file import read_detector, read_model, read_quality
from server.http.device import FOLDER, LISTING
from server.http.pages import page_for_device
from server.static.network import metadata, parity, small, trial
from server.static.runtime import RUNTIMES

__all__ = ["device_files", "page_files"]

_NETWORK, _TRIAL = "network.onnx", "trial.bin"


def device_files(
    model: Path, runtime: Mapping[str, bytes], *, exact: bool = False
) -> dict[str, bytes]:
    """The network and its runtime, in a folder that is named by their digest, and their listing.

    Args:
        model: the ONNX file; what lies beside it tells of masks and pictures.
        runtime: as `runtime_files` gives it.
        exact: keep the weights in float32, twice the size.

    Raises:
        BackendError: the file is damaged, or what lies beside it is, or belongs to other weights.
        ValueError: its masks are others with weights in float16.
    """
    network = read_model(model).content
    served = network if exact else small(network)
    if failures := parity(network, served).failures():
        raise ValueError(f"weights in float16 change the masks: {'; '.join(failures)}")
    card = metadata(network)
    tables = {"quality": read_quality(model, card), "fitness": read_detector(model, card)}
    told = {f"{name}.json": table.document() for name, table in tables.items() if table}
    held = {**runtime, **told, _NETWORK: served, _TRIAL: trial(network)}
    digest = hashlib.sha256()
    for name in sorted(held):
        digest.update(name.encode() + hashlib.sha256(held[name]).digest())
    folder = digest.hexdigest()[:16]
    loaded = [_NETWORK, _TRIAL, *RUNTIMES["wasm"]]
    listing = {
        "folder": folder,
        "network": {key: card.get(key, "unknown") for key in ("name", "version", "weights_sha256")},
        "names": {
            "network": _NETWORK,
            "trial": _TRIAL,
            **{Path(name).stem: name for name in told},
            **{way: names[0] for way, names in RUNTIMES.items()},
        },
        "runtimes": RUNTIMES,
        "megabytes": round(sum(len(held[name]) for name in loaded) / 1e6),
    }
    # As web servers look for it; weights would hardly be smaller.
    held |= {f"{name}.gz": _compressed(data) for name, data in runtime.items()}
    found = {f"{FOLDER}/{folder}/{name}": data for name, data in held.items()}
    return {**found, f"{FOLDER}/{LISTING}": json.dumps(listing, indent=1).encode()}


def _compressed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def page_files() -> dict[str, bytes]:
    """The page's own files, as they are where no server of this project stands behind it."""
    page = files("server") / "page"
    found = {f"page/{name}": file.read_bytes() for name, file in _walk(page, "")}
    found["index.html"] = page_for_device(found.pop("page/index.html"), has_server=False)
    # It has to lie above all that it keeps.
    found["sw.js"] = found.pop("page/sw.js")
    return found


def _walk(folder: Traversable, path: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{path}{entry.name}/")
        else:
            yield f"{path}{entry.name}", entry
