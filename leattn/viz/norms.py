"""Norms of hidden states, keys and values: the largest tokens over the layers, or every token of one layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from leattn.errors import LeattnError, choices
from leattn.viz.brackets import Brackets
from leattn.viz.canvas import finish, label_axes, name_ends, new_axes, number_ticks, size_inches
from leattn.viz.select import check_trace, layer_rows
from leattn.viz.style import FAINT, INK, PLAIN, FloatArray, drawable, node_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from leattn.analysis.trace import Trace

Kind = Literal["hidden", "keys", "values", "mean_keys", "mean_values"]
WHAT = {
    "hidden": "hidden states at the input",
    "keys": "keys after RoPE",
    "values": "values",
    "mean_keys": "the mean key over the heads after RoPE",
    "mean_values": "the mean value over the heads",
}
SPAN = 20.0
"""Where the largest norm is this many times the median, the axis is logarithmic."""
HEADS_NAMED = 8


def plot_norms(
    trace: Trace,
    *,
    kind: Kind = "hidden",
    layer: int | None = None,
    ax: Axes | None = None,
    path: str | Path | None = None,
    title: str | None = None,
) -> Axes:
    r"""How large the states of tokens are. Points have the colour of their node.

    Parameters
    ----------
    trace
        What :func:`leattn.analysis.trace` returns.
    kind
        ``"hidden"``: the input of a layer; ``"keys"`` or ``"values"``: per key/value head; ``"mean_keys"`` or
        ``"mean_values"``: of their mean over the heads.
    layer
        One layer: every token, in layout order. None: over the layers, the three largest tokens and the median one, with the
        mean over the heads as the norm of a key or value.
    ax, path, title
        As in :func:`leattn.viz.plot_attention`.

    Raises
    ------
    LeattnError
        An unknown kind, a layer that was not traced, something else than one trace.

    Examples
    --------
    >>> import leattn
    >>> from leattn.analysis import trace
    >>> model, tokenizer = leattn.tiny.load()
    >>> prompt = leattn.compile_prompt(leattn.ICLNode("The sky is blue.", [leattn.bos(tokenizer)]), tokenizer)
    >>> plot_norms(trace(model, prompt), kind="keys", layer=1).get_title(loc="left")
    'norm of keys after RoPE, layer 1, by head\nfloat32, tiny/weights'
    """
    check_trace("plot_norms", trace)
    if kind not in WHAT:
        raise LeattnError(choices("kind", kind, tuple(WHAT)))
    if layer is not None and not isinstance(layer, int):
        raise LeattnError(f"plot_norms draws one layer, or None for a summary of all of them, not layer={layer!r}")
    norms = {
        "hidden": trace.hidden_norms[:, None],
        "keys": trace.key_norms,
        "values": trace.value_norms,
        "mean_keys": trace.mean_key_norms[:, None],
        "mean_values": trace.mean_value_norms[:, None],
    }[kind]  # [L, G, S]
    by_head = kind in ("keys", "values")
    rows = layer_rows(trace, layer)
    values = norms[rows].double().numpy()
    of = trace.layers[rows[0]]
    if layer is None:
        where = f", mean of {values.shape[1]} heads" if by_head else " of each layer"
    else:
        where = f", layer {of}, by head" if by_head else f" of layer {of}"
    title = f"norm of {WHAT[kind]}{where}\n{trace.dtype}, {trace.model}" if title is None else title
    draw = _draw_layers if layer is None else _draw_tokens
    return draw(trace, values, ax, path, title)


def _draw_tokens(trace: Trace, values: FloatArray, ax: Axes | None, path: str | Path | None, title: str) -> Axes:
    """One layer's ``[1, G, S]``: a point per token and head."""
    prompt, series = trace.prompt, values[0]
    groups, size = series.shape
    labels = [drawable(name) for name in prompt.graph.names.values()]
    width = 7.2 if ax is None else size_inches(ax)[0]
    brackets = Brackets(np.asarray(prompt.offsets, dtype=np.float64), labels, width)
    if ax is None:
        right, above = max(0.7, brackets.overhang + 0.1), brackets.top + 0.12
        ax = new_axes(width, 2.4, title, left=0.75, bottom=0.55, right=right, above=above)
    colours = node_colours(len(labels))[prompt.node_index.cpu().numpy()]
    places = np.arange(size) + 0.5
    point = float(np.clip(size_inches(ax)[0] * 72 / size, 1.2, 4.5)) ** 2
    for line in series:
        ax.plot(places, line, color=FAINT, linewidth=0.5, alpha=0.6, zorder=1, rasterized=size > 4000)
        ax.scatter(places, line, s=point, c=colours, linewidths=0, zorder=2, rasterized=size > 4000)
    for bound in prompt.offsets[1:-1] if len(labels) <= 60 else ():
        ax.axvline(bound, color=FAINT, linewidth=0.4, alpha=0.5, zorder=0)
    ax.set_xlim(0, size)
    _scale(ax, series)
    if 1 < groups <= HEADS_NAMED:
        name_ends(ax, series[:, -1].tolist(), [f"head {head}" for head in range(groups)], font=7, pitch=9.5)
    _style(ax, "token of the layout")
    brackets.draw(ax, ["top"])
    return finish(ax, title, path, lift=brackets.top)


