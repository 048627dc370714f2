"""TorchServe's handler: a batch of bodies in, a list of masks out."""

from typing import Any

import numpy as np
from handler import decode, encode, load

network = None


def handle(data: list[dict] | None, context: Any) -> list[bytes] | None:
    """Load the network in a worker's first call, then handle a batch in each call."""
    global network
    if network is None:
        network = load()
    if data is None:
        return None
    places, decoded = [], []
    masks: list = [b""] * len(data)
    for place, request in enumerate(data):
        try:
            decoded.append(decode(bytes(request.get("body") or request.get("data"))))
            places.append(place)
        except OSError:
            context.set_response_status(422, "not an image", idx=place)
    if decoded:
        probabilities = network(np.stack([pixels for pixels, _ in decoded]))
        for place, probability, (_, size) in zip(places, probabilities, decoded, strict=True):
            masks[place] = encode(probability, size)
            context.set_response_content_type(place, "image/png")
    return masks
