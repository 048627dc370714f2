"""What `docker/test.sh` asks of a server in a container; runs in the image itself.

python client.py segment URL PHOTO TRUTH    its mask against the true one
python client.py load URL PHOTO             send until it is gone; each answer counted
python client.py bill                       the bill of materials against what is there
"""

import http.client
import importlib.util
import io
import json
import sys
import threading
import urllib.request
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

_JPEG = {"Content-Type": "image/jpeg"}
_CLIENTS = 6
_ANSWERS_BEFORE_STOP = 30
_LEAST_JACCARD = 0.7
_PATIENCE_S = 60


def segment(url: str, photo: str, truth: str) -> None:
    """Exit with 1 unless the mask has the photo's size and fits its lesion."""
    request = urllib.request.Request(f"{url}/segment", Path(photo).read_bytes(), _JPEG)
    with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:
        mask = np.asarray(Image.open(io.BytesIO(answer.read())).convert("L")) > 0
    true = np.asarray(Image.open(truth).convert("L")) > 0
    if mask.shape != true.shape:
        sys.exit(f"the mask is {mask.shape}, the photo {true.shape}")
    jaccard = (mask & true).sum() / (mask | true).sum()
    with urllib.request.urlopen(f"{url}/model", timeout=_PATIENCE_S) as answer:
        backend = json.load(answer)["backend"]
    print(f"{Path(photo).name}: Jaccard {jaccard:.3f}, by {backend['name']}")
    if jaccard < _LEAST_JACCARD:
        sys.exit(f"below {_LEAST_JACCARD}")


class _Load:
    """Clients that send until the port is closed, and what became of what they sent."""

    def __init__(self, url: str, photo: bytes) -> None:
        self._address = urlsplit(url).netloc
        self._photo = photo
        self._lock = threading.Lock()
        self._answered = 0
        self._lost: list[str] = []

    def run(self) -> None:
        clients = [threading.Thread(target=self._client) for _ in range(_CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        print(f"{self._answered} answered, {len(self._lost)} lost", flush=True)
        if self._lost:
            sys.exit("\n".join(self._lost))
        if self._answered < _ANSWERS_BEFORE_STOP:
            sys.exit("it was gone before it was under load")

    def _client(self) -> None:
        while True:
            connection = http.client.HTTPConnection(self._address, timeout=_PATIENCE_S)
            try:
                connection.connect()
            except ConnectionRefusedError:
                return
            except OSError as error:
                self._lost.append(repr(error))
                return
            try:
                while True:
                    connection.request("POST", "/segment", self._photo, _JPEG)
                    answer = connection.getresponse()
                    body = answer.read()
                    if answer.status != 200:
                        self._lost.append(f"{answer.status} {body!r}")
                        return
                    self._count()
                    if answer.will_close:
                        break
            except (OSError, http.client.HTTPException) as error:
                self._lost.append(repr(error))
                return
            finally:
                connection.close()

    def _count(self) -> None:
        with self._lock:
            self._answered += 1
            if self._answered == _ANSWERS_BEFORE_STOP:
                print("under load", flush=True)


def load(url: str, photo: str) -> None:
    """Exit with 1 if one request is not answered with 200, or if they are too few to tell."""
    _Load(url, Path(photo).read_bytes()).run()


def bill() -> None:
    """Exit with 1 unless the bill names every package, the network and Debian's part."""
    components = json.loads(Path("/opt/slsnet/sbom.cdx.json").read_text())["components"]
    named = {(item["name"].lower(), item.get("version")) for item in components}
    here = {(item.metadata["Name"].lower(), item.version) for item in distributions()}
    if missing := here - named:
        sys.exit(f"not in the bill of materials: {sorted(missing)}")
    debian = sum(item.get("purl", "").startswith("pkg:deb/") for item in components)
    networks = sum(item["type"] == "machine-learning-model" for item in components)
    if not debian or networks != 1:
        sys.exit(f"{debian} Debian packages and {networks} networks in the bill of materials")
    if heavy := [name for name in ("torch", "onnx", "pip") if importlib.util.find_spec(name)]:
        sys.exit(f"in the image, which should not be: {heavy}")
    print(f"bill of materials: {len(here)} Python packages, {debian} Debian packages, the network")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["segment", url, photo, truth]:
            segment(url, photo, truth)
        case ["load", url, photo]:
            load(url, photo)
        case ["bill"]:
            bill()
        case _:
            sys.exit(__doc__)
