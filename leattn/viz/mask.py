"""The attention mask of a prompt as rectangles and triangles, however long the prompt is."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, MaxNLocator

from leattn.errors import LeattnError, choices
from leattn.prompt.columns import Row
from leattn.prompt.masks import block_counts
from leattn.viz.brackets import square
from leattn.viz.canvas import finish, label_axes, size_inches
from leattn.viz.style import MASKED, FloatArray, drawable, lighten, node_shades, shades, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from leattn.prompt.compiled import CompiledPrompt
    from leattn.prompt.visible import Visible

STAIRS = 64
"""Up to this many tokens, single tokens show: as a grid, and as steps on the diagonal."""
MAX_RECTANGLES = 1000
"""A relation that needs more becomes one image: a file of outlines would be larger and no sharper."""
IMAGE_CELLS = 640
_SEEN = 0.42
"""How much lighter than its own triangle a node is where others see it."""


class Rectangle(NamedTuple):
    """Query nodes ``rows`` see key nodes ``columns``, both half-open intervals of layout indices."""

    rows: tuple[int, int]
    columns: tuple[int, int]


def plot_mask(
    prompt: CompiledPrompt,
    *,
    ax: Axes | None = None,
    path: str | Path | None = None,
    scale: Literal["tokens", "nodes"] = "tokens",
    title: str | None = None,
) -> Axes:
    """Who may attend to whom: queries downwards, keys to the right, grey where masked.

    A column has the colour of its key node: strong in the triangle where the node attends to itself, light where others
    see it. Hatched is what its query reads in another way than as it is (:func:`leattn.read`).

    Parameters
    ----------
    prompt
        S tokens in N nodes. Its edits show, as they change what is visible.
    ax
        Where to draw, best of equal width and height; otherwise a new figure.
    path
        Write the figure there: PNG, SVG or PDF by its suffix.
    scale
        ``"tokens"``: a node is as wide as it has tokens. ``"nodes"``: all are equally wide.
    title
        Instead of the one that states tokens, nodes and density; ``""`` for none.

    Raises
    ------
    LeattnError
        An unknown ``scale`` or suffix.

    Examples
    --------
    >>> from leattn import ICLNode, compile_prompt
    >>> doc = ICLNode([5, 6], id="doc")
    >>> prompt = compile_prompt(ICLNode([7], parents=[doc], id="Q"))
    >>> plot_mask(prompt).get_title(loc="left")
    'attention mask: 3 tokens, 2 nodes, density 1.00'

    Notes
    -----
    Artists do not grow with the tokens: neighbours with the same key nodes become one rectangle, and all rectangles one
    collection. A relation of more than ``MAX_RECTANGLES`` is drawn as one image of at most ``IMAGE_CELLS`` cells a side,
    in which whatever attends at all stays visible.
    """
    if scale not in ("tokens", "nodes"):
        raise LeattnError(choices("scale", scale, ("tokens", "nodes")))
    count = len(prompt.graph)
    lengths = np.diff(prompt.offsets)
    bounds = np.asarray(prompt.offsets) if scale == "tokens" else np.arange(count + 1)
    labels = [f"{drawable(name)} · {n:,}" for name, n in zip(prompt.graph.names.values(), lengths, strict=True)]
    if title is None:
        nodes = f"{count:,} node{'s' * (count != 1)}"
        tokens = f"{len(prompt):,} token{'s' * (len(prompt) != 1)}"
        density = f"{prompt.density:.2f}" if prompt.density >= 0.1 else f"{prompt.density:.2g}"
        title = f"attention mask: {tokens}, {nodes}, density {density}"
        title += "; hatched: read otherwise" if prompt.visible.readings else ""
    side = 4.2 if count <= 24 else 5.6
    ax, brackets = square(ax, bounds.astype(np.float64), labels, title, side, left=0.3, bottom=0.55, right=0.75)
    total = int(bounds[-1])
    stairs = scale == "tokens" and total <= STAIRS
    found = rectangles(prompt.visible, node_shades(count), limit=MAX_RECTANGLES)
    if found is None or count > MAX_RECTANGLES:
        _draw_image(ax, prompt.visible, bounds)
    else:
        _draw_outlines(ax, found, bounds, stairs=stairs)
    _draw_readings(ax, prompt.visible, bounds)
    _draw_grid(ax, bounds, stairs=stairs)
    _draw_axes(ax, total, scale)
    brackets.draw(ax)
    return finish(ax, title, path, lift=brackets.top)


def rectangles(visible: Visible, shade: npt.NDArray[np.int64], *, limit: int | None = None) -> list[Rectangle] | None:
    """The visible relation, own parts left out, in rectangles that do not overlap and whose keys have one shade.

    Keys are neighbours in a run of the relation; queries that see the same piece of it one after another share a
    rectangle. None if there are more than ``limit``.

    Examples
    --------
    >>> from leattn.prompt.visible import Visible
    >>> rectangles(Visible(((), (), ((0, 2),), ((0, 2),))), np.array([0, 0, 1, 1]))
    [Rectangle(rows=(2, 4), columns=(0, 2))]
    """
    cuts = np.flatnonzero(np.diff(shade)) + 1
    finished: list[Rectangle] = []
    open_since: dict[tuple[int, int], int] = {}
    for row, runs in enumerate((*visible.runs, ())):
        now: dict[tuple[int, int], int] = {}
        for start, stop in runs:
            inner = cuts[np.searchsorted(cuts, start, side="right") : np.searchsorted(cuts, stop)].tolist()
            for piece in zip([start, *inner], [*inner, stop], strict=True):
                now[piece] = open_since.pop(piece, row)
        finished += [Rectangle((since, row), piece) for piece, since in open_since.items()]
        open_since = now
        if limit is not None and len(finished) > limit:
            return None
    return finished


def _draw_outlines(ax: Axes, found: list[Rectangle], bounds: npt.NDArray[np.int64], *, stairs: bool) -> None:
    """Everything of one shade is one compound outline, and all outlines are one collection."""
    shade, colours = node_shades(len(bounds) - 1), shades(len(bounds) - 1)
    seen: list[list[FloatArray]] = [[] for _ in colours]
    own: list[list[FloatArray]] = [[] for _ in colours]
    for (top, bottom), (left, right) in found:
        x0, x1, y0, y1 = bounds[left], bounds[right], bounds[top], bounds[bottom]
        seen[shade[left]].append(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=np.float64))
    for i, (start, end) in enumerate(pairwise(bounds)):
        own[shade[i]].append(own_outline(int(start), int(end), stairs=stairs))
    parts = [*seen, *own]
    faces = np.concatenate([lighten(colours, _SEEN), colours])
    filled = [k for k, corners in enumerate(parts) if corners]
    outlines = [Outline.make_compound_path(*(Outline(corners, closed=False) for corners in parts[k])) for k in filled]
    colour = faces[filled]
    # A line of its own colour keeps visible what is narrower than a pixel: a question below a hundred thousand tokens.
    narrow = np.array([_narrowest(parts[k]) for k in filled]) * min(size_inches(ax)) * 72 / bounds[-1] < 1.5
    lines = np.where(narrow, 1.2, 0.0 if stairs else 0.3)
    ax.add_collection(PathCollection(outlines, facecolors=colour, edgecolors=colour, linewidths=lines), autolim=False)


def _draw_readings(ax: Axes, visible: Visible, bounds: npt.NDArray[np.int64]) -> None:
    """Hatched rectangles, with the way of reading in those that have room for it."""
    corners = []
    for i, groups in visible.readings.items():
        for runs, reading in groups:
            for start, stop in runs:
                x0, x1, y0, y1 = bounds[start], bounds[stop], bounds[i], bounds[i + 1]
                corners.append(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=np.float64))
            start, stop = max(runs, key=lambda run: int(bounds[run[1]] - bounds[run[0]]))
            label, points = str(reading), min(size_inches(ax)) * 72 / bounds[-1]
            wide, high = (bounds[stop] - bounds[start]) * points, (bounds[i + 1] - bounds[i]) * points
            if high >= 9 and wide >= 72 * text_width(label, 7.0):
                middle = (bounds[start] + bounds[stop]) / 2, (bounds[i] + bounds[i + 1]) / 2
                ax.text(*middle, label, fontsize=7.0, ha="center", va="center", zorder=3)
    if corners:
        outline = Outline.make_compound_path(*(Outline(corner, closed=False) for corner in corners))
        hatched = PathCollection([outline], facecolors="none", edgecolors="white", hatch="////", linewidths=0.0, zorder=1.2)
        ax.add_collection(hatched, autolim=False)


def _narrowest(corners: list[FloatArray]) -> float:
    return min(float(np.ptp(part, axis=0).min()) for part in corners)


def own_outline(start: int, end: int, *, stairs: bool) -> FloatArray:
    """Corners of what a node sees of itself: ``(key, query)``, a triangle or one step per token."""
    if not stairs:
        return np.array([(start, start), (end, end), (start, end)], dtype=np.float64)
    steps = [(x, y) for token in range(start, end) for x, y in ((token + 1, token), (token + 1, token + 1))]
    return np.array([(start, start), *steps, (start, end)], dtype=np.float64)


def _draw_image(ax: Axes, visible: Visible, bounds: npt.NDArray[np.int64]) -> None:
    total = int(bounds[-1])
    block = -(-total // IMAGE_CELLS)
    stretches = Row(visible, bounds.tolist()).stretches(range(total))
    share = block_counts(stretches, range(total), total, block) / block**2
    middle = np.minimum(np.arange(len(share)) * block + block // 2, total - 1)
    node = np.searchsorted(bounds, middle, side="right") - 1
    colours = shades(len(bounds) - 1)[node_shades(len(bounds) - 1)[node]]
    colours = np.where((node[:, None] == node)[..., None], colours, lighten(colours, _SEEN))
    # In four steps, the faintest still clear: a block with one attending pair is not an empty one.
    steps = np.array([0.4, 0.6, 0.8, 1.0])[np.minimum((share * 4).astype(int), 3)]
    np.fill_diagonal(steps, 1.0)
    strength = np.where(share > 0, steps, 0.0)[..., None]
    grey = np.array([int(MASKED[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    pixels = (255 * (strength * colours + (1 - strength) * grey)).round().astype(np.uint8)
    ax.imshow(pixels, extent=(0, len(share) * block, len(share) * block, 0), aspect="auto", interpolation="nearest")


def _draw_grid(ax: Axes, bounds: npt.NDArray[np.int64], *, stairs: bool) -> None:
    total = int(bounds[-1])
    wide = np.diff(bounds) * min(size_inches(ax)) * 72 / total >= 4.0
    lines = {0.9: np.unique(np.concatenate([bounds[:-1][wide], bounds[1:][wide]]))}
    if stairs:
        lines[0.35] = np.arange(total + 1)
    for width, places in lines.items():
        segments = [[(p, 0), (p, total)] for p in places] + [[(0, p), (total, p)] for p in places]
        # Over the cells where single tokens show; elsewhere below, where it hides nothing narrow.
        ax.add_collection(
            LineCollection(segments, colors="white", linewidths=width, zorder=1.5 if stairs else 0.5), autolim=False
        )


def _draw_axes(ax: Axes, total: int, scale: str) -> None:
    ax.set_facecolor(MASKED)
    ax.set_xlim(0, total)
    ax.set_ylim(total, 0)
    unit = "token" if scale == "tokens" else "node"
    label_axes(ax, f"key {unit}", f"query {unit}", length=2.5, width=0.6, pad=2)
    ax.yaxis.set_label_position("right")
    ax.yaxis.tick_right()
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
