r"""Photos from a DICOM archive or device in, results back into it.

    slsnet archive serve --journal /var/lib/slsnet-archive --server http://127.0.0.1:8000 \
        --peer DERMATOSCOPE@10.0.0.7 --stow http://pacs.example:8042/dicom-web
    slsnet archive fetch --journal /var/lib/slsnet-fetch --server http://127.0.0.1:8000 \
        --from http://pacs.example:8042/dicom-web --date 20261101-20261130
    slsnet archive list --journal /var/lib/slsnet-archive
    slsnet archive retry --journal /var/lib/slsnet-archive 17
    slsnet archive discard --journal /var/lib/slsnet-archive 17

The journal is a folder in which photos of patients lie until their results are delivered.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx

from common.program import Help, fraction, program
from server.observe.logs import configure

try:
    from server.archive.dicomweb import Archive
    from server.archive.failures import Failure
    from server.archive.fetching import fetch
    from server.archive.health import Health
    from server.archive.journal import Journal, JournalError
    from server.archive.metrics import Metrics
    from server.archive.receiver import Allowed, Limits, Receiver, silence
    from server.archive.relay import Destination, Patience, Relay
    from server.archive.segmenting import SegmentingServer
    from server.archive.sending import Peer, Sender
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}: pip install -r requirements-dicom.txt", name=error.name
    ) from error

__all__ = ["main", "parsed"]

log = logging.getLogger("slsnet.archive")

# Seconds for associations and attempts that are under way when the process is told to stop.
_GRACE_S = 10.0

_ENVIRONMENT = """
Environment: SLSNET_API_KEY, if the server has keys; SLSNET_ARCHIVE_AUTHORIZATION, what the header
Authorization tells the DICOMweb archive, such as `Bearer …` or `Basic …`.
"""


def _url(text: str) -> str:
    try:
        parsed = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise argparse.ArgumentTypeError(f"{text} is no address of http or https")
    if parsed.userinfo:
        raise argparse.ArgumentTypeError("an address has no password: see Environment below")
    return text


def _title(text: str) -> str:
    if not 0 < len(text) <= 16 or not text.isascii() or "\\" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no title of up to 16 characters")
    return text


def _allowed(text: str) -> Allowed:
    try:
        return Allowed.of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _peer(text: str) -> Peer:
    try:
        return Peer.of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def _size(text: str) -> int:
    value = int(text)
    if not 0 < value < 1 << 62:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def _journal_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--journal",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder in which photos and results lie until they are delivered",
    )


def _work_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that segment and deliver."""
    add = parser.add_argument
    add("--server", type=_url, required=True, metavar="URL", help="SLSNet Server's address")
    add("--stow", type=_url, metavar="URL", help="DICOMweb service that stores the results")
    add(
        "--send-to",
        type=_peer,
        metavar="TITLE@HOST:PORT",
        help="application entity that stores the results, by C-STORE",
    )
    add("--title", type=_title, default="SLSNET", help="own application entity title")
    add(
        "--objects",
        default="seg,overlay,sr",
        metavar="NAME,…",
        help="results to make of a photo, as `objects` of POST /segment",
    )
    add("--threshold", type=fraction, metavar="VALUE", help="0 to 1, as of POST /segment")
    add("--clean", action="store_true", help="leave only the largest region of a mask")
    add("--at-work", type=_size, default=2, metavar="N", help="objects at a time in each step")
    add(
        "--timeout-s",
        type=_positive,
        default=60,
        metavar="S",
        help="seconds without a word of server or archive, after which an attempt has failed",
    )
    add(
        "--retry-s",
        type=_positive,
        default=1,
        metavar="S",
        help="pause after a first failure; each next is twice as long",
    )
    add("--longest-retry-s", type=_positive, default=60, metavar="S", help="longest pause")
    add(
        "--give-up-h",
        type=_positive,
        default=72,
        metavar="H",
        help="hours of failures, after which an object waits for a person",
    )
    add(
        "--max-journal-bytes",
        type=_size,
        default=10 << 30,
        metavar="N",
        help="bytes of objects in the journal; more are refused",
    )
    add(
        "--min-free-bytes",
        type=_size,
        default=1 << 30,
        metavar="N",
        help="bytes of the journal's disk that stay free",
    )
    add("--log-format", choices=["text", "json"], default="text", help="form of the log on stderr")


