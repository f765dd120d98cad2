"""Attention that first tokens get, layer × head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from leattn.viz.canvas import QUARTERS, colour_bar, finish, heat_map, label_axes, new_axes, number_ticks, write_values
from leattn.viz.select import check_trace
from leattn.viz.style import drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from leattn.analysis.trace import Trace
    from leattn.dag.node import ICLNode

ANNOTATED = 160
"""Up to this many cells, every cell says its value."""


def plot_sinks(
    trace: Trace,
    *,
    node: ICLNode | str | None = None,
    ax: Axes | None = None,
    path: str | Path | None = None,
    title: str | None = None,
) -> Axes:
    r"""How much attention goes to the first token of a node, by layer and head: the mean over the other tokens that see it.

    Parameters
    ----------
    trace
        What :func:`leattn.analysis.trace` returns.
    node
        Whose first token; by default the roots', such as BOS, and the mean over them if there are several. Where no other
        token sees it, as in a window, the cell is grey.
    ax, path, title
        As in :func:`leattn.viz.plot_attention`.

    Raises
    ------
    LeattnError
        Something else than one trace.
    GraphError
        A node that is not in the prompt.

    Examples
    --------
    >>> import leattn
    >>> from leattn.analysis import trace
    >>> model, tokenizer = leattn.tiny.load()
    >>> bos = leattn.bos(tokenizer)
    >>> prompt = leattn.compile_prompt(leattn.ICLNode("The sky is blue.", [bos], id="text"), tokenizer)
    >>> plot_sinks(trace(model, prompt), node="text").get_title(loc="left")
    "attention to the first token of 'text'\nmean over the tokens that see it, float32, tiny/weights"
    """
    check_trace("plot_sinks", trace)
    graph = trace.prompt.graph
    names = trace.roots if node is None else (graph.name(node),)
    columns = [graph.index[graph[name]] for name in names]
    given = trace.first_tokens[..., columns].double().numpy()  # [L, H, R]
    seen = ~np.isnan(given)
    shares = np.where(seen, given, 0.0).sum(-1) / np.maximum(seen.sum(-1), 1)
    shown = np.ma.masked_array(shares, ~seen.any(-1))
    layers, heads = shown.shape
    if title is None:
        whose = f"the first token of {drawable(names[0])!r}" if len(names) == 1 else f"the first tokens of {len(names)} roots"
        title = f"attention to {whose}\nmean over the tokens that see it, {trace.dtype}, {trace.model}"
    if ax is None:
        width, height = float(np.clip(0.42 * heads, 1.6, 7.0)), float(np.clip(0.3 * layers, 1.3, 7.0))
        ax = new_axes(width, height, title, left=0.6, bottom=0.5, right=0.95, above=0.11)
    image = heat_map(ax, shown)
    if layers * heads <= ANNOTATED:
        write_values(ax, shown, shares > 0.6, largest=7.5)
    number_ticks(ax.yaxis, trace.layers, 24)
    number_ticks(ax.xaxis, range(heads), 16)
    label_axes(ax, "head", "layer", length=0)
    colour_bar(ax, image, "share of the attention", ticks=QUARTERS)
    return finish(ax, title, path)
