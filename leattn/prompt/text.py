"""A prompt as a table for people: spans, positions and the node × node mask in blocks."""

from __future__ import annotations

from collections.abc import Sequence

from leattn.dag.node import Position
from leattn.prompt.visible import Visible

MAX_NODES = 48
"""Prompts with more nodes show their first and last few, and no blocks."""
EDGE_NODES = 12
MARKS = "▣▤▥▦▧▨▩"
"""Of groups that a node reads in another way, in turn."""


def node_rows(names: Sequence[str], offsets: Sequence[int], at: Sequence[Position], visible: Visible) -> list[tuple[str, ...]]:
    """Index, name, span, positions and blocks of each node; one cell for the nodes left out. ``at`` are all tokens' positions.

    ■ is seen, ⬚ is not; each group that is read in another way has a mark of its own, and behind the blocks stands which.
    """
    count = len(names)
    small = count <= MAX_NODES
    rows: list[tuple[str, ...]] = []
    for i in range(count) if small else [*range(EDGE_NODES), *range(count - EDGE_NODES, count)]:
        if not small and i == count - EDGE_NODES:
            rows.append((f"… {count - 2 * EDGE_NODES} more nodes",))
        start, end = offsets[i], offsets[i + 1]
        seen = {i, *visible.nodes_seen(i)} if small else set()
        marks = {
            j: MARKS[g % len(MARKS)]
            for g, (runs, _) in enumerate(visible.readings.get(i, ()))
            for first, last in runs
            for j in range(first, last)
        }
        blocks = "".join(marks.get(j, "■") if j in seen else "⬚" for j in range(count)) if small else ""
        for g, (_, reading) in enumerate(visible.readings.get(i, ())):
            blocks += f"  {MARKS[g % len(MARKS)]} {reading}"
        name, positions = " ".join(names[i].split()) or "·", f"positions {_shown(at[start])}:{_shown(_next(at[start:end]))}"
        rows.append((str(i), name, f"tokens {start}:{end}", positions, blocks))
    return rows


def _next(positions: Sequence[Position]) -> Position:
    """Where one more token would stand, as far from the last as that is from the one before."""
    return positions[-1] + (positions[-1] - positions[-2] if len(positions) > 1 else 1)


def _shown(position: Position) -> str:
    return str(position) if isinstance(position, int) else f"{position:.2f}".rstrip("0").rstrip(".")


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The rows as lines, in columns."""
    widths = [max(len(row[i]) for row in rows if len(row) > 1) for i in range(4)] if rows else []
    lines = []
    for row in rows:
        if len(row) > 1:
            padded = (cell.ljust(width) for cell, width in zip(row[1:4], widths[1:], strict=True))
            row = (row[0].rjust(widths[0]), *padded, row[4])
        lines.append(("  " + "  ".join(row)).rstrip())
    return lines
