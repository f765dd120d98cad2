"""Attention that first tokens get, layer × head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

from leattn.viz.attention import colour_bar
from leattn.viz.style import FAINT, INK, MASKED, drawable, new_axes, save, size_inches, text_width

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
        above = 0.15 if title == "" else 0.2 + 0.19 * len(title.splitlines())
        right = max(0.8, *(text_width(line, 10) - width for line in ["", *title.splitlines()])) + 0.15
        ax = new_axes(0.6 + width + right, 0.5 + height + above, (0.6, 0.5, width, height))
    colours = matplotlib.colormaps["GnBu"].with_extremes(bad=MASKED)
    image = ax.imshow(shown, cmap=colours, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    if layers * heads <= ANNOTATED:
        font = min(7.5, 0.3 * size_inches(ax)[0] * 72 / heads, 0.6 * size_inches(ax)[1] * 72 / layers)
        for (row, column), value in np.ndenumerate(shares):
            if seen[row, column].any():
                colour = "white" if value > 0.6 else INK
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=font, color=colour)
    every = -(-layers // 24), -(-heads // 16)
    ax.set_yticks(range(0, layers, every[0]), [str(number) for number in trace.layers[:: every[0]]])
    ax.set_xticks(range(0, heads, every[1]))
    ax.set_xlabel("head", fontsize=8, color=FAINT)
    ax.set_ylabel("layer", fontsize=8, color=FAINT)
    ax.tick_params(length=0, labelsize=7, labelcolor=FAINT)
    ax.spines[:].set_visible(False)
    colour_bar(ax, image, "share of the attention")
    ax.set_title(title, loc="left", fontsize=10, color=INK, parse_math=False)
    save(ax, path)
    return ax