def _draw_layers(trace: Trace, values: FloatArray, ax: Axes | None, path: str | Path | None, title: str) -> Axes:
    """All layers' ``[L, G, S]``: lines of the three largest tokens and of the median."""
    norms = values.mean(1)  # [L, S]
    most = min(3, norms.shape[1])
    order = np.argsort(-norms, axis=1, kind="stable")[:, :most]
    top = np.take_along_axis(norms, order, 1)
    if ax is None:
        ax = new_axes(5.2, 2.8, title, left=0.75, bottom=0.55, right=1.0, above=0.17)
    node_of = trace.prompt.node_index.cpu().numpy()
    colours = node_colours(len(trace.prompt.graph))
    names = [drawable(name, 16) for name in trace.prompt.graph.names.values()]
    places = np.arange(len(trace.layers))
    for rank in range(most):
        ax.plot(places, top[:, rank], color=FAINT, linewidth=1.2 - 0.3 * rank, zorder=1)
        ax.scatter(places, top[:, rank], s=26, c=colours[node_of[order[:, rank]]], linewidths=0, zorder=2)
    median = np.median(norms, axis=1)
    ax.plot(places, median, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    said = None
    for place, token in enumerate(order[:, 0]):
        if token != said:
            start = trace.prompt.offsets[node_of[token]]
            ax.annotate(
                f"{names[node_of[token]]}[{token - start}]", (place, top[place, 0]), (0, 5), textcoords="offset points",
                ha="left" if place == 0 else "right" if place == len(places) - 1 else "center", fontsize=7, color=INK, **PLAIN,
            )  # fmt: skip
        said = token
    _scale(ax, norms)
    ends = [float(median[-1]), *top[-1, ::-1].tolist()]
    name_ends(ax, ends, ["median", *["largest", "second", "third"][:most][::-1]], font=7, pitch=9.5)
    margin = 0.03 * max(len(places) - 1, 1)
    ax.set_xlim(-margin, max(len(places) - 1, 1) + margin)
    number_ticks(ax.xaxis, trace.layers, 16)
    _style(ax, "layer")
    return finish(ax, title, path, lift=4 / 72)


def _scale(ax: Axes, values: FloatArray) -> None:
    """From zero; logarithmic where a few tokens would press all others flat."""
    if values.min() > 0 and values.max() > SPAN * np.median(values):
        ax.set_yscale("log")
        ax.set_ylim(float(values.min()) / 1.3, float(values.max()) * 1.6)
    else:
        ax.set_ylim(0, max(float(values.max()), 1e-12) * 1.12)


def _style(ax: Axes, across: str) -> None:
    label_axes(ax, across, "Euclidean norm", spines=["left", "bottom"], which="both")
    ax.spines[:].set_linewidth(0.5)
