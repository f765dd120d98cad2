"""A graph as boxes and arrows, parents above the nodes that see them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from leattn.dag.draw import reads
from leattn.dag.gennode import GenNode, mark
from leattn.dag.graph import ICLGraph, as_graph
from leattn.dag.node import ICLNode, Prefix
from leattn.dag.reading import Reading
from leattn.prompt.compiled import CompiledPrompt
from leattn.viz.boxes import FONT, HEIGHT, Boxes
from leattn.viz.canvas import finish, new_axes, size_inches, title_width
from leattn.viz.layers import Layout, lay_out
from leattn.viz.style import FloatArray, drawable, node_colours, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL = 60
MAX_ARROWS = 80
"""Graphs of up to this many nodes and straight arrows are drawn by daft, larger ones as a handful of collections."""
MAX_EDGES = 6000
_MARGIN = 0.2
_LARGEST = (16.0, 24.0)


def plot_dag(
    graph: ICLNode | Iterable[ICLNode] | ICLGraph | CompiledPrompt,
    *,
    ax: Axes | None = None,
    path: str | Path | None = None,
    title: str | None = None,
) -> Axes:
    """Which node sees which: an arrow runs from a parent down to the node that names it.

    A box has the colour of its node in every other picture, an arrow that of the parent it starts from. The outline of a
    node that the model writes is dashed, and in graphs of up to ``SMALL`` nodes its label says how many tokens at most; behind
    ◂ stands how many nodes are read in another way than as they are, and how.

    Parameters
    ----------
    graph
        A node or several, a graph, or a compiled prompt, of which edges that an edit has cut are dashed.
    ax
        Where to draw; the picture is shrunk to fit. Otherwise a new figure as large as the graph needs.
    path
        Write the figure there: PNG, SVG or PDF by its suffix.
    title
        Instead of the one that counts nodes and edges; ``""`` for none.

    Raises
    ------
    LeattnError
        The installed ``daft`` is the distributed dataframe, not daft-pgm; an unknown suffix.

    Examples
    --------
    >>> doc = ICLNode("The sky is blue.", id="doc")
    >>> plot_dag(ICLNode("What colour is the sky?", parents=[doc], id="Q")).get_title(loc="left")
    'prompt graph: 2 nodes, 1 edge'

    Notes
    -----
    Layers are longest paths from the roots; a layer that is too wide goes on in further rows. Of more than ``MAX_EDGES``
    edges those between the nearest layout neighbours are drawn, and the title says so.
    """
    cut: set[tuple[int, int]] = set()
    nodes = graph.graph if isinstance(graph, CompiledPrompt) else as_graph(graph)
    count = len(nodes)
    edges, total = _edges(nodes)
    if isinstance(graph, CompiledPrompt):
        cut = {(parent, child) for parent, child in edges if not graph.visible.sees(child, parent)}
    limit = 28 if count <= SMALL else 12
    marks = [mark(node) if count <= SMALL else "✎" * isinstance(node, GenNode) for node in nodes]
    readings = _readings(graph, nodes)
    for i, groups in readings.items() if count <= SMALL else ():
        marks[i] += reads(groups)
    labels = [drawable(f"{drawable(name, limit)} {sign}", 48) for name, sign in zip(nodes.names.values(), marks, strict=True)]
    written = {i for i, node in enumerate(nodes) if isinstance(node, GenNode)}
    widths = [max(text_width(label, FONT) + 0.2, 0.42) for label in labels]
    parents: list[list[int]] = [[] for _ in range(count)]
    for parent, child in edges:
        parents[child].append(parent)
    layout = lay_out(parents, widths, HEIGHT, gap=0.22 if count <= SMALL else 0.1)
    if title is None:
        some = f"{total:,} edge{'s' * (total != 1)}"
        some = some if total == len(edges) else f"the {len(edges):,} shortest of {some}"
        title = f"prompt graph: {count:,} node{'s' * (count != 1)}, {some}" + (f" ({len(cut)} cut)" if cut else "")
        title += f"; dashed: written by the model ({len(written):,})" if written else ""
        title += f"; {len(readings):,} read otherwise" if readings else ""

    arcs = _arcs(layout, edges, widths)
    ax, size = _axes(ax, layout, widths, arcs, title)
    boxes = Boxes(ax, layout.centres, labels, widths, node_colours(count), cut, written, size)
    boxes.draw_curves(arcs, layout.bends)
    straight = [edge for edge in edges if edge not in arcs and edge not in layout.bends]
    if count <= SMALL and len(straight) <= MAX_ARROWS:
        boxes.draw_with_daft(straight)
    else:
        boxes.draw_collections(straight)
    return finish(ax, title, path)


def _readings(graph: object, nodes: ICLGraph) -> dict[int, list[tuple[int, Reading]]]:
    """The nodes that read groups in other ways, by layout index: how many nodes each group has, and how it is read."""
    if isinstance(graph, CompiledPrompt):
        readings = graph.visible.readings.items()
        return {i: [(sum(stop - start for start, stop in runs), how) for runs, how in groups] for i, groups in readings}
    each = ((i, [(len(group.nodes), group.reading) for group in node.readings]) for i, node in enumerate(nodes))
    return {i: groups for i, groups in each if groups}


def _edges(graph: ICLGraph) -> tuple[list[tuple[int, int]], int]:
    """(parent, child) by layout index, and how many there are: the list keeps ``MAX_EDGES``, nearest parents first."""
    total = sum(len(node.parents) for node in graph.nodes)
    if total <= MAX_EDGES:
        return [(graph.index[p], i) for i, node in enumerate(graph.nodes) for p in node.parents], total
    near = max(1, MAX_EDGES // len(graph))
    edges = []
    for i, node in enumerate(graph.nodes):
        # A causal prompt's growing list is in layout order: no need to look at all N²/2 of its edges.
        candidates = node.parents[-near:] if isinstance(node.parents, Prefix) else node.parents
        edges += [(p, i) for p in sorted((graph.index[p] for p in candidates), reverse=True)[:near]]
    return edges, total


def _arcs(layout: Layout, edges: list[tuple[int, int]], widths: list[float]) -> dict[tuple[int, int], FloatArray]:
    """On a spine, edges that skip nodes leave and enter on the right: four control points each, ``[4, 2]``."""
    arcs = {}
    for parent, child in edges if layout.spine else []:
        if child - parent > 1:
            (x0, y0), (x1, y1) = layout.centres[parent], layout.centres[child]
            # Where it leaves is a little below the middle, where arcs come in a little above.
            start, end = (x0 + widths[parent] / 2, y0 - 0.05), (x1 + widths[child] / 2, y1 + 0.05)
            out = max(start[0], end[0]) + min(0.16 * (child - parent) + 0.1, 4.0) * 4 / 3
            arcs[parent, child] = np.array([start, (out, y0 - 0.05), (out, y1 + 0.05), end])
    return arcs


def _axes(
    ax: Axes | None,
    layout: Layout,
    widths: list[float],
    arcs: dict[tuple[int, int], FloatArray],
    title: str,
) -> tuple[Axes, float]:
    """Axes in units of inches, and how much smaller than planned everything is."""
    half = np.asarray(widths) / 2
    points = [(x, y) for route in layout.bends.values() for x, y in route]
    points += [(0.25 * p[0, 0] + 0.75 * p[1, 0] + 0.05, p[0, 1]) for p in arcs.values()]
    extra = np.asarray(points).reshape(-1, 2)
    low_x = min((layout.centres[:, 0] - half).min(), extra[:, 0].min(initial=0)) - _MARGIN
    high_x = max((layout.centres[:, 0] + half).max(), extra[:, 0].max(initial=0)) + _MARGIN
    low_y, high_y = layout.centres[:, 1].min() - HEIGHT / 2 - _MARGIN, layout.centres[:, 1].max() + HEIGHT / 2 + 0.08
    width, height = float(high_x - low_x), float(high_y - low_y)
    if ax is None:
        size = min(1.0, _LARGEST[0] / width, _LARGEST[1] / height)
        inner = (max(width * size, title_width(title) + 0.1), height * size)
        ax = new_axes(*inner, title, left=_MARGIN, bottom=0.0, above=0.08)
    else:
        inner = size_inches(ax)
        size = min(1.0, inner[0] / width, inner[1] / height)
    middle_x, middle_y = (low_x + high_x) / 2, (low_y + high_y) / 2
    ax.set_xlim(middle_x - inner[0] / size / 2, middle_x + inner[0] / size / 2)
    ax.set_ylim(middle_y - inner[1] / size / 2, middle_y + inner[1] / size / 2)
    ax.set_axis_off()
    return ax, size
