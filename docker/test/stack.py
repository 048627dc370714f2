"""What `docker/test/stack.sh` asks of Prometheus and Grafana; needs PyYAML.

python docker/test/stack.py scraped PROMETHEUS       the server is found, and answers scrapes
python docker/test/stack.py rules PROMETHEUS         every alert is loaded and can be evaluated
python docker/test/stack.py dashboard PROMETHEUS SERVER PHOTO
                                                     every query of the dashboard has an answer,
                                                     while clients do all that it shows
python docker/test/stack.py alert PROMETHEUS NAME STATE…
                                                     an alert is in one of these states
python docker/test/stack.py starts PROMETHEUS NUMBER one server was seen to start again so often
python docker/test/stack.py annotation PROMETHEUS NAME
                                                     what the dashboard marks so has happened
python docker/test/stack.py grafana GRAFANA          the dashboard is there, and its source answers
python docker/test/stack.py screenshot PROMETHEUS FILE
                                                     two of the dashboard's queries on its own page
"""

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent.parent
_PATIENCE_S = 240
_JPEG = {"Content-Type": "image/jpeg"}
_CLIENTS = 40
"""More than the tested server's queue holds, so that some are refused."""
_UNTRIED = re.compile("slsnet_archive_|slsnet_stream_frames")
"""What these clients do not do."""
_PICTURED = ("Requests by status", "Where the time goes")


def _dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((FOLDER / "grafana/dashboards/slsnet.json").read_text())
    return read


def dashboard_queries(range_: str, instance: str = ".*") -> Iterator[tuple[str, str]]:
    """Title of the panel and PromQL of each query, with the dashboard's variables filled in."""
    for panel in _dashboard()["panels"]:
        for target in panel.get("targets", []):
            expr = target["expr"]
            for name, value in (("$__rate_interval", range_), ("$instance", instance)):
                expr = expr.replace(name, value)
            yield panel["title"], expr


def annotations() -> dict[str, str]:
    """PromQL of what is marked on every panel, by name."""
    listed = _dashboard()["annotations"]["list"]
    return {each["name"]: each["expr"] for each in listed if "expr" in each}


def variables() -> Iterator[tuple[str, str]]:
    """Selector and label of each variable that Prometheus is asked for."""
    for variable in _dashboard()["templating"]["list"]:
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert asked, f"{variable['name']} asks for more than a label"
        yield asked[1], asked[2]


def query(prometheus: str, path: str, **parameters: str) -> Any:
    """`data` of an answer of Prometheus' API."""
    url = f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)["data"]


