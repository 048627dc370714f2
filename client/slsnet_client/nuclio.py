"""CVAT's serverless form: a function of Nuclio, which CVAT calls with a frame.

`client/nuclio/function.yaml` deploys it. It asks the server at SLSNET_URL, with SLSNET_API_KEY if
that is set.
"""

import base64
import binascii
import json
import os
from typing import Any

import numpy as np

from slsnet_client.client import Client
from slsnet_client.errors import RequestRefused, SlsnetError

__all__ = ["handler", "init_context"]

_LABEL = "lesion"


def init_context(context: Any) -> None:
    """Make the client, once for each worker; Nuclio calls it."""
    # It outlasts a restart of the server, within the function's own 60 s.
    context.user_data.client = Client(
        os.environ["SLSNET_URL"],
        api_key=os.environ.get("SLSNET_API_KEY"),
        deadline_s=50,
        retries=20,
    )


def handler(context: Any, event: Any) -> Any:
    """Answer a request of CVAT: `{"image": base64, "threshold": 0.5}` → a list of masks."""
    answer: Any
    try:
        photo, threshold = _asked(event.body)
        answer = _shapes(context.user_data.client, photo, threshold)
        status = 200
    except (RequestRefused, ValueError) as error:
        answer, status = {"error": str(error)}, 422
    except SlsnetError as error:
        answer, status = {"error": str(error)}, 502
    return context.Response(
        body=json.dumps(answer), headers={}, content_type="application/json", status_code=status
    )


def _asked(body: Any) -> tuple[bytes, float]:
    if not isinstance(body, dict) or not isinstance(body.get("image"), str):
        raise ValueError("The request has no image.")
    try:
        return base64.b64decode(body["image"], validate=True), float(body.get("threshold", 0.5))
    except (binascii.Error, TypeError) as error:
        raise ValueError(f"The request is malformed: {error}.") from error


def _shapes(client: Client, photo: bytes, threshold: float) -> list[dict[str, Any]]:
    result = client.segment(photo, threshold=threshold)
    mask = result.mask
    if not mask.any():
        return []
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    left, top, right, bottom = (int(v) for v in (columns[0], rows[0], columns[-1], rows[-1]))
    inside = mask[top : bottom + 1, left : right + 1].astype(np.uint8)
    # What CVAT shows if its user wants polygons; they have neither holes nor parts.
    parts = client.segment_json(photo, "polygons", threshold=threshold)["mask"]["polygons"]
    outer: list[list[float]] = max((rings[0] for rings in parts), key=len, default=[])
    return [
        {
            "confidence": str(result.lesion.mean_probability),
            "label": _LABEL,
            "type": "mask",
            "points": [value for point in outer for value in point],
            # Each pixel of the box, row by row, then its edges, which belong to it.
            "mask": [*inside.reshape(-1).tolist(), left, top, right, bottom],
        }
    ]
