"""A photo as DICOM → results as DICOM, by SLSNet Server."""

import json
from io import BytesIO

import pydicom
from pydicom.errors import InvalidDicomError

from server.archive.failures import Failure
from server.archive.journal import Result
from server.archive.multipart import DICOM, files
from server.archive.web import Answer, Web, refused

__all__ = ["SegmentingServer"]

_NAME = "server"


class SegmentingServer:
    """Asks the server at `url`.

    Args:
        url: such as `http://127.0.0.1:8000`.
        objects: those to be made of a photo, as the server knows them, with commas between.
        threshold: probability above which a pixel is lesion; None leaves it to the server.
        clean: whether to leave only the largest region.
        api_key: if the server has keys.
        timeout_s: seconds for an answer.
    """

    def __init__(
        self,
        url: str,
        *,
        objects: str,
        threshold: float | None = None,
        clean: bool = False,
        api_key: str | None = None,
        timeout_s: float = 60,
    ) -> None:
        keyed = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._web = Web(_NAME, url, headers=keyed, timeout_s=timeout_s)
        self._query = {"format": "dicom", "objects": objects, "clean": str(clean).lower()}
        if threshold is not None:
            self._query["threshold"] = f"{threshold:g}"

    async def segment(self, photo: bytes) -> list[Result]:
        """The results for a photo.

        Raises:
            Failure: there are none.
        """
        answer = await self._web.ask(
            "POST",
            "segment",
            query=self._query,
            headers={"Content-Type": DICOM, "Priority": "bulk"},
            content=photo,
        )
        if answer.status != 200:
            raise refused(_NAME, answer, _said(answer))
        try:
            found = files(answer.headers.get("Content-Type", ""), answer.content)
            results = [Result(_uid(content), content) for content in found]
        except (ValueError, InvalidDicomError, AttributeError) as error:
            raise Failure(
                "wrong_address",
                f"The server's answer is no DICOM, is this an SLSNet Server? {error}",
            ) from error
        if not results:
            raise Failure("failed", "The server's answer holds no object.")
        return results

    async def aclose(self) -> None:
        """Close the connections."""
        await self._web.aclose()


def _uid(content: bytes) -> str:
    return str(pydicom.dcmread(BytesIO(content), stop_before_pixels=True).SOPInstanceUID)


def _said(answer: Answer) -> str:
    """What the server's problem document says; it has no patient data."""
    try:
        return str(json.loads(answer.content)["detail"]).rstrip(".")
    except (ValueError, KeyError, TypeError):
        return ""
