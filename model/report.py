"""An evaluation as a page that says where a network is good and where it is not.

`write_report` writes `index.html`, `report.json`, `report.csv` and `conditions.csv` into a folder:
the Jaccard by skin tone, lesion size and what else the photos show (`model.conditions`), and what
poorer photos cost (`model.variations`). A group that lags behind the others by more than chance
explains is named, and so is one that is too small for a judgement.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.conditions import SIDE, SKIN_TONES, Conditions, conditions
from model.evaluate import Case, Evaluation, Network, write_table
from model.metrics import METRICS, THRESHOLD_JACCARD, count, jaccard
from model.truth import is_lesion, read_truth
from model.variations import ROTATIONS, VARIATIONS, rotated
from photos.image import lesion_mask, read_photo, unpack_mask

FEW = 10
"""A group of fewer photos is too small for a judgement."""

_SHARES = (0, 0.02, 0.05, 0.1, 0.2, 0.4, 1)
_BATCH = 16

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """Photos that have something in common."""

    factor: str
    name: str
    photos: int
    jaccard: float
    error: float
    """Standard error of the mean over photos."""
    low: int
    """Photos with a Jaccard below 0.65."""
    against_rest: float
    """Mean Jaccard less that of all other photos; NaN if those are too few."""
    against_error: float
    """Standard error of that."""

    @property
    def verdict(self) -> str:
        """Whether it lags behind."""
        if self.photos < FEW:
            return "too few to say"
        if np.isnan(self.against_rest) or abs(self.against_rest) <= 2 * self.against_error:
            return ""
        return "behind" if self.against_rest < 0 else "ahead"


def groups(scores: Scores, shown: Sequence[Conditions], shares: Scores) -> list[Group]:
    """Sort photos by all that is told of them.

    Args:
        scores: Jaccard of each photo's mask.
        shown: what each photo shows.
        shares: the lesion's part of each frame, 0 to 1.
    """
    tones = np.array([each.skin_tone for each in shown])
    found = [
        _group("skin tone", name, scores, tones == name)
        for name in (*(name for name, _ in SKIN_TONES), "no skin to be seen")
    ]
    for low, high in pairwise(_SHARES):
        inside = ((shares > low) | (low == 0)) & (shares <= high)
        found.append(
            _group("lesion, share of the frame", f"{low:.0%} to {high:.0%}", scores, inside)
        )
    for factor in ("hair", "pen_marks", "ruler", "dark_corners"):
        has = np.array([getattr(each, factor) for each in shown])
        name = factor.replace("_", " ")
        found += [_group(name, "yes", scores, has), _group(name, "no", scores, ~has)]
    return [group for group in found if group.photos]


def _group(factor: str, name: str, scores: Scores, inside: NDArray[np.bool_]) -> Group:
    own, rest = scores[inside], scores[~inside]
    if not own.size:
        return Group(factor, name, 0, *(float("nan"),) * 2, 0, *(float("nan"),) * 2)
    error, rest_error = _error(own), _error(rest)
    return Group(
        factor,
        name,
        len(own),
        float(own.mean()),
        error,
        int((own < THRESHOLD_JACCARD).sum()),
        float(own.mean() - rest.mean()) if rest.size >= FEW else float("nan"),
        float(np.hypot(error, rest_error)),
    )


def _error(values: Scores) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def look(case: Case) -> Conditions:
    """What a case's photo shows; it is read again."""
    pixels, lesion = _square(case)
    return conditions(pixels, lesion)


