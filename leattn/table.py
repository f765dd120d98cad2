"""Tables for notebooks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from html import escape

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
