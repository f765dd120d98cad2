"""Attention scores before the softmax, token by token, as a heat map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from leattn.errors import LeattnError
from leattn.viz.canvas import colour_bar, finish, heat_map, label_axes, new_axes, number_ticks
from leattn.viz.select import Choice, check_trace, chosen_of
from leattn.viz.style import drawable
from leattn.viz.tokens import pair_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from leattn.analysis.trace import Trace
    from leattn.dag.node import ICLNode


def plot_scores(
    trace: Trace,
    pair: tuple[ICLNode | str, ICLNode | str] | None = None,
    *,
    layer: Choice = None,
    head: Choice = None,
    ax: Axes | None = None,
    path: str | Path | None = None,
    title: str | None = None,
) -> Axes:
    r"""What the softmax is taken of: queries downwards, keys to the right, grey where a query does not see a key.

    Parameters
    ----------
    trace
        A :class:`leattn.analysis.Trace` with ``scores=True``: of the whole prompt, or of pairs of nodes.
    pair
        Which pair, if the trace has several.
    layer, head
        Which to take the mean over: an index, several, or all.
    ax, path, title
        As in :func:`leattn.viz.plot_attention`.

    Raises
    ------
    LeattnError
        A trace without scores, a pair that it did not keep, a layer or head that does not exist.

    Examples
    --------
    >>> import leattn
    >>> from leattn.analysis import trace
    >>> model, tokenizer = leattn.tiny.load()
    >>> prompt = leattn.compile_prompt(leattn.ICLNode("The sky is blue.", id="a"), tokenizer)
    >>> plot_scores(trace(model, prompt, layers=0, scores=True)).get_title(loc="left")
    'attention scores before the softmax\nlayer 0, mean of all 4 heads, float32, tiny/weights'
    """
    check_trace("plot_scores", trace)
    rows, heads, words = chosen_of(trace, layer, head)
    whose = ("", "")
    scores, pool = trace.scores, (1, 1)
    if pair is not None or scores is None:
        if not trace.tokens:
            raise LeattnError("this trace has no scores; call trace(model, prompt, scores=True), for pairs with tokens= too")
        names = tuple(trace.prompt.graph.name(node) for node in pair_of(trace, pair))
        kept = trace.tokens[names[0], names[1]]
        scores, pool = kept.scores, kept.pool
        whose = (f" of {drawable(names[0])}", f" of {drawable(names[1])}")
    else:
        pool = (-(-len(trace.prompt) // scores.shape[-2]), -(-len(trace.prompt) // scores.shape[-1]))
    if scores is None:
        raise LeattnError("this trace kept weights and no scores; call trace(..., scores=True)")
    mean = scores[rows][:, heads].double().mean((0, 1)).numpy()
    shown = np.ma.masked_array(mean, ~np.isfinite(mean))
    if title is None:
        cells = "" if pool == (1, 1) else f", maxima of {pool[0]} × {pool[1]} tokens"
        title = f"attention scores before the softmax\n{words}, {trace.dtype}, {trace.model}{cells}"
    if ax is None:
        height, width = (float(np.clip(0.12 * count, 1.6, 5.6)) for count in mean.shape)
        ax = new_axes(width, height, title, left=0.75, bottom=0.55, right=1.0, above=0.11)
    image = heat_map(ax, shown, float(shown.min()), float(shown.max()))
    for axis, count, cell in ((ax.yaxis, mean.shape[0], pool[0]), (ax.xaxis, mean.shape[1], pool[1])):
        number_ticks(axis, range(0, count * cell, cell), 8)
    label_axes(ax, f"key token{whose[1]}", f"query token{whose[0]}", length=0)
    colour_bar(ax, image, "score")
    return finish(ax, title, path)
