"""Rows in columns: for notebooks, as text, and as a pandas frame."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from leattn.errors import LeattnError

TEXT = "text-align:left;white-space:pre-wrap"
PRE = "text-align:left;white-space:pre;font-family:monospace"


def html_table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    note: str = "",
    *,
    caption: str = "",
    pre: Collection[int] = (),
) -> str:
    """A table of texts and numbers, between a sentence above it and one below.

    Parameters
    ----------
    head
        Names of the columns; empty for none.
    rows
        Their cells. Floats are shown with three digits after the point, and everything is escaped. A row of a single cell in a
        table of several columns goes across all of them.
    note, caption
        Below and above.
    pre
        Columns whose signs stand below one another: monospaced, and never broken.

    Examples
    --------
    >>> html_table(["draft", "score"], [("a<b", 0.5)]).replace(" style='text-align:left;white-space:pre-wrap'", "")
    '<table><tr><th>draft</th><th>score</th></tr><tr><td>a&lt;b</td><td>0.500</td></tr></table>'
    """
    table = [list(row) for row in rows]
    width = max(map(len, [head, *table]))
    lines = ["".join(f"<th style='{TEXT}'>{escape(name)}</th>" for name in head)] if head else []
    for row in table:
        across = f" colspan='{width}'" if len(row) == 1 < width else ""
        styles = (PRE if i in pre and not across else TEXT for i in range(len(row)))
        lines.append(
            "".join(f"<td{across} style='{style}'>{_shown(cell)}</td>" for style, cell in zip(styles, row, strict=True))
        )
    above, below = (f"<p>{escape(text)}</p>" if text else "" for text in (caption, note))
    return f"{above}<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>{below}"


def _shown(cell: object) -> str:
    return escape(f"{cell:.3f}" if isinstance(cell, float) else str(cell))


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side; those whose cells are all numbers stand on the right.

    Examples
    --------
    >>> print(text_table(["node", "nats"], [["doc", "+1.50"], ["Q", "-0.25"]]))
    node   nats
    doc   +1.50
    Q     -0.25
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [len(column) > 1 and all(_is_number(cell) for cell in column[1:]) for column in columns]
    lines = []
    for row in (header, *rows):
        cells = (
            cell.rjust(width) if on_the_right else cell.ljust(width)
            for cell, width, on_the_right in zip(row, widths, right, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def data_frame(columns: Mapping[str, Sequence[Any]]) -> Any:
    """A ``pandas.DataFrame`` of named columns.

    Raises
    ------
    LeattnError
        pandas is not installed; leattn does not need it otherwise.
    """
    try:
        import pandas  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise LeattnError(
            "to_pandas needs pandas, which is not installed; `pip install pandas`, or use .rows, which hold the same"
        ) from error
    return pandas.DataFrame({name: list(values) for name, values in columns.items()})


def _is_number(cell: str) -> bool:
    try:
        float(cell or "0")
    except ValueError:
        return False
    return True
