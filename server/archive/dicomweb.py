"""An archive over HTTP: STOW-RS stores, QIDO-RS finds, WADO-RS fetches (PS3.18, 10).

Hand-written: `dicomweb-client` is synchronous, and what uses this is not.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.archive.failures import Failure
from server.archive.multipart import DICOM, encode, files
from server.archive.web import Web, refused

__all__ = ["Archive", "Instance"]

_NAME = "archive"

_JSON = "application/dicom+json"

# Objects of one page of a search.
_PAGE = 100

_SOP_CLASS, _SOP_INSTANCE = "00080016", "00080018"
_STUDY, _SERIES = "0020000D", "0020000E"
_STORED, _FAILED, _FAILURE_REASON = "00081199", "00081198", "00081197"

_DUPLICATE = 0x0111
# Of PS3.4, B.2.3: it is out of resources, or failed while it worked. Others are of the object.
_TEMPORARY = range(0xA700, 0xA800)
_PROCESSING_FAILURE = 0x0110


@dataclass(frozen=True)
class Instance:
    """An object that an archive holds."""

    sop_class: str
    study: str
    series: str
    uid: str


class Archive:
    """The DICOMweb service at `url`.

    Args:
        url: the base of its paths, such as `http://127.0.0.1:8042/dicom-web`.
        authorization: what the header of that name says; empty for none.
        timeout_s: seconds within which it has to say something.
    """

    def __init__(self, url: str, *, authorization: str = "", timeout_s: float = 60) -> None:
        keyed = {"Authorization": authorization} if authorization else {}
        self._web = Web(_NAME, url, headers=keyed, timeout_s=timeout_s)

    async def store(self, contents: Sequence[bytes]) -> None:
        """Store objects, all of them; those that it has are left as they are.

        Raises:
            Failure: it does not hold all of them. They may be stored again.
        """
        content_type, body = encode(contents)
        answer = await self._web.ask(
            "POST",
            "studies",
            headers={"Content-Type": content_type, "Accept": _JSON},
            content=body,
        )
        if answer.status // 100 != 2 and answer.status != 409:
            raise refused(_NAME, answer)
        stored, reasons = _told(answer.content)
        if not reasons and stored < len(contents):
            if answer.status in (202, 409):
                # Some or all are refused, and it does not say why.
                raise Failure("refused", f"The archive answers {answer.status}.", final=True)
            # A page to log in, or of a proxy, has status 200 as well.
            raise Failure(
                "wrong_address",
                f"The archive answers {answer.status} without a word of the objects: is this a"
                " DICOMweb service?",
            )
        failed = [reason for reason in reasons if reason != _DUPLICATE]
        if failed:
            codes = ", ".join(f"{reason:04X}" for reason in sorted(set(failed)))
            temporary = all(
                reason in _TEMPORARY or reason == _PROCESSING_FAILURE for reason in failed
            )
            raise Failure(
                "busy" if temporary else "refused",
                f"The archive refuses {len(failed)} of {len(contents)} objects, reason {codes}.",
                final=not temporary,
            )

    async def search(self, query: Mapping[str, str]) -> AsyncIterator[Instance]:
        """Yield the objects that match.

        Args:
            query: attributes' keywords and what they have to be, such as `StudyDate`.

        Raises:
            Failure: the archive cannot be asked.
        """
        offset, before = 0, list[Any]()
        while True:
            page = await self._page({**query, "limit": str(_PAGE), "offset": str(offset)})
            # An archive may give less than a page at a time; one that knows none gives all again.
            if not page or page == before:
                return
            for found in page:
                values = [
                    _value(found, tag) for tag in (_SOP_CLASS, _STUDY, _SERIES, _SOP_INSTANCE)
                ]
                if all(isinstance(value, str) and value for value in values):
                    yield Instance(*values)
            offset += len(page)
            before = page

    async def _page(self, query: Mapping[str, str]) -> list[Any]:
        answer = await self._web.ask("GET", "instances", query=query, headers={"Accept": _JSON})
        if answer.status == 204:
            return []
        if answer.status != 200:
            raise refused(_NAME, answer)
        try:
            page = json.loads(answer.content)
        except ValueError:
            page = None
        if not isinstance(page, list):
            raise Failure("wrong_address", "The archive's answer to a search is no list.")
        return page

    async def retrieve(self, instance: Instance) -> bytes:
        """The object, as it is stored.

        Raises:
            Failure: it cannot be had.
        """
        path = f"studies/{instance.study}/series/{instance.series}/instances/{instance.uid}"
        accepted = f'multipart/related; type="{DICOM}"; transfer-syntax=*'
        answer = await self._web.ask("GET", path, headers={"Accept": accepted})
        if answer.status != 200:
            raise refused(_NAME, answer)
        try:
            (content,) = files(answer.headers.get("Content-Type", ""), answer.content)
        except ValueError as error:
            raise Failure(
                "failed", "The archive's answer is not one DICOM object.", final=True
            ) from error
        return content

    async def aclose(self) -> None:
        """Close the connections."""
        await self._web.aclose()


def _told(content: bytes) -> tuple[int, list[int]]:
    """How many objects are stored, and why others are not, as the answer says."""
    try:
        document = json.loads(content)
        (store,) = document if isinstance(document, list) else [document]
        stored, failed = (store.get(tag, {}).get("Value", []) for tag in (_STORED, _FAILED))
        return len(stored), [int(_value(each, _FAILURE_REASON) or 0) for each in failed]
    except (ValueError, TypeError, AttributeError):
        return 0, []


def _value(found: Any, tag: str) -> Any:
    """The first value of an attribute; empty without one."""
    try:
        return found[tag]["Value"][0]
    except (KeyError, IndexError, TypeError):
        return ""
