"""The load test's report: the same tables and plots as Markdown and as a page."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks.load_figures import Report, Step
from benchmarks.pages import Block, Heading, Plot, Table, write_pages
from server.observe.stages import STAGES

_BLUE, _ORANGE, _RED, _GREY = "#1f6feb", "#d97706", "#c2263d", "#8b949e"
_STAGE_COLOURS = {
    "read": "#a5d6ff",
    "decode": "#1f6feb",
    "queue": "#d97706",
    "infer": "#2da44e",
    "encode": "#8250df",
    "outside": "#c9d1d9",
}
_PERCENTILES: tuple[tuple[str, str, Callable[[Step], float]], ...] = (
    ("p50", _BLUE, lambda step: step.p50_ms),
    ("p95", _ORANGE, lambda step: step.p95_ms),
    ("p99", _RED, lambda step: step.p99_ms),
)


def write_report(report: Report, folder: Path) -> str:
    """Write report.html, report.md with its plots, and report.json; returns the Markdown."""
    markdown = write_pages("SLSNet Server under load", _blocks(report), folder)
    figures = {
        **asdict(report),
        "best_per_s": report.best_per_s,
        "knee_clients": report.knee_clients,
        "saturated_at_clients": report.saturated_at.clients,
    }
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    return markdown


def _blocks(report: Report) -> list[Block]:
    return [
        *_results(report),
        *_ramp(report),
        *_open_loop(report),
        *_bursts(report),
        *_beside_bulk(report),
        *_photos(report),
    ]


def _results(report: Report) -> list[Block]:
    lone, best = report.of("ramp")[0], report.best_per_s
    masks, checked = report.masks, sum(report.masks.values())
    return [
        _facts(report),
        f"**{checked} masks checked** against a prediction made without a server:"
        f" {masks['identical']} identical to the last byte, {masks['rounding']} that differ only"
        f" as the network's arithmetic allows, **{masks['wrong']} wrong**. "
        + (
            "Failed requests by status: "
            + ", ".join(f"{status}: {count}" for status, count in report.failures.items())
            if report.failures
            else "No request failed."
        ),
        f"**Saturation**: {best:.1f} photos/s at most,"
        f" {best * report.network_ms / 1000:.2f} × what the bare network does one by one on this"
        f" machine ({report.network_ms:.1f} ms an image). The knee is at"
        f" **{report.knee_clients:.1f} clients**; 95 % of the best is reached with"
        f" {report.saturated_at.name}. A lone client's p50 is {lone.p50_ms:.1f} ms,"
        f" {lone.p50_ms / report.network_ms:.2f} × the bare network.",
    ]


def _ramp(report: Report) -> list[Block]:
    ramp, best = report.of("ramp"), report.best_per_s
    lone = ramp[0]
    return [
        Heading("Ramp: closed loop"),
        "Each client sends its next photo when it has the mask of the last one.",
        Table(
            (
                "clients",
                "photos/s",
                "of best",
                "p50, ms",
                "p95",
                "p99",
                "p50 ÷ lone",
                "p99 ÷ lone p50",
                "photos a run",
                "requests",
                "refused",
                "generator, cores",
            ),
            [
                (
                    str(step.clients),
                    f"{step.answered_per_s:.1f}",
                    f"{step.answered_per_s / best:.2f}",
                    *_latencies(step),
                    f"{step.p50_ms / lone.p50_ms:.2f}",
                    f"{step.p99_ms / lone.p50_ms:.2f}",
                    f"{step.batch:.1f}",
                    str(step.requests),
                    str(step.refused),
                    f"{step.generator_cores:.2f}",
                )
                for step in ramp
            ],
        ),
        Plot(
            "knee",
            "Throughput by clients, with the asymptotes that cross at the knee",
            _drawn(_knee, report),
        ),
        Plot(
            "latency", "Throughput against latency; numbers are clients", _drawn(_latency, report)
        ),
        Plot("stages", "Mean time of a request by stage", _drawn(_stages, report)),
        Plot("batch", "Photos that run through the network together", _drawn(_batch, report)),
    ]


def _open_loop(report: Report) -> list[Block]:
    lone = report.of("ramp")[0]
    return [
        Heading("Open loop: a fixed rate"),
        "Photos come at random but at this rate, whatever becomes of those before; latency counts"
        " from when each was due. Above 1 the queue grows for as long as the load lasts.",
        Table(
            (
                "of best",
                "offered/s",
                "answered/s",
                "p50, ms",
                "p95",
                "p99",
                "p50 ÷ lone",
                "p99 ÷ lone p50",
                "photos a run",
                "requests",
                "refused",
                "sent late, p99 ms",
            ),
            [
                (
                    f"{step.load:g}",
                    f"{step.offered_per_s:.1f}",
                    f"{step.answered_per_s:.1f}",
                    *_latencies(step),
                    f"{step.p50_ms / lone.p50_ms:.2f}",
                    f"{step.p99_ms / lone.p50_ms:.2f}",
                    f"{step.batch:.1f}",
                    str(step.requests),
                    str(step.refused),
                    f"{step.late_p99_ms:.1f}",
                )
                for step in report.of("open loop")
            ],
        ),
    ]


def _bursts(report: Report) -> list[Block]:
    burst = report.of("burst")[0]
    pace_ms = 1000 * report.burst / report.best_per_s
    return [
        Heading("Bursts"),
        f"{report.burst} photos at once, then half a second's pause once all are answered. At the"
        f" best throughput above they would take {pace_ms:.0f} ms.",
        Table(
            (
                "at once",
                "p50, ms",
                "p95",
                "p99",
                "last",
                "last ÷ best pace",
                "photos a run",
                "refused",
            ),
            [
                (
                    str(report.burst),
                    *_latencies(burst),
                    f"{burst.max_ms:.0f}",
                    f"{burst.max_ms / pace_ms:.2f}",
                    f"{burst.batch:.1f}",
                    str(burst.refused),
                )
            ],
        ),
    ]


def _beside_bulk(report: Report) -> list[Block]:
    priority = report.of("priority")
    alone = priority[0]
    return [
        Heading("Interactive beside bulk"),
        f"Photos that somebody waits for, at {alone.load:g} of the best throughput: alone, beside"
        " clients that send one photo after another, and beside the same when they say so.",
        Table(
            (
                "interactive",
                "p50, ms",
                "p95",
                "p99",
                "p50 ÷ alone",
                "p99 ÷ alone",
                "requests",
                "others/s",
            ),
            [
                (
                    step.name,
                    *_latencies(step),
                    f"{step.p50_ms / alone.p50_ms:.2f}",
                    f"{step.p99_ms / alone.p99_ms:.2f}",
                    str(step.requests),
                    f"{step.others_per_s:.1f}",
                )
                for step in priority
            ],
        ),
        Plot(
            "priority",
            "Latency of interactive photos by what runs beside them",
            _drawn(_priority, report),
        ),
    ]


def _photos(report: Report) -> list[Block]:
    return [
        Heading("Photos"),
        f"Medians with a lone client, by size and format; {report.photos}, sent in turn as a form"
        " and bare.",
        Table(
            ("photo", "of the mix", "whole, ms", "decode", "encode", "not the network", "requests"),
            [
                (
                    kind.name,
                    f"{report.cards[kind.name] / sum(report.cards.values()):.0%}",
                    f"{kind.latency_ms:.1f}",
                    f"{kind.decode_ms:.1f}",
                    f"{kind.encode_ms:.1f}",
                    f"{kind.not_network_ms:.1f}",
                    str(kind.requests),
                )
                for kind in report.kinds
            ],
        ),
    ]


def _drawn(draw: Callable[[Report, Axes], None], report: Report) -> Callable[[Figure], None]:
    return lambda figure: draw(report, figure.add_subplot())


def _facts(report: Report) -> str:
    seconds = report.steps[0].seconds
    text = f"Machine: {report.machine.name} (1-minute load average before the test)."
    if not report.machine.was_quiet:
        text += " **It was busy with other work: the figures are about both.**"
    return (
        f"{text} Client and server share it. Network: {report.model}, {report.backend}."
        f" {seconds:.2g} s measured of each load; of few requests the p99 is simply the slowest."
        " Photos are known here by size and format alone."
    )


def _latencies(step: Step) -> tuple[str, str, str]:
    return f"{step.p50_ms:.0f}", f"{step.p95_ms:.0f}", f"{step.p99_ms:.0f}"


def _knee(report: Report, axes: Axes) -> None:
    ramp, best, lone = report.of("ramp"), report.best_per_s, report.of("ramp")[0]
    clients = [step.clients for step in ramp]
    axes.plot(clients, [s.answered_per_s for s in ramp], "o-", color=_BLUE, label="measured")
    knee = report.knee_clients
    slope = 1000 / lone.mean_ms
    axes.plot([clients[0], knee], [clients[0] * slope, best], "--", color=_GREY)
    axes.plot([knee, clients[-1]], [best, best], "--", color=_GREY, label="asymptotes")
    axes.axvline(knee, color=_RED, linewidth=1, linestyle=":")
    axes.annotate(
        f"knee: {knee:.1f} clients", (knee, best), (8, 8), textcoords="offset points", color=_RED
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(clients, [str(count) for count in clients])
    axes.set_ylim(0, 1.25 * best)
    axes.set_xlabel("clients")
    axes.set_ylabel("photos/s")
    axes.legend(loc="lower right")


def _latency(report: Report, axes: Axes) -> None:
    ramp, opened = report.of("ramp"), report.of("open loop")
    for name, colour, value in _PERCENTILES:
        speeds = [step.answered_per_s for step in ramp]
        axes.plot(speeds, [value(step) for step in ramp], "o-", color=colour, label=name)
        axes.plot(
            [step.answered_per_s for step in opened],
            [value(step) for step in opened],
            "D",
            color=colour,
            fillstyle="none",
            label=f"{name}, open loop",
        )
    for step in ramp:
        axes.annotate(
            str(step.clients),
            (step.answered_per_s, step.p99_ms),
            (0, 7),
            textcoords="offset points",
            ha="center",
        )
    axes.set_yscale("log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks(LogFormatter(minor_thresholds=(1.5, 0.6)))
    axes.set_xlim(0, 1.12 * report.best_per_s)
    axes.set_xlabel("photos/s")
    axes.set_ylabel("latency, ms")
    axes.grid(which="both", axis="y", color="#eaeef2")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _stages(report: Report, axes: Axes) -> None:
    ramp = report.of("ramp")
    labels = [str(step.clients) for step in ramp]
    below = [0.0] * len(ramp)
    for stage in (*STAGES, "outside"):
        # Plotted as shares, since a queue of seconds would hide everything else.
        heights = [100 * step.stages_ms[stage] / step.mean_ms for step in ramp]
        axes.bar(labels, heights, bottom=below, color=_STAGE_COLOURS[stage], label=stage)
        below = [one + other for one, other in zip(below, heights, strict=True)]
    for label, step in zip(labels, ramp, strict=True):
        axes.annotate(f"{step.mean_ms:.0f} ms", (label, 101), ha="center")
    axes.set_ylim(0, 112)
    axes.set_xlabel("clients")
    axes.set_ylabel("share of a request, %")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _batch(report: Report, axes: Axes) -> None:
    ramp = report.of("ramp")
    clients = [step.clients for step in ramp]
    axes.plot(clients, [step.batch for step in ramp], "o-", color=_BLUE, label="measured")
    axes.plot(clients, clients, "--", color=_GREY, label="all clients in one run")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    ticks = [str(count) for count in clients]
    axes.set_xticks(clients, ticks)
    axes.set_yticks(clients, ticks)
    axes.set_xlabel("clients")
    axes.set_ylabel("photos a run, mean")
    axes.legend(loc="upper left")


def _priority(report: Report, axes: Axes) -> None:
    steps = report.of("priority")
    for place, (name, colour, value) in enumerate(_PERCENTILES):
        rows = [index + 0.26 * (place - 1) for index in range(len(steps))]
        bars = axes.barh(rows, [value(step) for step in steps], 0.24, color=colour, label=name)
        axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_yticks(
        range(len(steps)), [step.name.replace("`", "").replace(", ", ",\n") for step in steps]
    )
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("latency, ms")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
