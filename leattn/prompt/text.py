"""A compiled prompt as text and as HTML: spans, positions and the node × node mask in blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leattn.table import html_table

if TYPE_CHECKING:
    from leattn.prompt.compile import CompiledPrompt

MAX_NODES = 48
"""Prompts with more nodes show their first and last few, and no blocks."""
EDGE_NODES = 12


def prompt_text(prompt: CompiledPrompt) -> str:
    """One line per node: layout index, name, token span, positions, and which nodes it sees (■ sees, ⬚ does not)."""
    rows = _rows(prompt)
    widths = [max(len(row[i]) for row in rows if row) for i in range(4)] if rows else []
    lines = [_summary(prompt)]
    for row in rows:
        if not row:
            lines.append(f"  … {len(prompt.graph) - 2 * EDGE_NODES} more nodes")
            continue
        padded = (cell.ljust(width) for cell, width in zip(row[1:4], widths[1:], strict=True))
        cells = [row[0].rjust(widths[0]), *padded, row[4]]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def prompt_html(prompt: CompiledPrompt) -> str:
    """The same table for notebooks, with the text of each node."""
    cells: list[tuple[str, ...]] = []
    for row in _rows(prompt):
        if not row:
            cells.append((f"… {len(prompt.graph) - 2 * EDGE_NODES} more nodes",))
            continue
        text = prompt[prompt.graph.nodes[int(row[0])]].text
        cells.append((*row[:4], repr(text if len(text) <= 80 else text[:77] + "…"), row[4]))
    return html_table(["", "node", "tokens", "positions", "text", "sees"], cells, caption=_summary(prompt), pre=[5])


def _summary(prompt: CompiledPrompt) -> str:
    count = len(prompt.graph)
    return f"{count} node{'s' * (count != 1)}, {len(prompt)} tokens, density {prompt.density:.2f}"


def _rows(prompt: CompiledPrompt) -> list[tuple[str, str, str, str, str]]:
    """Index, name, span, positions and blocks of each node; an empty tuple stands for the nodes left out."""
    count = len(prompt.graph)
    small = count <= MAX_NODES
    shown = list(range(count)) if small else [*range(EDGE_NODES), *range(count - EDGE_NODES, count)]
    rows: list[tuple[str, str, str, str, str]] = []
    for i in shown:
        if not small and i == count - EDGE_NODES:
            rows.append(())  # type: ignore[arg-type]
        start, end = prompt.offsets[i], prompt.offsets[i + 1]
        first = int(prompt.position_ids[0, start])
        seen = {i, *prompt.visible.nodes_seen(i)} if small else set()
        blocks = "".join("■" if j in seen else "⬚" for j in range(count)) if small else ""
        name = " ".join(prompt.graph.names[prompt.graph.nodes[i]].split()) or "·"
        rows.append((str(i), name, f"tokens {start}:{end}", f"positions {first}:{first + end - start}", blocks))
    return rows
