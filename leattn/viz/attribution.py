"""What nodes, tokens and edges were worth: bars, and a node × node matrix for edges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import matplotlib
import numpy as np

from leattn.errors import LeattnError
from leattn.viz.brackets import square
from leattn.viz.canvas import colour_bar, finish, label_axes, new_axes, title_width, write_values
from leattn.viz.style import FAINT, INK, MASKED, PLAIN, FloatArray, drawable, node_colours, text_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from leattn.analysis.attribution_result import Attribution, Importance

BARS = 40
"""The most important ones; more bars than this are no picture."""
ANNOTATED = 14
"""Up to this many nodes, every cell of the matrix says its value."""
_WORDS = {
    "suppress_nodes": "importance of nodes, suppressed",
    "cut_nodes": "importance of nodes, cut",
    "cut_edges": "importance of edges, cut",
    "suppress_tokens": "importance of tokens, suppressed",
}


def plot_attribution(
    attribution: Attribution,
    *,
    method: Literal["suppress_nodes", "cut_nodes", "cut_edges", "suppress_tokens"] | None = None,
    ax: Axes | None = None,
    path: str | Path | None = None,
    title: str | None = None,
) -> Axes:
    r"""Importance, in nats or what was measured: bars for nodes and tokens, the largest on top; queries × keys for edges.

    Red, or a bar to the right, is what the target needs; blue, or a bar to the left, is what it is likelier without. A bar
    has its node's colour. In the matrix grey is not seen, and white with a dot was seen but not cut.

    Parameters
    ----------
    attribution
        What :func:`leattn.analysis.attribute` returned.
    method
        Which of its methods; the first for None.
    ax
        Where to draw; otherwise a new figure.
    path
        Write the figure there: PNG, SVG or PDF by its suffix.
    title
        Instead of the one that states quantity, target and what it was done with; ``""`` for none.

    Raises
    ------
    LeattnError
        A method that the attribution does not hold, or one without any rows.

    Examples
    --------
    >>> import leattn
    >>> model, tokenizer = leattn.tiny.load()
    >>> a = leattn.ICLNode("\nThe capital of Zarvia is", id="a")
    >>> prompt = leattn.compile_prompt(leattn.ICLNode(" Lumo", [a], id="b"), tokenizer)
    >>> found = leattn.analysis.attribute(model, prompt, ".", methods="cut_nodes")
    >>> plot_attribution(found).get_xlabel()
    'nats of loss gained'
    """
    method = attribution.methods[0] if method is None else method
    ranked = attribution.rank(method)
    if not ranked:
        raise LeattnError(f"this attribution has no rows of {method!r}, nothing was there to intervene on; choose other nodes")
    if title is None:
        title = f"{_WORDS[method]}\n{_what(attribution, method)}"
    if method == "cut_edges":
        return _matrix(attribution, ranked, ax, path, title)
    return _bars(attribution, ranked, ax, path, title)


def _what(attribution: Attribution, method: str) -> str:
    target = f"target {drawable(attribution.target.strip() or repr(attribution.target), 40)!r}"
    if not method.startswith("suppress"):
        return target
    numbers = attribution.layers
    layers = "all layers" if numbers is None else f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
    return f"{target}, factor {attribution.factor:g} {attribution.mode}, {layers}"


def _bars(attribution: Attribution, ranked: Sequence[Importance], ax: Axes | None, path: str | Path | None, title: str) -> Axes:
    graph = attribution.prompt.graph
    index = {name: i for i, name in enumerate(graph.names.values())}
    shown = ranked[:BARS]
    if len(ranked) > BARS and title:
        title = title.replace("\n", f", the first {BARS} of {len(ranked)}\n", 1)
    labels = [
        drawable(row.node) if row.token is None else f"{drawable(repr(row.text)[1:-1], 16)} · {drawable(row.node, 14)}"
        for row in shown
    ]
    values = np.array([row.importance for row in shown])
    font = 8.5 if len(shown) <= 24 else 7.0
    beside = max(text_width(label, font) for label in labels) + 0.1
    if ax is None:
        height, width = float(np.clip(0.24 * len(shown), 0.7, 6.5)), max(4.0, title_width(title) - beside + 0.15)
        ax = new_axes(width, height, title, left=beside + 0.15, bottom=0.5, right=0.55, above=0.04, before=beside)
    places = np.arange(len(shown))
    colours = node_colours(len(graph))[[index[row.node] for row in shown]]
    ax.barh(places, values, height=0.74, color=colours, linewidth=0)
    ax.axvline(0.0, color=INK, linewidth=0.8)
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    span = (high - low) or 1.0
    # Room for the numbers; what rounds to nothing takes none on the left.
    ax.set_xlim(low - (0.14 if low < -0.004 else 0.0) * span, high + 0.14 * span)
    for place, value in zip(places, values, strict=True):
        leftwards = value < 0 and _number(float(value)) != "0"
        ax.annotate(
            _number(float(value)),
            (float(value), float(place)),
            (-3 if leftwards else 3, 0),
            textcoords="offset points",
            ha="right" if leftwards else "left",
            va="center",
            fontsize=font - 1,
            color=FAINT,
        )
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_yticks(places, labels, fontsize=font, color=INK, **PLAIN)
    label_axes(ax, attribution.quantity, spines=["bottom"], axis="x", labelsize=7.5)
    ax.tick_params(axis="y", length=0)
    # Over names and bars: a title over the bars alone would start in the middle of a narrow figure.
    return finish(ax, title, path, before=beside)


def _matrix(
    attribution: Attribution, ranked: Sequence[Importance], ax: Axes | None, path: str | Path | None, title: str
) -> Axes:
    prompt = attribution.prompt
    names = list(prompt.graph.names.values())
    index = {name: i for i, name in enumerate(names)}
    count = len(names)
    values = np.full((count, count), np.nan)
    for row in ranked:
        values[index[cast("str", row.query)], index[row.node]] = row.importance
    seen = np.zeros((count, count), dtype=bool)
    for node, start, stop in zip(*prompt.visible.flat(), strict=True):
        seen[node, start:stop] = True
    labels = [drawable(name) for name in names]
    bounds = np.arange(count + 1, dtype=np.float64)
    side = float(np.clip(0.42 * count, 2.4, 5.6))
    ax, brackets = square(ax, bounds, labels, title, side, right=1.0)
    extent = (0, count, count, 0)
    ground = np.where(seen[..., None], 1.0, matplotlib.colors.to_rgb(MASKED))
    ax.imshow(ground, extent=extent, aspect="auto", interpolation="nearest")
    largest = float(np.nanmax(np.abs(values))) or 1.0
    shades = matplotlib.colors.Normalize(-largest, largest)
    shown = np.ma.masked_invalid(values)
    image = ax.imshow(shown, cmap="RdBu_r", norm=shades, extent=extent, aspect="auto", interpolation="nearest")
    _marks(ax, values, seen)
    if count <= ANNOTATED:
        write_values(ax, shown, abs(values) > 0.6 * largest, at=0.5, share=0.27, text=_number)
    ax.set_xticks([])
    ax.set_yticks([])
    uncut = bool((seen & np.isnan(values)).any())
    label_axes(ax, "key node: no longer seen" + "; dots: edges left alone" * uncut)
    brackets.draw(ax)
    colour_bar(ax, image, attribution.quantity)
    return finish(ax, title, path, lift=brackets.top)


def _marks(ax: Axes, values: FloatArray, seen: FloatArray) -> None:
    """Lines between cells, and dots where an edge was not cut."""
    count = len(values)
    if count <= 3 * ANNOTATED:
        for lines in (ax.hlines, ax.vlines):
            lines(range(1, count), 0, count, colors="white" if count > ANNOTATED else "#d4d4da", linewidths=0.6)
    unmeasured = np.argwhere(seen & np.isnan(values))
    if len(unmeasured):
        ax.scatter(unmeasured[:, 1] + 0.5, unmeasured[:, 0] + 0.5, s=4, color=FAINT, linewidths=0)


def _number(value: float) -> str:
    """Three digits or fewer; what rounds to nothing is 0."""
    if abs(value) < 0.005:
        return "0"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
