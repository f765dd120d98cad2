"""Where the boxes of a graph go: layers from the roots down, few crossings, everything in inches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from leattn.viz.spread import spread
from leattn.viz.style import FloatArray

WIDTH = (13.0, 26.0)
"""Inches after which a layer goes on in a further row: in small graphs, and at most in large ones."""
COLUMN = 64
"""A spine of more nodes runs down and up in several columns."""
MAX_BENDS = 500
"""Long edges are led around the boxes of the layers they pass while that takes no more bends than this."""
SWEEPS = 8


@dataclass(frozen=True)
class Layout:
    """Centres of N boxes, and the bends of the edges that pass other layers. Inches; y grows upwards.

    Attributes
    ----------
    centres
        ``[N, 2]``.
    bends
        ``(parent, child)`` → the points between the two, for long edges that are led around boxes.
    spine
        Whether every layer is one node, so that long edges are best drawn as arcs beside it.
    """

    centres: FloatArray
    bends: dict[tuple[int, int], list[tuple[float, float]]]
    spine: bool


def depths(parents: Sequence[Sequence[int]]) -> list[int]:
    """The longest path from a root to each node. Parents come first in the layout.

    Examples
    --------
    >>> depths([[], [0], [0], [0, 2]])
    [0, 1, 1, 2]
    """
    found: list[int] = []
    for row in parents:
        found.append(1 + max((found[p] for p in row), default=-1))
    return found


def lay_out(parents: Sequence[Sequence[int]], widths: Sequence[float], height: float, *, gap: float) -> Layout:
    """Place N boxes of the given ``widths`` and one ``height``, ``gap`` apart sideways; parents above their children."""
    count = len(parents)
    depth = depths(parents)
    layers: list[list[int]] = [[] for _ in range(max(depth) + 1)]
    for node, level in enumerate(depth):
        layers[level].append(node)
    if all(len(layer) == 1 for layer in layers):
        return _spine(count, widths, height)
    up = [list(row) for row in parents]
    sizes = list(widths)
    # As many boxes as this fill about a square.
    most = float(np.clip(np.sqrt((sum(widths) + gap * count) * 3 * height), *WIDTH))
    wide = any(sum(widths[i] + gap for i in layer) > most for layer in layers)
    reach = [0] * count  # the deepest child of each node
    for child, row in enumerate(parents):
        for parent in row:
            reach[parent] = max(reach[parent], depth[child])
    if wide or sum(max(0, last - depth[i] - 1) for i, last in enumerate(reach)) > MAX_BENDS:
        order = _ordered(layers, up)
        return Layout(_rows(order, up, sizes, height, gap, most)[:count], {}, spine=False)

    # One bend per layer that the edges of a node pass; edges from the same parent share their bends.
    trunk: dict[tuple[int, int], int] = {}
    for node in range(count):
        above = node
        for level in range(depth[node] + 1, reach[node]):
            bend = len(up)
            up.append([above])
            sizes.append(0.04)
            layers[level].insert(len(layers[level]) // 2, bend)  # among equals, long edges pass in the middle
            trunk[node, level] = above = bend
    for child, row in enumerate(parents):
        up[child] = [trunk.get((parent, depth[child] - 1), parent) for parent in row]
    order = _ordered(layers, up)
    centres = _rows(order, up, sizes, height, gap, most)
    bends = {
        (parent, child): [tuple(centres[trunk[parent, level]]) for level in range(depth[parent] + 1, depth[child])]
        for child, row in enumerate(parents)
        for parent in row
        if depth[child] - depth[parent] > 1
    }
    return Layout(centres[:count], bends, spine=False)


def _spine(count: int, widths: Sequence[float], height: float) -> Layout:
    pitch = height + 0.26
    if count <= COLUMN:
        return Layout(np.stack([np.zeros(count), -np.arange(count) * pitch], axis=1), {}, spine=True)
    column_width = max(widths) + 0.4
    tall = int(np.ceil(np.sqrt(count * column_width / pitch)))
    column, row = np.divmod(np.arange(count), tall)
    row = np.where(column % 2, tall - 1 - row, row)
    return Layout(np.stack([column * column_width, -row * pitch], axis=1), {}, spine=False)


def _ordered(layers: list[list[int]], up: list[list[int]]) -> list[list[int]]:
    """The layers with few crossings: each in turn sorted by where its neighbours above, then below, stand."""
    down: list[list[int]] = [[] for _ in up]
    for node, row in enumerate(up):
        for above in row:
            down[above].append(node)
    layers = [list(layer) for layer in layers]
    place = np.zeros(len(up))
    for layer in layers:
        place[layer] = (np.arange(len(layer)) + 0.5) / len(layer)
    best, best_cost = [list(layer) for layer in layers], np.inf
    for sweep in range(SWEEPS):
        neighbours = up if sweep % 2 == 0 else down
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wanted = {i: float(np.mean(place[neighbours[i]])) if neighbours[i] else float(place[i]) for i in layer}
            layer.sort(key=wanted.__getitem__)
            place[layer] = (np.arange(len(layer)) + 0.5) / len(layer)
        # Short edges stand in for few crossings, which would cost more to count.
        cost = sum(float(np.abs(place[row] - place[i]).sum()) for i, row in enumerate(up) if row)
        if cost < best_cost - 1e-9:
            best, best_cost = [list(layer) for layer in layers], cost
    return best


def _rows(
    layers: list[list[int]], up: list[list[int]], sizes: Sequence[float], height: float, gap: float, most: float
) -> FloatArray:
    """Centres: layers that are too wide are broken into rows; within a row, boxes stand near their neighbours."""
    rows: list[list[int]] = []
    first_of_layer: list[bool] = []
    for layer in layers:
        lines = int(np.ceil(sum(sizes[i] + gap for i in layer) / most))
        each = -(-len(layer) // lines)
        for start in range(0, len(layer), each):
            rows.append(layer[start : start + each])
            first_of_layer.append(start == 0)
    down: list[list[int]] = [[] for _ in up]
    for node, above in enumerate(up):
        for parent in above:
            down[parent].append(node)
    distances = [[(sizes[a] + sizes[b]) / 2 + gap for a, b in pairwise(row)] for row in rows]
    x = np.zeros(len(up))
    for row, apart in zip(rows, distances, strict=True):
        places = np.concatenate([[0.0], np.cumsum(apart)])
        x[row] = places - places[-1] / 2
    for sweep in range(SWEEPS):
        for row, apart in list(zip(rows, distances, strict=True))[:: 1 if sweep % 2 == 0 else -1]:
            if len(rows) > len(layers) and len(row) > 1:
                continue  # rows of a broken layer are full: they stay centred
            near = [up[i] + down[i] if sweep >= SWEEPS // 2 else (up[i] if sweep % 2 == 0 else down[i]) for i in row]
            x[row] = spread([float(np.mean(x[n])) if n else float(x[i]) for i, n in zip(row, near, strict=True)], apart)
    x -= (x.min() + x.max()) / 2

    centres = np.zeros((len(up), 2))
    deepest = 1.5 if len(rows) <= 12 else 0.6
    y = 0.0
    for row, first in zip(rows, first_of_layer, strict=True):
        # Edges to nodes far aside need room to fall; rows of one layer have no edges between them.
        slant = max((abs(float(x[i] - x[above])) for i in row for above in up[i]), default=0.0) if first else 0.0
        y -= height + (float(np.clip(0.26 * slant, 0.36, deepest)) if first else 0.14)
        centres[row, 0], centres[row, 1] = x[row], y
    return centres
