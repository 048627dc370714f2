"""Reports: the same headings, paragraphs, tables and plots as Markdown and as a page."""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from common.tables import markdown


@dataclass(frozen=True)
class Table:
    """Rows of cells. The first column is aligned to the left, the others to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A picture, and a sentence about what it shows."""

    name: str
    caption: str
    draw: Callable[[Figure], None]
    size: tuple[float, float] = (7.2, 4)
    """Width and height in inches."""


@dataclass(frozen=True)
class Heading:
    """Heading of a section."""

    text: str


Block = Heading | Table | Plot | str


def write_pages(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """Write report.html, and report.md with its plots; return the Markdown without the title."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = {block.name: _svg(block) for block in blocks if isinstance(block, Plot)}
    for name, svg in plots.items():
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    markdown = "\n\n".join(_markdown(block) for block in blocks) + "\n"
    (folder / "report.md").write_text(f"# {title}\n\n{markdown}", encoding="utf-8")
    body = "\n".join(_html(block, plots) for block in blocks)
    page = _PAGE.format(title=title, body=body)
    (folder / "report.html").write_text(page, encoding="utf-8")
    return markdown


def _svg(plot: Plot) -> str:
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.name, "font.size": 10}):
        figure = Figure(figsize=plot.size, layout="constrained")
        plot.draw(figure)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        buffer = StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return re.sub(r"[ \t]+$", "", svg[svg.index("<svg") :], flags=re.MULTILINE)


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Table(head, rows):
            return markdown(head, rows)
        case Plot(name, caption):
            return f"![{caption}]({name}.svg)"
        case _:
            return block


def _html(block: Block, plots: dict[str, str]) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_inline(text)}</h2>"
        case Table(head, rows):
            top = "".join(f"<th>{_inline(cell)}</th>" for cell in head)
            body = "\n".join(
                f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in rows
            )
            return (
                f"<div class=table><table>\n<thead><tr>{top}</tr></thead>\n"
                f"<tbody>{body}</tbody>\n</table></div>"
            )
        case Plot(name, caption):
            return (
                f'<figure role="img" aria-label="{html.escape(caption)}">{plots[name]}'
                f"<figcaption>{_inline(caption)}</figcaption></figure>"
            )
        case _:
            return f"<p>{_inline(block)}</p>"


def _inline(text: str) -> str:
    """Turn the Markdown within a line, which is bold and code, into HTML."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328; background: #fff;
  font: 16px/1.5 system-ui, sans-serif; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }}
th, td {{ padding: 0.3rem 0.6rem; border-bottom: 1px solid #d1d9e0; text-align: right; }}
th {{ vertical-align: bottom; }}
td:first-child, th:first-child {{ text-align: left; }}
figure {{ margin: 1.5rem 0; }}
figure svg {{ max-width: 100%; height: auto; }}
figcaption {{ color: #59636e; font-size: 0.9rem; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""
