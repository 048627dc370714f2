"""Text in CSV tables that people open in spreadsheets."""

import re

__all__ = ["csv_line", "from_cell", "to_cell"]

# What spreadsheets take for a formula at the start of a cell, also behind blanks and in full width;
# and the apostrophe itself, so that every text has a cell of its own.
_FORMULA = re.compile(r"['\s]*[=+\-@\uff1d\uff0b\uff0d\uff20]|['\t\r\n]")


def to_cell(text: str) -> str:
    """`text` as a cell that no spreadsheet runs: with an apostrophe before it where it must be."""
    return f"'{text}" if _FORMULA.match(text) else text


def from_cell(cell: str) -> str:
    """The text that `to_cell` made a cell of."""
    return cell.removeprefix("'")


def csv_line(cells: list[object]) -> str:
    """A row, quoted where need be; text as `to_cell`, None as nothing.

    The writer of the standard library leaves a carriage return bare where lines end in a line feed.
    """
    return ",".join(map(_quoted, cells)) + "\n"


def _quoted(cell: object) -> str:
    if cell is None:
        return ""
    text = to_cell(cell) if isinstance(cell, str) else str(cell)
    if any(character in text for character in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text
