"""Tables as text: CSV that people open in spreadsheets, and Markdown.

CSV is hand-written because the standard library's writer neither guards against formulas nor quotes
a lone carriage return.
"""

import re
from collections.abc import Iterable, Sequence

__all__ = ["csv_line", "from_cell", "markdown", "to_cell"]

# Characters that make a spreadsheet take a cell for a formula, also behind blanks and in full
# width; and the apostrophe itself, so that different texts make different cells.
_FORMULA = re.compile(r"['\s]*[=+\-@\uff1d\uff0b\uff0d\uff20]|['\t\r\n]")


def to_cell(text: str) -> str:
    """`text` as a cell that no spreadsheet runs: an apostrophe is put before it if needed."""
    return f"'{text}" if _FORMULA.match(text) else text


def from_cell(cell: str) -> str:
    """The text that `to_cell` made a cell of."""
    return cell.removeprefix("'")


def csv_line(cells: list[object]) -> str:
    """A row, with quotes where they are needed; text goes through `to_cell`, None is empty."""
    return ",".join(map(_quoted, cells)) + "\n"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, whose columns after the first one hold figures."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _quoted(cell: object) -> str:
    if cell is None:
        return ""
    text = to_cell(cell) if isinstance(cell, str) else str(cell)
    if any(character in text for character in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text