def wait_for(what: str, happens: Callable[[], bool]) -> None:
    """Exit with 1 unless it happens in time."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if happens():
                return
        time.sleep(0.5)
    sys.exit(f"not within {_PATIENCE_S} s: {what}")


def scraped(prometheus: str) -> None:
    """Wait until the server is up for Prometheus, and ready by its own account."""

    def is_up() -> bool:
        results = query(prometheus, "query", query='up{job="slsnet"} * slsnet_ready')["result"]
        return [result["value"][1] for result in results] == ["1"]

    wait_for("up of the job slsnet is 1", is_up)
    (target,) = query(prometheus, "targets")["activeTargets"]
    print(f"scrape of {target['labels']['job']}: {target['health']}")


def rules(prometheus: str) -> None:
    """Wait until every alert has been evaluated, without an error."""
    groups = yaml.safe_load((FOLDER / "prometheus/alerts.yml").read_text())["groups"]
    wanted = {rule["alert"] for group in groups for rule in group["rules"]}

    def healthy() -> bool:
        loaded = query(prometheus, "rules")["groups"]
        return wanted == {
            rule["name"] for group in loaded for rule in group["rules"] if rule["health"] == "ok"
        }

    wait_for("all alerts are healthy", healthy)
    print(f"{len(wanted)} alerts evaluated without an error")


def alert(prometheus: str, name: str, states: Sequence[str]) -> None:
    """Wait until it is in one of `states` (pending, firing)."""

    def raised() -> bool:
        return any(
            item["labels"]["alertname"] == name and item["state"] in states
            for item in query(prometheus, "alerts")["alerts"]
        )

    started = time.monotonic()
    wait_for(f"{name} is {' or '.join(states)}", raised)
    print(f"{name} is {' or '.join(states)} after {time.monotonic() - started:.0f} s")


def starts(prometheus: str, number: str) -> None:
    """Wait until the server has been scraped after that many starts, as the one that it was."""
    expr = 'changes(process_start_time_seconds{job="slsnet"}[30m])'

    def counted() -> bool:
        results = query(prometheus, "query", query=expr)["result"]
        return [result["value"][1] for result in results] == [number]

    wait_for(f"{expr} is {number}", counted)


def annotation(prometheus: str, name: str) -> None:
    """Wait until the query of that name is answered."""
    expr = annotations()[name]
    wait_for(f"{name}, {expr}", lambda: bool(query(prometheus, "query", query=expr)["result"]))
    print(f"the dashboard marks {name}")


def grafana(url: str) -> None:
    """Wait until the dashboard is provisioned and Prometheus answers through its data source."""

    def shows() -> bool:
        with urllib.request.urlopen(f"{url}/api/dashboards/uid/slsnet", timeout=30) as answer:
            panels = json.load(answer)["dashboard"]["panels"]
        source = f"{url}/api/datasources/proxy/uid/prometheus"
        return bool(panels and query(source, "query", query='up{job="slsnet"}')["result"])

    wait_for("Grafana has the dashboard and its source answers", shows)
    print("Grafana has the dashboard, and its source answers")


class Clients:
    """Do all that the dashboard shows: photos, bulk, mistakes, deadlines, hang-ups, overload."""

    def __init__(self, server: str, photo: bytes) -> None:
        self._address = urllib.parse.urlsplit(server).netloc
        self._photo = photo
        self._stop = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        works = [self._segment] * _CLIENTS
        works += [self._impatient, self._hang_up, self._mistake, self._bulk, self._slow_head]
        threads = [threading.Thread(target=self._repeat, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _repeat(self, work: Callable[[], None]) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                work()
            self._stop.wait(0.1)

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=60)
        try:
            connection.request("POST", path, body, headers)
            connection.getresponse().read()
        finally:
            connection.close()

    def _segment(self) -> None:
        # In waves: while the queue is full no bulk gets in.
        if time.monotonic() % 20 < 10:
            self._post("/segment", self._photo, _JPEG)

    def _impatient(self) -> None:
        self._post("/segment", self._photo, {**_JPEG, "X-Request-Timeout-Ms": "30"})

    def _mistake(self) -> None:
        self._post("/segment", self._photo[:1000], _JPEG)

    def _hang_up(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=60)
        connection.request("POST", "/segment", self._photo, _JPEG)
        time.sleep(0.05)
        connection.close()

    def _bulk(self) -> None:
        part = b'Content-Disposition: form-data; name="photo"; filename="photo.jpg"\r\n\r\n'
        body = b"".join(b"--x\r\n" + part + self._photo + b"\r\n" for _ in range(2)) + b"--x--\r\n"
        self._post("/segment/batch", body, {"Content-Type": "multipart/form-data; boundary=x"})

    def _slow_head(self) -> None:
        host, _, port = self._address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(b"POST /segment HTTP/1.1\r\n")
            connection.recv(1000)


def dashboard(prometheus: str, server: str, photo: str) -> None:
    """Exit with 1 unless every query gets an answer."""
    queries = [each for each in dashboard_queries("1m") if not _UNTRIED.search(each[1])]
    missing = dict(enumerate(queries))

    def all_answered() -> bool:
        for number, (_, expr) in list(missing.items()):
            result = query(prometheus, "query", query=expr)["result"]
            if any(sample["value"][1] != "NaN" for sample in result):
                del missing[number]
        return not missing

    started = time.monotonic()
    with Clients(server, Path(photo).read_bytes()).running():
        try:
            wait_for("every query of the dashboard is answered", all_answered)
        except SystemExit:
            for title, expr in missing.values():
                print(f"{title}: {expr}")
            raise
        # Then once more all of them at one moment.
        counts = [len(query(prometheus, "query", query=expr)["result"]) for _, expr in queries]
    for selector, label in variables():
        if not query(prometheus, f"label/{label}/values", **{"match[]": selector}):
            sys.exit(f"no {label} of {selector} to choose from")
    if not all(counts):
        sys.exit("a query that had an answer has none any more")
    print(
        f"{len(queries)} queries of the dashboard answered under load, {sum(counts)} series,"
        f" {time.monotonic() - started:.0f} s after it began"
    )


def screenshot(prometheus: str, path: str) -> None:
    """Have Chromium draw what the dashboard shows first, of the last minutes."""
    shown = dict(dashboard_queries("30s"))
    parameters: dict[str, str] = {}
    for number, title in enumerate(_PICTURED):
        parameters |= {
            f"g{number}.expr": shown[title],
            f"g{number}.tab": "0",
            f"g{number}.range_input": "2m",
        }
    page = f"{prometheus}/classic/graph"
    try:
        urllib.request.urlopen(page, timeout=30).close()
    except urllib.error.HTTPError:  # Debian's package alone has it
        page = f"{prometheus}/graph"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    subprocess.run(
        [
            "chromium",
            *options,
            "--window-size=1000,1650",
            "--virtual-time-budget=15000",
            f"--screenshot={path}",
            f"{page}?{urllib.parse.urlencode(parameters)}",
        ],
        check=True,
        capture_output=True,
    )
    print(f"{path}: {', '.join(_PICTURED)}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["scraped", prometheus]:
            scraped(prometheus)
        case ["rules", prometheus]:
            rules(prometheus)
        case ["dashboard", prometheus, server, photo]:
            dashboard(prometheus, server, photo)
        case ["alert", prometheus, name, *states]:
            alert(prometheus, name, states)
        case ["starts", prometheus, number]:
            starts(prometheus, number)
        case ["annotation", prometheus, name]:
            annotation(prometheus, name)
        case ["grafana", url]:
            grafana(url)
        case ["screenshot", prometheus, path]:
            screenshot(prometheus, path)
        case _:
            sys.exit(__doc__)
