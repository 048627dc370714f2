r"""CVAT's auto-annotation: the server's masks as shapes that annotators correct.

    pip install "./client[cvat]" cvat-cli
    cvat-cli --server-host https://cvat.example task auto-annotate 137 \
        --function-module slsnet_client.cvat -p url=str:http://127.0.0.1:8000

The task needs a label called `lesion`, or as `-p label=str:NAME` says. `cvat-cli function
create-native` and `run-agent` take the same module and parameters, for annotators in the browser.
"""

import os
from typing import Literal

import numpy as np
from PIL import Image

try:
    import cvat_sdk.auto_annotation as cvataa
    import cvat_sdk.models as models
    from cvat_sdk.masks import encode_mask
except ImportError as missing:
    raise ImportError(
        f"{missing}: CVAT's functions are an extra: pip install 'slsnet-client[cvat]'"
    ) from missing

from slsnet_client.client import Client

__all__ = ["Lesions", "create"]


class Lesions:
    """A detection function of `cvat_sdk`."""

    def __init__(
        self,
        client: Client,
        *,
        label: str,
        shape: Literal["mask", "polygon"],
        threshold: float,
        clean: bool,
    ) -> None:
        self._client = client
        self._shape = shape
        self._threshold = threshold
        self._clean = clean
        self._spec = cvataa.DetectionFunctionSpec(labels=[cvataa.label_spec(label, 0, type=shape)])

    @property
    def spec(self) -> cvataa.DetectionFunctionSpec:
        """The labels that it gives."""
        return self._spec

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def detect(
        self, context: cvataa.DetectionFunctionContext, image: Image.Image
    ) -> list[models.LabeledShapeRequest]:
        """The lesion in a frame: one mask, or a polygon for each separate part.

        A threshold that CVAT asks for takes the place of the function's own.

        Raises:
            SlsnetError: the server refused or failed.
        """
        asked = context.conf_threshold
        threshold = self._threshold if asked is None else asked
        if self._shape == "polygon":
            answer = self._client.segment_json(
                image, "polygons", threshold=threshold, clean=self._clean, bulk=True
            )
            # CVAT's polygons have no holes.
            return [
                cvataa.shape(
                    0, type="polygon", points=[value for point in outer for value in point]
                )
                for outer, *_ in answer["mask"]["polygons"]
            ]
        mask = self._client.segment(image, threshold=threshold, clean=self._clean, bulk=True).mask
        if not mask.any():
            return []
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        return [cvataa.shape(0, type="mask", points=encode_mask(mask, box))]


def create(
    url: str,
    label: str = "lesion",
    shape: str = "mask",
    threshold: float = 0.5,
    clean: bool = False,
) -> Lesions:
    """Make the function; `cvat-cli` calls it with what `-p` says.

    Args:
        url: of SLSNet Server. Its API key, if it has any, is in SLSNET_API_KEY.
        label: name of the label in the task.
        shape: `mask` or `polygon`.
        threshold, clean: as for `Client.segment`.

    Raises:
        ValueError: there is no such shape.
    """
    if shape not in ("mask", "polygon"):
        raise ValueError(f"A shape is mask or polygon, not {shape!r}.")
    # One photo that fails ends the annotation of all: so it outlasts a restart of the server.
    key = os.environ.get("SLSNET_API_KEY")
    client = Client(url, api_key=key, deadline_s=120, retries=20)
    return Lesions(
        client,
        label=label,
        shape="mask" if shape == "mask" else "polygon",
        threshold=threshold,
        clean=clean,
    )
