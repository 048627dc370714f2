"""The comparison's report: one set of tables and plots as Markdown and as a page of its own."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks.pages import Block, Heading, Plot, Table, write_pages
from benchmarks.peers.entrants import ENTRANTS, OURS
from benchmarks.peers.figures import (
    CLIENTS,
    STOP_S,
    Aim,
    Comparison,
    Network,
    Overload,
    Stop,
    Value,
    Visit,
)
from benchmarks.peers.servers.handler import MAX_BATCH

_NONE = "–"
_LABELS = {entrant.name: entrant.label for entrant in ENTRANTS}
_COLOURS = {
    OURS: "#c2263d",
    "slsnet-openvino": "#f0883e",
    "fastapi": "#6e7781",
    "fastapi-wide": "#afb8c1",
    "litserve": "#8250df",
    "mosec": "#1f6feb",
    "triton": "#2da44e",
    "bentoml": "#bf8700",
    "ray": "#0598bc",
    "mlserver": "#d63384",
    "torchserve": "#a5824d",
}
_ABOUT: dict[Network, str] = {
    "real": "The shipped network. All run it with ONNX Runtime, but for this server's second line,"
    " which is OpenVINO. This server runs a lone photo with all cores' threads, peers with one"
    " of their processes and so one thread, but for FastAPI's second line, which has all threads"
    " in one process: p50 of one client is to be compared with that one.",
    "stub 0 ms": "A stub finds a disc and takes no time for it: what is left is the serving path"
    " alone, that is HTTP, decoding, resizing, hand-offs, the mask's PNG.",
    "stub 5 ms": "The stub takes 5 ms for a batch of any size up to"
    f" {MAX_BATCH}, one batch at a time on the whole machine, as on one accelerator: throughput is"
    " how full batches are, and a lone client sees whether it waits for others.",
}
_LEAST_IDLE_CORES = 0.005
"""The least number of cores that a look of two seconds tells from none."""


def write_report(comparison: Comparison, folder: Path) -> str:
    """Write report.html, and report.md with its plots; return the Markdown."""
    return write_pages("SLSNet Server beside other servers", _blocks(comparison), folder)


def _blocks(comparison: Comparison) -> list[Block]:
    blocks: list[Block] = [
        *_facts(comparison),
        Heading("Aims"),
        Table(
            ("measure", "aim", "found", ""),
            [
                (aim.measure, aim.wanted, _ratio(aim.found), _verdict(aim))
                for aim in comparison.aims()
            ],
        ),
    ]
    for network in comparison.networks:
        blocks += [Heading(_title(network)), _ABOUT[network], _loads(comparison, network)]
    if comparison.networks:
        width = 4 * len(comparison.networks) + 1
        blocks += [
            Plot(
                "throughput",
                "Masks a second by clients",
                partial(_curves, comparison, "masks/s", lambda v: [s.per_s for s in v.steps]),
                (width, 4.6),
            ),
            Plot(
                "p99",
                "p99 latency by clients",
                partial(_curves, comparison, "p99, ms", lambda v: [s.p99_ms for s in v.steps]),
                (width, 4.6),
            ),
        ]
    blocks += [*_overloads(comparison), *_troubles(comparison), *_costs(comparison)]
    blocks += [*_ahead(comparison), *_missing(comparison), *_servers(comparison)]
    return blocks


def _facts(comparison: Comparison) -> list[Block]:
    setting = comparison.setting
    visits = comparison.visits
    checked = sum(visit.masks_checked for visit in visits)
    wrong = sum(visit.masks_wrong for visit in visits)
    turns = sorted({visit.turn for visit in visits})
    text = (
        f"Machine: {setting.machine}. Server and load share it. Commit {setting.commit}, network"
        f" {setting.model}; {setting.photos}. Turns: {len(turns)}, in each of"
        " which every server is started with each network and loaded by 1, 8, 32 and 128 clients"
        " in a closed loop; servers take turns in another order each time. Figures are medians of"
        " the turns, ratios are medians of ratios within a turn. In the first turn alone servers"
        " are overloaded (real network, stub of 5 ms), and left idle, sent a bad photo and stopped"
        " by SIGTERM (stub of 5 ms)."
    )
    others = [visit.others_cores for visit in visits] or [0.0]
    disturbed = sum(not visit.is_quiet for visit in visits)
    return [
        text,
        f"{checked} masks were compared with those predicted without a server, **{wrong} were"
        f" wrong** (overlap below 0.9: peers' handlers enlarge masks in blocks, this server smooths"
        f" their outlines). Beside server and load the machine used {statistics.median(others):.2f}"
        f" cores during a visit (median; at most {max(others):.2f}; {disturbed} of {len(visits)}"
        f" visits count as disturbed). Turns differ in throughput by {comparison.spread:.0%}"
        " (median over servers and loads).",
    ]


def _verdict(aim: Aim) -> str:
    return _NONE if aim.found is None else "met" if aim.is_met else "**missed**"


def _title(network: Network) -> str:
    return "Real network" if network == "real" else f"Stub, {network.removeprefix('stub ')}"


def _loads(comparison: Comparison, network: Network) -> Table:
    rows = []
    for name in comparison.measured(network):
        visits = comparison.of(name, network)
        median = partial(comparison.median, name, network)
        failed = sum(step.failed for visit in visits for step in visit.steps)
        rows.append(
            (
                _LABELS[name],
                *(_number(median(_per_s(n))) for n in CLIENTS),
                _ratio(comparison.ratio(OURS, name, network, lambda v: v.best_per_s)),
                _number(median(lambda v: v.at(1).p50_ms)),
                _ratio(comparison.ratio(name, OURS, network, lambda v: v.at(1).p50_ms)),
                *(_number(median(_p99_ms(n))) for n in CLIENTS),
                str(failed),
            )
        )
    head = (
        "server",
        *(f"masks/s, {n}" if n == 1 else str(n) for n in CLIENTS),
        "this server's best ÷ its",
        "p50 of 1, ms",
        "÷ this server's",
        *(f"p99 of {n}, ms" if n == 1 else str(n) for n in CLIENTS),
        "failed",
    )
    return Table(head, rows)


def _curves(
    comparison: Comparison,
    label: str,
    values: Callable[[Visit], Sequence[float]],
    figure: Figure,
) -> None:
    panels = figure.subplots(1, len(comparison.networks), squeeze=False)[0]
    for axes, network in zip(panels, comparison.networks, strict=True):
        # This server is drawn last, and so above the others.
        for name in reversed(comparison.measured(network)):
            visits = comparison.of(name, network)
            medians = [statistics.median(of) for of in zip(*map(values, visits), strict=True)]
            axes.plot(
                CLIENTS,
                medians,
                "o-",
                color=_COLOURS[name],
                linewidth=2.4 if name == OURS else 1.2,
                markersize=4,
                label=_LABELS[name].strip("*"),
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(CLIENTS, [str(count) for count in CLIENTS])
        axes.set_xlabel("clients")
        axes.set_title(_title(network), fontsize=10)
        if "ms" in label:
            axes.set_yscale("log")
            for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                ticks(LogFormatter(minor_thresholds=(1.5, 0.6)))
            axes.grid(which="both", axis="y", color="#eaeef2")
        else:
            axes.set_ylim(bottom=0)
    panels[0].set_ylabel(label)
    handles = {
        text: handle
        for axes in panels
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    order = [_LABELS[e.name].strip("*") for e in ENTRANTS if _LABELS[e.name].strip("*") in handles]
    figure.legend(
        [handles[text] for text in order],
        order,
        loc="outside lower center",
        # As many as fit below the panels.
        ncols=min(2 * len(panels), 5),
        frameon=False,
    )


def _overloads(comparison: Comparison) -> list[Block]:
    blocks: list[Block] = []
    for network in comparison.networks:
        rows = [
            (_LABELS[name], *_overload(visit.overload, visit.best_per_s))
            for name in comparison.measured(network)
            for visit in comparison.of(name, network)
            if visit.overload
        ]
        if rows:
            seconds = next(v.overload.seconds for v in comparison.visits if v.overload)
            blocks += [
                Heading(f"Twice as much as it can do: {network}"),
                f"For {seconds:g} s photos come at twice the best throughput that the server had"
                " just reached, whatever becomes of those before. Latency counts from when a photo"
                " was due. Lost: sent and without an answer ten seconds after the last was due;"
                " unsent: due while a thousand connections waited.",
                Table(
                    (
                        "server",
                        "offered/s",
                        "masks/s",
                        "of its best",
                        "p50, ms",
                        "p99, ms",
                        "refused",
                        "told when to come again",
                        "lost",
                        "unsent",
                        "last answer after, s",
                    ),
                    rows,
                ),
            ]
    return blocks


def _overload(overload: Overload, best_per_s: float) -> tuple[str, ...]:
    refused = sum(overload.refused.values())
    return (
        f"{overload.offered_per_s:.0f}",
        _number(overload.served_per_s),
        f"{overload.served_per_s / best_per_s:.2f}",
        f"{overload.p50_ms:.0f}",
        f"{overload.p99_ms:.0f}",
        _statuses(overload.refused),
        f"{overload.with_retry_after / refused:.0%}" if refused else _NONE,
        str(overload.lost),
        str(overload.unsent),
        f"{overload.drained_s:.1f}",
    )


def _troubles(comparison: Comparison) -> list[Block]:
    rows = []
    for network in comparison.networks:
        for name in comparison.measured(network):
            for visit in comparison.of(name, network):
                if visit.bad_photo and visit.stop:
                    bad = visit.bad_photo
                    rows.append(
                        (
                            _LABELS[name],
                            network,
                            f"{bad.good_failed} of {7 * bad.times}",
                            _statuses(bad.statuses),
                            *_stop(visit.stop),
                        )
                    )
    if not rows:
        return []
    return [
        Heading("A bad photo among good ones, and SIGTERM under load"),
        "Ten times a truncated photo comes at the same moment as seven good ones: what became of"
        " the good ones, and the status of the bad one. Then SIGTERM goes to the process that was"
        " started, under eight clients in a closed loop that come again until the port is closed,"
        " 50 ms after a refusal;"
        " lost are requests that were sent and got no answer.",
        Table(
            (
                "server",
                "network",
                "good ones failed",
                "bad one",
                "masks after SIGTERM",
                "refused",
                "lost",
                "ended after, s",
                "exit code",
                "processes left",
                "port still answers",
            ),
            rows,
        ),
    ]


def _stop(stop: Stop) -> tuple[str, ...]:
    return (
        str(stop.answered_after),
        str(stop.refused),
        str(stop.lost),
        f"> {STOP_S}" if stop.seconds is None else f"{stop.seconds:.1f}",
        _NONE if stop.exit_code is None else str(stop.exit_code),
        str(stop.survivors),
        "yes" if stop.still_answers else "no",
    )


def _costs(comparison: Comparison) -> list[Block]:
    rows = []
    for network in comparison.networks:
        for name in comparison.measured(network):
            idle = [v.idle_cores for v in comparison.of(name, network) if v.idle_cores is not None]
            rows.append(
                (
                    _LABELS[name],
                    network,
                    _number(comparison.median(name, network, lambda v: v.seconds_to_ready)),
                    _number(comparison.median(name, network, lambda v: v.memory_mib)),
                    f"{100 * statistics.median(idle):.1f}" if idle else _NONE,
                )
            )
    return [
        Heading("Start, memory, idle"),
        "From the start of the process to its first mask; memory of all processes after the loads"
        " as PSS, shared pages counted once; CPU time without any request, in percent of one core.",
        Table(("server", "network", "ready after, s", "memory (PSS), MiB", "idle, %"), rows),
    ]


@dataclass(frozen=True)
class _Measure:
    name: str
    value: Value
    highest: bool = False


def _per_s(clients: int) -> Callable[[Visit], float]:
    return lambda visit: visit.at(clients).per_s


def _p99_ms(clients: int) -> Callable[[Visit], float]:
    return lambda visit: visit.at(clients).p99_ms


def _measures() -> list[_Measure]:
    return [
        *(_Measure(f"masks/s, {n} clients", _per_s(n), True) for n in CLIENTS),
        _Measure("p50 of a lone client, ms", lambda v: v.at(1).p50_ms),
        *(_Measure(f"p99 of {n} clients, ms", _p99_ms(n)) for n in CLIENTS),
        _Measure("ready after, s", lambda v: v.seconds_to_ready),
        _Measure("memory (PSS), MiB", lambda v: v.memory_mib),
        _Measure("idle, % of a core", _idle_percent),
        _Measure("masks/s at twice its load", _overloaded_per_s, True),
        _Measure("ended after SIGTERM, s", _seconds_to_stop),
    ]


def _idle_percent(visit: Visit) -> float | None:
    if visit.idle_cores is None:
        return None
    return 100 * max(visit.idle_cores, _LEAST_IDLE_CORES)


def _overloaded_per_s(visit: Visit) -> float | None:
    return visit.overload.served_per_s if visit.overload else None


def _seconds_to_stop(visit: Visit) -> float | None:
    """Seconds that the server took to stop; `STOP_S` if it was still there then."""
    if visit.stop is None:
        return None
    return STOP_S if visit.stop.seconds is None else visit.stop.seconds


def _ahead(comparison: Comparison) -> list[Block]:
    rows = []
    spread = comparison.spread
    for network in comparison.networks:
        for name in comparison.measured(network):
            if name not in comparison.peers or not comparison.of(OURS, network):
                continue
            for measure in _measures():
                over, under = (name, OURS) if measure.highest else (OURS, name)
                ratio = comparison.ratio(over, under, network, measure.value)
                if ratio is not None and ratio > 1 + spread:
                    its = comparison.median(name, network, measure.value)
                    ours = comparison.median(OURS, network, measure.value)
                    rows.append(
                        (
                            measure.name,
                            network,
                            _LABELS[name],
                            _number(its),
                            _number(ours),
                            _ratio(ratio),
                        )
                    )
    found: Block = (
        Table(("measure", "network", "peer", "its", "this server's", "better by a factor of"), rows)
        if rows
        else "Nowhere, of what is measured here."
    )
    return [
        Heading("Where a peer is ahead"),
        f"By more than turns differ anyway, which is {spread:.0%} (above).",
        found,
    ]


def _missing(comparison: Comparison) -> list[Block]:
    if not comparison.missing:
        return []
    rows = [(_LABELS[m.entrant], m.network, str(m.turn), m.reason) for m in comparison.missing]
    return [Heading("Not measured"), Table(("server", "network", "turn", "why"), rows)]


def _servers(comparison: Comparison) -> list[Block]:
    rows = []
    for entrant in ENTRANTS:
        visits = [visit for visit in comparison.visits if visit.entrant == entrant.name]
        if not visits:
            continue
        runs = sorted({v.backend for v in visits if v.backend and v.network == "real"})
        version = f"{entrant.package} {entrant.version}" if entrant.package else "; ".join(runs)
        settings = f"{entrant.settings} ({entrant.source})" if entrant.source else entrant.settings
        rows.append((entrant.label, version, settings))
    return [
        Heading("Servers"),
        f"Peers: {comparison.setting.layout}, batches of at most {MAX_BATCH} where they batch, the"
        " same Pillow handler in each, the same ONNX file. All packages are pinned in"
        " `benchmarks/peers/requirements/`, the servers are in `benchmarks/peers/servers/`.",
        Table(("server", "version", "settings"), rows),
    ]


def _statuses(counts: dict[str, int]) -> str:
    return (
        ", ".join(
            f"{count} × {'no answer' if status == '0' else status}"
            for status, count in sorted(counts.items())
        )
        or _NONE
    )


def _number(value: float | None) -> str:
    """The number with three digits."""
    if value is None:
        return _NONE
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"
