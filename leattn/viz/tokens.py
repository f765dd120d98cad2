"""Attention between the tokens of two nodes, as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from leattn.errors import LeattnError
from leattn.viz.canvas import colour_bar, finish, heat_map, label_axes, new_axes, number_ticks
from leattn.viz.select import Choice, check_trace, chosen_of, chosen_weights
from leattn.viz.style import INK, PLAIN, drawable, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from leattn.analysis.trace import Trace
    from leattn.dag.node import ICLNode
    from leattn.prompt.compiled import CompiledPrompt

NAMED = 48
"""Up to this many tokens on a side, each is written out."""


def plot_tokens(
    weights: Trace | torch.Tensor | Sequence[torch.Tensor],
    pair: tuple[ICLNode | str, ICLNode | str] | None = None,
    prompt: CompiledPrompt | None = None,
    *,
    layer: Choice = None,
    head: Choice = None,
    ax: Axes | None = None,
    path: str | Path | None = None,
    title: str | None = None,
) -> Axes:
    r"""How much attention each token of one node gives to each token of another, or of itself.

    Parameters
    ----------
    weights
        A :class:`leattn.analysis.Trace` with ``tokens=pair``, or attention weights of one prompt as in
        :func:`leattn.viz.plot_attention`.
    pair
        The nodes of the queries and of the keys; needed unless the trace has one pair only.
    prompt
        What attention weights are about; a trace has its own.
    layer, head
        Which to take the mean over: an index, several, or all.
    ax, path, title
        As in :func:`leattn.viz.plot_attention`.

    Raises
    ------
    LeattnError
        A pair that the trace did not keep, or of which the first does not see the second; a layer or head that does not exist;
        weights that are not one prompt's.

    Examples
    --------
    >>> import leattn
    >>> from leattn.analysis import trace
    >>> model, tokenizer = leattn.tiny.load()
    >>> a = leattn.ICLNode("The sky is", id="a")
    >>> prompt = leattn.compile_prompt(leattn.ICLNode(" blue.", [a], id="b"), tokenizer)
    >>> plot_tokens(trace(model, prompt, tokens=("b", "a")), layer=0).get_title(loc="left")
    "attention from tokens of 'b' to tokens of 'a'\nlayer 0, mean of all 4 heads, float32, tiny/weights"
    """
    if isinstance(weights, torch.Tensor | Sequence):
        if prompt is None or pair is None:
            raise LeattnError("attention weights alone do not say which tokens they are about; give the pair and the prompt")
        query, key = (prompt.graph[node] for node in pair)
        if query is not key and key not in prompt.sees(query):
            raise LeattnError(f"{prompt.graph.name(query)!r} does not see {prompt.graph.name(key)!r}: nothing to draw")
        part, what = _of_weights(weights, prompt, prompt.spans[query], prompt.spans[key], layer, head)
        pool = (1, 1)
    else:
        check_trace("plot_tokens", weights)
        prompt = weights.prompt
        query, key = pair_of(weights, pair)
        names = prompt.graph.name(query), prompt.graph.name(key)
        rows, heads, words = chosen_of(weights, layer, head)
        part = weights.tokens[names].weights[rows][:, heads].double().mean((0, 1))
        what, pool = f"{words}, {weights.dtype}, {weights.model}", weights.tokens[names].pool
        if pool != (1, 1):
            what += f", maxima of {pool[0]} × {pool[1]} tokens"
    names = prompt.graph.name(query), prompt.graph.name(key)
    if title is None:
        title = f"attention from tokens of {drawable(names[0])!r} to tokens of {drawable(names[1])!r}\n{what}"
    rows_shown, columns_shown = part.shape
    labels = [_labels(prompt, *prompt.spans[node], pool[side]) for side, node in enumerate((query, key))]
    if ax is None:
        height, width = (float(np.clip(0.2 * count, 1.2, 6.0)) for count in part.shape)
        left = 0.45 + max((text_width(label, 7) for label in labels[0]), default=0.2)
        below = 0.45 + max((text_width(label, 7) for label in labels[1]), default=0.2)
        ax = new_axes(width, height, title, left=left, bottom=below, right=1.0, above=0.11)
    shown = np.ma.masked_array(part.numpy(), np.zeros(part.shape, bool))
    if query is key:
        first = np.arange(columns_shown) * pool[1]
        last = np.minimum((np.arange(rows_shown) + 1) * pool[0], len(prompt[query].input_ids)) - 1
        shown.mask = first > last[:, None]
    most = float(shown.max())
    # Powers of two as the end of the scale, so that pictures of like size can be compared.
    image = heat_map(ax, shown, high=float(2.0 ** np.ceil(np.log2(max(most, 1e-4)))))
    ticks: list[tuple[int, int, list[str]]] = [(rows_shown, pool[0], labels[0]), (columns_shown, pool[1], labels[1])]
    for axis, (count, cell, texts) in zip((ax.yaxis, ax.xaxis), ticks, strict=True):
        if texts:
            axis.set_ticks(range(count), texts, **PLAIN)
        else:
            number_ticks(axis, range(0, count * cell, cell), 8)
    if labels[1]:
        ax.tick_params(axis="x", rotation=90)
    x, y = f"key token of {drawable(names[1])}", f"query token of {drawable(names[0])}"
    label_axes(ax, x, y, length=0, labelcolor=INK)
    colour_bar(ax, image, "attention")
    return finish(ax, title, path)


def pair_of(trace: Trace, pair: tuple[ICLNode | str, ICLNode | str] | None) -> tuple[ICLNode, ICLNode]:
    graph = trace.prompt.graph
    names = next(iter(trace.tokens)) if pair is None and len(trace.tokens) == 1 else pair
    if names is None:
        kept = ", ".join(map(repr, trace.tokens)) or "none: trace(..., tokens=(query, key)) keeps them"
        raise LeattnError(f"which pair of nodes? The trace has {kept}")
    query, key = (graph[node] for node in names)
    wanted = graph.name(query), graph.name(key)
    if wanted not in trace.tokens:
        raise LeattnError(f"the trace did not keep the pair {wanted!r}; call trace(..., tokens={wanted!r})")
    return query, key


def _of_weights(
    weights: torch.Tensor | Sequence[torch.Tensor],
    prompt: CompiledPrompt,
    query: tuple[int, int],
    key: tuple[int, int],
    layer: Choice,
    head: Choice,
) -> tuple[torch.Tensor, str]:
    """The mean over layers and heads, ``[Q, K]``, and what it is in words."""
    chosen, words = chosen_weights(weights, prompt, layer, head)
    parts = [one[:, slice(*query), slice(*key)].cpu().double().mean(0) for one in chosen]
    return torch.stack(parts).mean(0), words


def _labels(prompt: CompiledPrompt, start: int, stop: int, pool: int) -> list[str]:
    """The tokens written out, or nothing where there are too many."""
    if pool > 1 or stop - start > NAMED:
        return []
    return [drawable(prompt.decode(prompt.input_ids[0, i : i + 1]).replace("\n", "↵"), 14) for i in range(start, stop)]
