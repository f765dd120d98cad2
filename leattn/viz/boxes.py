"""Boxes and arrows on axes in inches: a few through daft-pgm, many as a handful of collections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.path import Path as Outline

from leattn.errors import LeattnError
from leattn.viz.style import INK, PLAIN, FloatArray, lighten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 0.29
FONT = 9.0
_LEGIBLE = 3.6
_MOST_LABELS = 700
_HEAD = (0.1, 0.075)
"""Length and width of an arrow head."""
_CUT = "#9a9aa2"
_DASHES = (0, (3.5, 2.5))

Edge = tuple[int, int]
Point = tuple[float, float]


def load_daft() -> ModuleType:
    """daft-pgm, which is imported as ``daft``.

    Raises
    ------
    LeattnError
        It is missing, or the distributed dataframe of the same name is installed.
    """
    try:
        import daft
    except ImportError as error:
        raise LeattnError("plot_dag draws with daft-pgm, which cannot be imported; run: pip install daft-pgm") from error
    if not hasattr(daft, "PGM"):
        raise LeattnError(
            "the installed 'daft' has no PGM: it is PyPI's distributed dataframe and not daft-pgm, which has the same module "
            "name; run: pip uninstall daft, then: pip install --force-reinstall daft-pgm"
        )
    module: ModuleType = daft
    return module


@dataclass(frozen=True)
class Boxes:
    """N boxes to be drawn.

    Attributes
    ----------
    ax
        Its data units are inches, before shrinking.
    centres
        ``[N, 2]``.
    labels, widths, colours
        Of each box; ``colours`` is ``[N, 3]``.
    cut
        Edges (parent, child) that are dashed and have no head.
    written
        Boxes whose outline is dashed: nodes that the model writes.
    size
        By how much everything is shrunk, text included.
    """

    ax: Axes
    centres: FloatArray
    labels: Sequence[str]
    widths: Sequence[float]
    colours: FloatArray
    cut: set[Edge]
    written: set[int]
    size: float

    def draw_curves(self, arcs: Mapping[Edge, FloatArray], bends: Mapping[Edge, list[Point]]) -> None:
        """Edges that are not straight: Bézier arcs by four control points, and routes around boxes by their bends."""
        outlines, tips, edges = [], [], []
        for edge, control in arcs.items():
            outlines.append(Outline(control, [Outline.MOVETO, *[Outline.CURVE4] * 3]))
            tips.append((control[3] + np.array([0.2, 0.0]), control[3]))
            edges.append(edge)
        for edge, points in bends.items():
            parent, child = edge
            route = np.array([self.centres[parent], *points, self.centres[child]])
            route[-1] = self._border(child, route[-2])
            middles = (route[:-1] + route[1:]) / 2
            # Rounded corners: straight to the middle of each part, a curve about each bend.
            corners = [route[0], middles[0]]
            for bend, middle in zip(route[1:-1], middles[1:], strict=True):
                corners += [bend, middle]
            codes = [Outline.MOVETO, Outline.LINETO, *[Outline.CURVE3] * (2 * len(points)), Outline.LINETO]
            outlines.append(Outline(np.array([*corners, route[-1]]), codes))
            tips.append((middles[-1], route[-1]))
            edges.append(edge)
        alpha = float(np.clip(60 / max(len(edges), 1), 0.35, 0.9))
        lines = {"linestyles": [_DASHES if edge in self.cut else "solid" for edge in edges], "facecolors": "none"}
        self._add(PathCollection(outlines, edgecolors=self._edge_colours(edges), linewidths=self.size, alpha=alpha, **lines))
        self._draw_heads(edges, tips)

    def draw_with_daft(self, edges: Sequence[Edge]) -> None:
        """Boxes, and straight arrows between them, by daft-pgm."""
        daft = load_daft()
        pgm = daft.PGM(shape=(1, 1), origin=(0, 0), grid_unit=1, node_unit=1)
        # daft's own render() opens a pyplot figure and leaves it open; its nodes and edges draw on any axes.
        context = pgm._ctx
        context._figure, context._ax = self.ax.get_figure(), self.ax
        fills, outline = lighten(self.colours, 0.72), {"lw": 1.1 * self.size, "joinstyle": "round", "zorder": 2}
        for i, (x, y) in enumerate(self.centres):
            pgm.add_node(
                str(i),
                self.labels[i],
                x,
                y,
                scale=HEIGHT,
                aspect=self.widths[i] / HEIGHT,
                shape="rectangle",
                fontsize=FONT * self.size,
                plot_params=outline | {"fc": fills[i], "ec": self.colours[i], "ls": _DASHES if i in self.written else "solid"},
                label_params={"color": INK, "zorder": 3, **PLAIN},
            )
        drawn = []
        for parent, child in edges:
            colour, style = self.colours[parent], {"lw": self.size, "zorder": 1}
            if (parent, child) in self.cut:
                drawn.append(
                    pgm.add_edge(
                        str(parent), str(child), directed=False, plot_params=style | {"color": _CUT, "linestyle": _DASHES}
                    )
                )
            else:
                heads = {"head_length": _HEAD[0], "head_width": _HEAD[1]}
                drawn.append(pgm.add_edge(str(parent), str(child), plot_params=style | heads | {"ec": colour, "fc": colour}))
        with np.errstate(divide="ignore", invalid="ignore"):  # daft divides by the slope of vertical arrows
            for thing in (*drawn, *pgm._nodes.values()):
                thing.render(context)

    def draw_collections(self, edges: Sequence[Edge]) -> None:
        """Many boxes and edges as a few artists: one collection of lines, one of heads, one of boxes."""
        if edges:
            ends = [self._border(child, self.centres[parent]) for parent, child in edges]
            segments = [[self.centres[parent], end] for (parent, _), end in zip(edges, ends, strict=True)]
            alpha = float(np.clip(80 / len(edges), 0.2, 0.8))
            styles: list[Any] = [_DASHES if edge in self.cut else "solid" for edge in edges] if self.cut else ["solid"]
            width = 0.8 * max(self.size, 0.4)
            self._add(
                LineCollection(segments, colors=self._edge_colours(edges), linewidths=width, linestyles=styles, alpha=alpha)
            )
            if len(edges) <= 2000:
                self._draw_heads(edges, [(self.centres[parent], end) for (parent, _), end in zip(edges, ends, strict=True)])
        half = np.stack([np.asarray(self.widths) / 2, np.full(len(self.widths), HEIGHT / 2)], axis=1)
        corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
        boxes = self.centres[:, None] + half[:, None] * corners
        outlines: dict[str, Any] = {"edgecolors": self.colours, "linewidths": 0.8 * self.size, "zorder": 2}
        if self.written:
            outlines["linestyles"] = [_DASHES if i in self.written else "solid" for i in range(len(boxes))]
        self._add(PolyCollection(list(boxes), facecolors=lighten(self.colours, 0.72), **outlines))
        font = FONT * self.size
        # Where they are too small to read: fewer, larger ones. Where they are many: fewer, as they are slow to draw.
        every = max(int(np.ceil(_LEGIBLE / font)) ** 2, -(-len(self.labels) // _MOST_LABELS))
        for i in range(0, len(self.labels), every):
            x, y = self.centres[i]
            text = {"ha": "center", "va": "center", "color": INK, "fontsize": max(font, _LEGIBLE), "zorder": 3, **PLAIN}
            self.ax.text(x, y, self.labels[i], clip_on=True, **text)

    def _draw_heads(self, edges: Sequence[Edge], tips: Sequence[tuple[FloatArray, FloatArray]]) -> None:
        """A triangle at the end of every edge that is not cut; ``tips`` are (a point before it, its point)."""
        kept = [(edge, tip) for edge, tip in zip(edges, tips, strict=True) if edge not in self.cut]
        if not kept:
            return
        before, tip = np.array([tip for _, tip in kept]).transpose(1, 0, 2)
        along = tip - before
        along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)
        across = along[:, ::-1] * (-1, 1) * _HEAD[1] / 2
        back = tip - along * _HEAD[0]
        heads = np.stack([tip, back + across, back - across], axis=1)
        colours = self._edge_colours([edge for edge, _ in kept])
        alpha = float(np.clip(150 / len(heads), 0.4, 1.0))
        self._add(PolyCollection(list(heads), facecolors=colours, edgecolors="none", alpha=alpha, zorder=1.2))

    def _border(self, node: int, source: FloatArray) -> FloatArray:
        """Where a line from ``source`` to the centre of a box enters it."""
        offset = source - self.centres[node]
        half = np.array([self.widths[node] / 2, HEIGHT / 2])
        scale = (half / np.maximum(np.abs(offset), 1e-9)).min()
        border: FloatArray = self.centres[node] + offset * min(float(scale), 1.0)
        return border

    def _edge_colours(self, edges: Sequence[Edge]) -> FloatArray:
        cut = np.array([0x9A, 0x9A, 0xA2]) / 255
        return np.array([cut if edge in self.cut else self.colours[edge[0]] for edge in edges]).reshape(-1, 3)

    def _add(self, collection: LineCollection | PathCollection | PolyCollection) -> None:
        if len(collection.get_paths()):
            self.ax.add_collection(collection, autolim=False)
