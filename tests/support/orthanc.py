"""A real Orthanc with its DICOMweb plug-in (Debian's packages orthanc and orthanc-dicomweb)."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.launch import free_port
from tests.support.waiting import until

__all__ = ["Orthanc"]

_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
_PROGRAM = shutil.which("Orthanc", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


class Orthanc:
    """One archive in a folder, which may be killed and started again.

    Args:
        folder: holds what it stores.
        sends_to: port of this machine where the application entity SLSNET takes objects.
    """

    title = "ORTHANC"

    def __init__(self, folder: Path, sends_to: int) -> None:
        if _PROGRAM is None or not _PLUGIN.exists():
            pytest.skip("needs Orthanc and its DICOMweb plug-in (orthanc, orthanc-dicomweb)")
        folder.mkdir(exist_ok=True)
        self.http_port, self.dicom_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.http_port}"
        self._file = folder / "orthanc.json"
        config = {
            "StorageDirectory": str(folder),
            "IndexDirectory": str(folder),
            "Plugins": [str(_PLUGIN)],
            "HttpPort": self.http_port,
            "DicomPort": self.dicom_port,
            "DicomAet": self.title,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            "DicomModalities": {"slsnet": ["SLSNET", "127.0.0.1", sends_to]},
        }
        self._file.write_text(json.dumps(config))

    @contextlib.contextmanager
    def running(self) -> Iterator["subprocess.Popen[bytes]"]:
        """The process, ready; killed in the end."""
        assert _PROGRAM is not None
        with subprocess.Popen(
            [_PROGRAM, str(self._file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:

            def is_ready() -> bool:
                assert process.poll() is None
                with contextlib.suppress(httpx.HTTPError):
                    return httpx.get(f"{self.url}/dicom-web/studies").status_code == 200
                return False

            try:
                until(is_ready)
                yield process
            finally:
                process.kill()

    def add(self, content: bytes) -> str:
        """Store an object; return Orthanc's own name for it."""
        answer = httpx.post(f"{self.url}/instances", content=content).raise_for_status()
        return str(answer.json()["ID"])

    def send(self, names: list[str]) -> dict[str, Any]:
        """Have it send objects to SLSNET by C-STORE; return what it says."""
        answer = httpx.post(f"{self.url}/modalities/slsnet/store", json=names)
        report: dict[str, Any] = answer.raise_for_status().json()
        return report

    def held(self) -> list[bytes]:
        """All objects that it holds."""
        names = httpx.get(f"{self.url}/instances").raise_for_status().json()
        return [httpx.get(f"{self.url}/instances/{name}/file").content for name in names]