def _square(case: Case) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A photo and its true mask as squares."""
    photo = read_photo(case.sample.image.read_bytes(), size=SIDE)
    truth = Image.fromarray(read_truth(case.sample.mask)).convert("L")
    return photo.pixels, is_lesion(np.asarray(truth.resize((SIDE, SIDE), Image.Resampling.BOX)))


@dataclass(frozen=True)
class Variation:
    """What one strength of a variation does to the mean."""

    name: str
    strength: float
    unit: str
    jaccard: float
    change: float
    """Mean difference from the same photos unchanged."""
    error: float
    """Standard error of that, over photos."""


def vary(evaluation: Evaluation) -> list[Variation]:
    """Score the network on every photo in every variation, at the size of the square."""
    network, threshold = evaluation.network, evaluation.threshold
    squares = [_square(case) for case in evaluation.cases]
    plain = _scores(network, threshold, squares)
    found = []
    for name, (change, strengths, unit) in VARIATIONS.items():
        for strength in strengths:
            changed = [(change(pixels, strength), lesion) for pixels, lesion in squares]
            scores = _scores(network, threshold, changed)
            found.append(_variation(name, strength, unit, scores, plain))
    for degrees in ROTATIONS:
        turned: list[Any] = [
            (rotated(pixels, degrees), rotated(lesion, degrees)) for pixels, lesion in squares
        ]
        scores = _scores(network, threshold, turned)
        found.append(_variation("rotation", degrees, "degrees", scores, plain))
    return found


def _variation(name: str, strength: float, unit: str, scores: Scores, plain: Scores) -> Variation:
    change = scores - plain
    return Variation(
        name, strength, unit, float(scores.mean()), float(change.mean()), _error(change)
    )


def _scores(
    network: Network,
    threshold: float,
    squares: Sequence[tuple[NDArray[np.uint8], NDArray[np.bool_]]],
) -> Scores:
    scores: list[float] = []
    for start in range(0, len(squares), _BATCH):
        part = squares[start : start + _BATCH]
        size = (network.size, network.size)
        small = [
            np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
            for pixels, _ in part
        ]
        for probability, (_, lesion) in zip(network.predict(np.stack(small)), part, strict=True):
            mask = unpack_mask(lesion_mask(probability, SIDE, SIDE, threshold), SIDE)
            scores.append(float(jaccard(count(mask, lesion))))
    return np.array(scores)


def write_report(
    evaluation: Evaluation, folder: Path, tell: Callable[[str], None] = lambda _: None
) -> Path:
    """Write the page of an evaluation and the tables behind it.

    Args:
        evaluation: result of `model.evaluate.evaluate`; its images and masks are read again.
        folder: made if it is missing. Nothing is written elsewhere.
        tell: told what is being done.

    Returns:
        The path of the page, `folder/index.html`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores = jaccard(evaluation.confusion)
    tell("looking at what the photos show")
    shown = [look(case) for case in evaluation.cases]
    shares = np.array([case.lesion_share for case in evaluation.cases])
    found = groups(scores, shown, shares)
    tell("varying the photos: minutes")
    varied = vary(evaluation)
    figures = {
        **evaluation.report(),
        "groups": [_plain(asdict(group)) | {"verdict": group.verdict} for group in found],
        "variations": [asdict(variation) for variation in varied],
    }
    (folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    write_table(folder / "report.csv", evaluation.rows())
    write_table(
        folder / "conditions.csv",
        [
            {"id": row["id"], **asdict(each), "skin_tone": each.skin_tone}
            for row, each in zip(evaluation.rows(), shown, strict=True)
        ],
    )
    page = folder / "index.html"
    page.write_text(_page(evaluation, found, varied), encoding="utf-8")
    return page


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN."""
    return {key: None if value != value else value for key, value in values.items()}


def gaps(found: Sequence[Group]) -> list[str]:
    """The groups that lag behind, the furthest first, and those too small for a judgement."""
    behind = sorted((g for g in found if g.verdict == "behind"), key=lambda g: g.against_rest)
    few = [f"{g.factor} “{g.name}” ({g.photos})" for g in found if g.verdict == "too few to say"]
    lines = [
        f"{g.factor} “{g.name}”: {g.jaccard:.3f} on {g.photos} photos, {g.against_rest:+.3f} ±"
        f" {g.against_error:.3f} against all others"
        for g in behind
    ]
    return lines + ([f"too few photos to say: {', '.join(few)}"] if few else [])


def _page(evaluation: Evaluation, found: Sequence[Group], varied: Sequence[Variation]) -> str:
    report = evaluation.report()
    names = {key: report["model"][key] for key in ("file", "version") if key in report["model"]}
    model = escape(" ".join(names.values()))
    means = "".join(
        f"<tr><td>{name.replace('_', ' ')}</td><td>{report[name]:.4f}</td></tr>\n"
        for name in (*METRICS, "calibration_error")
    )
    named = "".join(f"<li>{escape(line)}</li>\n" for line in gaps(found)) or "<li>none</li>"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Where {model} is good, and where not</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>Where {model} is good, and where not</h1>
<p>{report["count"]} photos, threshold {evaluation.threshold:g}. Figures are means over photos; ± is
their standard error.</p>
<table>{means}</table>
<h2>Gaps</h2>
<p>Groups that are behind all other photos by more than two standard errors, and groups of fewer
than {FEW}. With so many groups, one in forty is named by chance.</p>
<ul>{named}</ul>
<h2>By what the photos show</h2>
{_groups_table(found)}
<h2>On poorer photos</h2>
<p>Each photo is changed at {SIDE}×{SIDE} pixels and scored there; the change is paired, photo by
photo.</p>
{_variations_table(varied)}
<h2>How it was told</h2>
<pre>{escape(_how())}</pre>
</body></html>
"""


def _how() -> str:
    import model.conditions

    return (model.conditions.__doc__ or "").strip()


def _groups_table(found: Sequence[Group]) -> str:
    head = "<tr><th>factor</th><th>group</th><th>photos</th><th>Jaccard</th><th>below 0.65</th>"
    rows = "".join(
        f"<tr><td>{escape(g.factor)}</td><td>{escape(g.name)}</td><td>{g.photos}</td>"
        f"<td>{g.jaccard:.3f} ± {g.error:.3f}</td><td>{g.low}</td>"
        f"<td>{_signed(g.against_rest, g.against_error)}</td><td>{g.verdict}</td></tr>\n"
        for g in found
    )
    return f"<table>{head}<th>against all others</th><th></th></tr>\n{rows}</table>"


def _variations_table(varied: Sequence[Variation]) -> str:
    rows = "".join(
        f"<tr><td>{escape(v.name)}</td><td>{v.strength:g}</td><td>{escape(v.unit)}</td>"
        f"<td>{v.jaccard:.3f}</td><td>{_signed(v.change, v.error)}</td></tr>\n"
        for v in varied
    )
    head = (
        "<tr><th>variation</th><th>strength</th><th>unit</th><th>Jaccard</th><th>change</th></tr>"
    )
    return f"<table>{head}\n{rows}</table>"


def _signed(value: float, error: float) -> str:
    return "–" if np.isnan(value) else f"{value:+.3f} ± {error:.3f}"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; background: #f7fafc;
       max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; }
table { border-collapse: collapse; background: #fff; }
td, th { padding: .25rem .8rem; border: 1px solid #e2e8f0; text-align: left; }
pre { white-space: pre-wrap; font: inherit; }
"""
