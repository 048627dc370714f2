"""An evaluation as a page: worst, median and best cases, and where the network does well or badly.

`write_gallery` writes `index.html` and a PNG for each case shown into a folder. These are plain
files that open without a server. The truth is outlined in blue and the prediction in orange, which
the colour-blind tell apart. It is hand-written because viewers for data sets (FiftyOne,
TensorBoard) need a server to be looked at.
"""

import re
from collections.abc import Sequence
from html import escape
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from model.evaluate import Case, Evaluation
from model.metrics import METRICS, jaccard
from model.truth import is_lesion, read_truth
from photos.image import unpack_mask
from photos.overlay import upright
from photos.regions import mask_of

CASES_EACH = 6
"""Number of worst, of median and of best cases that are shown."""

LESION_SHARES = (0, 0.02, 0.05, 0.1, 0.2, 0.4, 1)
WIDTHS = (0, 256, 640, 1024, 2048, 4096, 1_000_000)
"""Edges of the bins of lesion area (share of the frame) and width (pixels); right inclusive."""

# Overlays are at most this wide and high, pixels.
_OVERLAY = 480
_TRUTH, _PREDICTION, _BLUE = (0, 144, 255), (255, 176, 0), "#2b6cb0"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; background: #f7fafc;
       max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; }
table { border-collapse: collapse; background: #fff; }
td, th { padding: .25rem .8rem; border: 1px solid #e2e8f0; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1rem; }
figure { margin: 0; background: #fff; border: 1px solid #e2e8f0; border-radius: 6px;
         overflow: hidden; }
figure img, figure svg { display: block; width: 100%; height: auto; }
figcaption { padding: .5rem .8rem; font-size: 13px; overflow-wrap: anywhere; }
.truth { color: #0060c0; font-weight: 600; } .prediction { color: #a86400; font-weight: 600; }
"""


def write_gallery(evaluation: Evaluation, folder: Path) -> Path:
    """Write the page of an evaluation.

    Args:
        evaluation: result of `model.evaluate.evaluate`; its images and masks are read again.
        folder: folder of the page; made if it is missing. Nothing is written elsewhere.

    Returns:
        The path of the page, `folder/index.html`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores = jaccard(evaluation.confusion)
    order = np.argsort(scores, kind="stable")
    each = min(CASES_EACH, len(order))
    middle = (len(order) - each) // 2
    groups = {
        "Worst": order[:each],
        "Median": order[middle : middle + each],
        "Best": order[::-1][:each],
    }
    sections = []
    for title, indices in groups.items():
        figures = [
            _case_figure(evaluation, int(index), folder, f"{title.lower()}-{rank}")
            for rank, index in enumerate(indices, 1)
        ]
        sections.append(f'<h2>{title} cases</h2>\n<div class="grid">{"".join(figures)}</div>')
    page = folder / "index.html"
    page.write_text(_page(evaluation, scores, sections), encoding="utf-8")
    return page


def overlay(case: Case, threshold: float, *, clean: bool = False) -> Image.Image:
    """The photo with the truth's outline in blue and the prediction's in orange."""
    pixels = np.array(upright(case.sample.image.read_bytes(), *case.image_size, _OVERLAY))
    height, width, _ = pixels.shape
    truth = Image.fromarray(read_truth(case.sample.mask)).convert("L")
    truth_mask = is_lesion(np.asarray(truth.resize((width, height), Image.Resampling.BOX)))
    _, predicted = mask_of(case.probability, width, height, threshold, clean=clean)
    pixels[_outline(truth_mask)] = _TRUTH
    pixels[_outline(unpack_mask(predicted, width))] = _PREDICTION
    return Image.fromarray(pixels)


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels on both sides of the mask's border. A mask that leaves the frame stays open there."""
    border = np.zeros_like(mask)
    rows, columns = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    border[1:] |= rows
    border[:-1] |= rows
    border[:, 1:] |= columns
    border[:, :-1] |= columns
    return border


def _case_figure(evaluation: Evaluation, index: int, folder: Path, label: str) -> str:
    case = evaluation.cases[index]
    name = f"{label}-{re.sub(r'[^A-Za-z0-9_-]', '_', case.sample.id)}.png"
    overlay(case, evaluation.threshold, clean=evaluation.clean).save(folder / name)
    one = {key: float(metric(evaluation.confusion)[index]) for key, metric in METRICS.items()}
    width, height = case.image_size
    return (
        f'<figure><img src="{name}" loading="lazy" alt="{escape(case.sample.id)}: truth in blue,'
        f' prediction in orange"><figcaption><b>{escape(case.sample.id)}</b><br>'
        f"Jaccard {one['jaccard']:.3f} · Dice {one['dice']:.3f} ·"
        f" sensitivity {one['sensitivity']:.3f} · specificity {one['specificity']:.3f}<br>"
        f"{width}×{height} pixels, lesion {case.lesion_share:.1%} of the frame"
        "</figcaption></figure>\n"
    )


def _page(evaluation: Evaluation, scores: NDArray[np.float64], sections: list[str]) -> str:
    report = evaluation.report()
    shares = np.array([case.lesion_share for case in evaluation.cases])
    widths = np.array([case.image_size[0] for case in evaluation.cases])
    figures = "".join(
        f"<tr><td>{name.replace('_', ' ')}</td><td>{report[name]:.4f}</td></tr>\n"
        for name in (*METRICS, "calibration_error")
    )
    names = {key: report["model"][key] for key in ("file", "version") if key in report["model"]}
    model = escape(" ".join(names.values()))
    best = max(evaluation.sweep, key=lambda threshold: evaluation.sweep[threshold])
    share_names = [f"{a:.0%}–{b:.0%}" for a, b in pairwise(LESION_SHARES)]
    width_names = [f"{a + 1}–{b}" for a, b in pairwise(WIDTHS[:-1])] + [f"> {WIDTHS[-2]}"]
    plots = [
        (
            _plot_bins(share_names, _bins(shares, LESION_SHARES, scores), "lesion, share of frame"),
            "Jaccard by lesion size",
        ),
        (
            _plot_bins(width_names, _bins(widths, WIDTHS, scores), "image width, pixels"),
            "Jaccard by image width",
        ),
        (
            _plot_sweep(evaluation),
            f"Mean Jaccard against threshold: {report['jaccard']:.4f} at {evaluation.threshold:g};"
            f" the best of the curve is {evaluation.sweep[best]:.4f} at {best:g}",
        ),
        (
            _plot_calibration(evaluation),
            "Calibration: how much of the pixels with a probability is lesion; expected"
            f" calibration error {report['calibration_error']:.4f}. The bars are the shares of all"
            " pixels",
        ),
    ]
    drawn = "".join(
        f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>\n" for svg, text in plots
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation of {model}</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>Evaluation of {model}</h1>
<p>{len(scores)} images, threshold {evaluation.threshold:g}; figures are means over the images, the
Jaccard's standard error is {report["jaccard_standard_error"]:.4f}. On the overlays the
<span class="truth">truth is blue</span>, the <span class="prediction">prediction orange</span>.</p>
<table>{figures}</table>
<h2>Where it is good, where bad</h2>
<div class="grid" style="grid-template-columns: repeat(auto-fill, minmax(480px, 1fr))">{drawn}</div>
{_table("Lesion", share_names, _bins(shares, LESION_SHARES, scores))}
{_table("Width", width_names, _bins(widths, WIDTHS, scores))}
{"".join(sections)}
</body></html>
"""


def _bins(
    values: NDArray[Any], edges: Sequence[float], scores: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """Sort the scores into bins ]left, right] of their values; the first bin takes 0 too."""
    where = np.searchsorted(edges, values, side="left")
    where = np.clip(where, 1, len(edges) - 1) - 1
    return [scores[where == index] for index in range(len(edges) - 1)]


def _table(title: str, names: list[str], bins: list[NDArray[np.float64]]) -> str:
    rows = "".join(
        f"<tr><td>{name}</td><td>{len(scores)}</td><td>{scores.mean():.3f}</td>"
        f"<td>{np.median(scores):.3f}</td></tr>\n"
        for name, scores in zip(names, bins, strict=True)
        if len(scores)
    )
    return (
        f"<table style='margin-top: 1rem'><tr><th>{title}</th><th>images</th><th>mean Jaccard</th>"
        f"<th>median</th></tr>\n{rows}</table>\n"
    )


def _axes() -> tuple[Figure, Any]:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e8f0")
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    """The plot as an element of the page; `name` keeps its ids apart from those of other plots."""
    buffer = BytesIO()
    # The salt is fixed and there is no date: the same evaluation gives the same page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().decode()
    return text[text.index("<svg") :]


def _plot_bins(names: list[str], bins: list[NDArray[np.float64]], label: str) -> str:
    figure, axes = _axes()
    held = [(name, scores) for name, scores in zip(names, bins, strict=True) if len(scores)]
    means = [scores.mean() for _, scores in held]
    axes.bar(range(len(held)), means, 0.6, color=_BLUE, alpha=0.35)
    jitter = np.random.default_rng(0)
    for index, (_, scores) in enumerate(held):
        x = index + jitter.uniform(-0.22, 0.22, len(scores))
        axes.plot(x, scores, ".", color=_BLUE, markersize=3.5, alpha=0.6)
        axes.annotate(
            f"{means[index]:.3f}", (index, 1.02), ha="center", va="bottom", annotation_clip=False
        )
    axes.set_xticks(range(len(held)), [f"{name}\nn = {len(scores)}" for name, scores in held])
    axes.tick_params(axis="x", labelsize=8)
    axes.set(ylim=(0, 1), ylabel="Jaccard", xlabel=label)
    return _svg(figure, label)


def _plot_sweep(evaluation: Evaluation) -> str:
    figure, axes = _axes()
    axes.plot(list(evaluation.sweep), list(evaluation.sweep.values()), "o-", color=_BLUE, ms=3)
    axes.axvline(evaluation.threshold, color="#718096", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="threshold", ylabel="mean Jaccard")
    return _svg(figure, "sweep")


def _plot_calibration(evaluation: Evaluation) -> str:
    figure, axes = _axes()
    confidence, lesion, share = evaluation.calibration.curve()
    width = 0.9 / evaluation.calibration.bins
    axes.bar(confidence, share, width, color="#a0aec0", alpha=0.5)
    axes.plot([0, 1], [0, 1], color="#718096", linestyle="--", linewidth=1)
    axes.plot(confidence, lesion, "o-", color=_BLUE, ms=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted probability", ylabel="share of lesion")
    return _svg(figure, "calibration")