def _serve_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to take objects at; 0.0.0.0 is every one")
    add("--port", type=int, default=11112, help="port to take objects at; 0 takes a free one")
    add(
        "--peer",
        type=_allowed,
        action="append",
        default=[],
        metavar="TITLE[@ADDRESS]",
        help="application entity that may send; may be repeated",
    )
    add("--any-peer", action="store_true", help="let everybody send who reaches the port")
    add(
        "--max-object-bytes",
        type=_size,
        default=64 << 20,
        metavar="N",
        help="largest object, as the server's --max-body-bytes",
    )
    add(
        "--max-associations",
        type=_size,
        default=10,
        metavar="N",
        help="associations that are open at the same time",
    )
    add("--health-host", default="127.0.0.1", metavar="HOST", help="address of health and metrics")
    add("--health-port", type=int, default=11113, metavar="PORT", help="port of health and metrics")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("server.archive"),
        description=__doc__,
        formatter_class=Help,
        epilog=_ENVIRONMENT,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # The image's health check reads options too, by their whole names.
    make = partial(
        commands.add_parser, formatter_class=Help, epilog=_ENVIRONMENT, allow_abbrev=False
    )
    serve = make("serve", help="take photos by C-STORE until a signal ends it")
    _journal_option(serve)
    _work_options(serve)
    _serve_options(serve)
    fetching = make("fetch", help="fetch photos from a DICOMweb archive, and end")
    _journal_option(fetching)
    _work_options(fetching)
    add = fetching.add_argument
    add(
        "--from",
        type=_url,
        required=True,
        dest="source",
        metavar="URL",
        help="DICOMweb service that has the photos",
    )
    add("--study", metavar="UID", help="photos of this study alone")
    add("--series", metavar="UID", help="photos of this series alone")
    add("--date", metavar="YYYYMMDD[-YYYYMMDD]", help="photos of studies of these days")
    add("--all", action="store_true", help="everything that the archive holds")
    _journal_option(make("list", help="list the objects that wait for a person, and why"))
    for name, summary in (
        ("retry", "try these objects again, or all that wait for a person"),
        ("discard", "erase these objects, which wait for a person"),
    ):
        command = make(name, help=summary)
        _journal_option(command)
        command.add_argument(
            "objects",
            type=int,
            nargs="*" if name == "retry" else "+",
            metavar="OBJECT",
            help="an object's number, as `list` prints it",
        )
    return parser


def _relay(options: argparse.Namespace, journal: Journal, metrics: Metrics) -> Relay:
    segmenter = SegmentingServer(
        options.server,
        objects=options.objects,
        threshold=options.threshold,
        clean=options.clean,
        api_key=os.environ.get("SLSNET_API_KEY"),
        timeout_s=options.timeout_s,
    )
    destinations: dict[str, Destination] = {}
    if options.stow:
        destinations["stow"] = _archive(options, options.stow)
    if options.send_to:
        destinations["send"] = Sender(options.send_to, options.title, timeout_s=options.timeout_s)
    return Relay(
        journal,
        segmenter,
        destinations,
        metrics,
        patience=_patience(options),
        at_work=options.at_work,
    )


def _archive(options: argparse.Namespace, url: str) -> Archive:
    shown = os.environ.get("SLSNET_ARCHIVE_AUTHORIZATION", "")
    return Archive(url, authorization=shown, timeout_s=options.timeout_s)


def _patience(options: argparse.Namespace) -> Patience:
    return Patience(options.retry_s, options.longest_retry_s, 3600 * options.give_up_h)


