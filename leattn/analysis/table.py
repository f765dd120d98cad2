"""Rows in columns: as text and as a pandas frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from leattn.errors import LeattnError


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