def _stopped() -> asyncio.Event:
    """Set by the first signal. The second ends the process at once, which the journal survives."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        if stopped.is_set():
            os._exit(128 + number)
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    return stopped


async def _serve(options: argparse.Namespace, journal: Journal) -> int:
    metrics = Metrics(journal)
    relay = _relay(options, journal, metrics)
    stopped = _stopped()
    loop = asyncio.get_running_loop()

    def arrived() -> None:
        loop.call_soon_threadsafe(relay.arrived)

    receiver = Receiver(
        journal,
        title=options.title,
        peers=options.peer,
        limits=Limits(options.max_object_bytes, options.max_associations),
        counted=lambda result: metrics.received.labels(result).inc(),
        arrived=arrived,
    )

    def why_not_ready() -> str:
        if stopped.is_set():
            return "stopping"
        if not receiver.listens:
            return "starting"
        return "" if journal.has_room else "the journal or its disk is full"

    health = Health(options.health_host, options.health_port, metrics, why_not_ready)
    try:
        async with relay.working(_GRACE_S):
            port = receiver.start(options.host, options.port)
            log.info(
                "listening on %s port %d as %s, health and metrics on port %d",
                *(options.host, port, options.title, health.port),
            )
            await stopped.wait()
            log.info("stopping")
            await asyncio.to_thread(receiver.stop, _GRACE_S)
    finally:
        health.stop()
    return 0


async def _fetch(options: argparse.Namespace, journal: Journal) -> int:
    metrics = Metrics(journal)
    relay = _relay(options, journal, metrics)
    named = {
        "StudyInstanceUID": options.study,
        "SeriesInstanceUID": options.series,
        "StudyDate": options.date,
    }
    query = {name: value for name, value in named.items() if value}
    archive = _archive(options, options.source)
    stopped = asyncio.create_task(_stopped().wait())
    async with relay.working(_GRACE_S):
        fetched = asyncio.create_task(
            fetch(archive, query, journal, relay, metrics, _patience(options))
        )
        await asyncio.wait([fetched, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        is_done = fetched.done()
        fetched.cancel()
        await asyncio.wait([fetched])
        await archive.aclose()
        if not is_done:
            print("stopped: the same command goes on", file=sys.stderr)
            return 128 + signal.SIGTERM
    counts = fetched.result()
    dead = len(journal.dead_letters())
    print(
        f"{counts.found} objects match: {counts.taken} fetched, {counts.known} known already,"
        f" {counts.others} no photos, {counts.failed} not fetched; {dead} wait for a person",
        file=sys.stderr,
    )
    return int(bool(counts.failed or dead))


def _look(options: argparse.Namespace) -> int:
    with Journal(options.journal, alone=False) as journal:
        match options.command:
            case "list":
                print("object\tstage\treason\tattempts\treceived\tbytes\tdetail")
                for dead in journal.dead_letters():
                    came = datetime.fromtimestamp(dead.received, UTC).isoformat(timespec="seconds")
                    cells = (dead.object, dead.stage, dead.reason, dead.attempts, came, dead.bytes)
                    print(*cells, dead.detail, sep="\t")
            case "retry":
                print(f"{journal.retry(options.objects or None)} are tried again")
            case "discard":
                print(f"{journal.discard(options.objects)} are erased")
    return 0


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments of any command, and check those that depend on each other.

    Args:
        arguments: None is those of the process.

    Raises:
        SystemExit: they are wrong; stderr says why.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "serve":
        if not options.peer and not options.any_peer:
            parser.error("name those that may send: --peer TITLE or TITLE@ADDRESS, or --any-peer")
        if not (options.stow or options.send_to):
            parser.error("name where results go: --stow, --send-to or both")
    elif options.command == "fetch":
        if not (options.study or options.series or options.date or options.all):
            parser.error("name what to fetch: --study, --series, --date, or --all")
        if not (options.stow or options.send_to):
            options.stow = options.source
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    options = parsed(arguments)
    try:
        if options.command not in ("serve", "fetch"):
            return _look(options)
        # Whatever is written here is this user's alone.
        os.umask(0o077)
        configure("info", options.log_format)
        silence()
        run = _serve if options.command == "serve" else _fetch
        with Journal(
            options.journal,
            max_bytes=options.max_journal_bytes,
            min_free_bytes=options.min_free_bytes,
        ) as journal:
            return asyncio.run(run(options, journal))
    except JournalError as error:
        print(f"error: {error}", file=sys.stderr)
    except Failure as failure:
        print(f"error: {failure.detail}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.strerror or error}: look at the hosts and ports", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
