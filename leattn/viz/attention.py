"""Attention weights, node × node, as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from matplotlib.collections import LineCollection

from leattn.errors import LeattnError, LeattnWarning
from leattn.viz.brackets import square
from leattn.viz.canvas import QUARTERS, colour_bar, finish, heat_map, label_axes, write_values
from leattn.viz.fold import fold_attention
from leattn.viz.select import Choice, check_trace, chosen_of, chosen_weights
from leattn.viz.style import FloatArray, drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from leattn.analysis.trace import Trace
    from leattn.prompt.compiled import CompiledPrompt

ANNOTATED = 14
"""Up to this many nodes, every cell says its value."""
STRAY = 1e-3
"""So much attention on pairs that the prompt forbids means that the weights are another prompt's."""


def plot_attention(
    weights: torch.Tensor | Sequence[torch.Tensor] | Trace,
    prompt: CompiledPrompt | None = None,
    *,
    layer: Choice = None,
    head: Choice = None,
    ax: Axes | None = None,
    path: str | Path | None = None,
    title: str | None = None,
) -> Axes:
    r"""How much of its attention each node gives to each node it sees; rows sum to 1, grey is masked.

    Parameters
    ----------
    weights
        ``outputs.attentions`` of eager attention, one tensor ``[1, H, S, S]`` per layer; or one layer's tensor
        ``[1, H, S, S]``, ``[H, S, S]`` or ``[S, S]``. See :func:`leattn.viz.fold_attention` for what is folded how.
        Or a :class:`leattn.analysis.Trace`, which holds all of it.
    prompt
        The S tokens that the weights are about; a trace has its own.
    layer, head
        Which to take the mean over: an index, several, or all. Negative ones count from the end.
    ax
        Where to draw, best of equal width and height; otherwise a new figure.
    path
        Write the figure there: PNG, SVG or PDF by its suffix.
    title
        Instead of the one that states quantity, layers, heads and dtype; ``""`` for none.

    Raises
    ------
    LeattnError
        Weights that are missing or do not fit the prompt, a batch of several rows, a layer or head that does not exist.

    Warns
    -----
    LeattnWarning
        Weights on pairs that the prompt forbids: they were not computed with its mask.

    Examples
    --------
    >>> from leattn import ICLNode, compile_prompt
    >>> prompt = compile_prompt(ICLNode([7], parents=[ICLNode([5, 6], id="doc")], id="Q"))
    >>> weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.3, 0.3, 0.4]])
    >>> plot_attention(weights, prompt).get_title(loc="left")
    'attention from node to node\nfloat32'
    """
    if isinstance(weights, torch.Tensor | Sequence):
        if prompt is None:
            raise LeattnError("attention weights alone do not say which nodes they are about; give the prompt, too")
        mass, what = _reduced(weights, prompt, layer, head)
    else:
        check_trace("plot_attention", weights)
        mass, what, prompt = *_of_trace(weights, layer, head), weights.prompt
    allowed = _allowed(prompt)
    stray = float((mass * ~allowed).sum() / len(mass))
    if stray > STRAY:
        import warnings

        warnings.warn(
            f"{stray:.1%} of the attention falls on pairs that this prompt forbids (grey); compute the weights with its mask: "
            "leattn.attend(model, prompt, backend='eager')",
            LeattnWarning,
            stacklevel=2,
        )
    count = len(mass)
    labels = [drawable(name) for name in prompt.graph.names.values()]
    title = f"attention from node to node\n{what}" if title is None else title
    side = float(np.clip(0.42 * count, 2.4, 5.6))
    ax, brackets = square(ax, np.arange(count + 1, dtype=np.float64), labels, title, side, right=0.9)
    shown = np.ma.masked_array(mass, ~allowed)
    image = heat_map(ax, shown, extent=(0, count, count, 0), interpolation=None)
    if count <= 3 * ANNOTATED:
        inner = range(1, count)
        lines = [[(i, 0), (i, count)] for i in inner] + [[(0, i), (count, i)] for i in inner]
        ax.add_collection(LineCollection(lines, colors="white", linewidths=0.8), autolim=False)
    if count <= ANNOTATED:
        write_values(ax, shown, mass > 0.6, at=0.5)
    ax.set_xticks([])
    ax.set_yticks([])
    label_axes(ax, "key node")
    brackets.draw(ax)
    colour_bar(ax, image, "attention (a row sums to 1)", ticks=QUARTERS)
    return finish(ax, title, path, lift=brackets.top)


def _reduced(
    weights: torch.Tensor | Sequence[torch.Tensor],
    prompt: CompiledPrompt,
    layer: Choice,
    head: Choice,
) -> tuple[FloatArray, str]:
    """The mean over the chosen layers and heads, ``[N, N]``, and what it is in words."""
    chosen, words = chosen_weights(weights, prompt, layer, head)
    # Folding is linear, so the mean may come first within a layer: N × N numbers per layer are kept, not per head.
    mean = torch.stack([fold_attention(one.cpu(), prompt).double().mean(0) for one in chosen]).mean(0)
    return cast(FloatArray, mean.numpy()), words


def _of_trace(trace: Trace, layer: Choice, head: Choice) -> tuple[FloatArray, str]:
    """Attention folded to nodes, from what a trace kept."""
    rows, heads, words = chosen_of(trace, layer, head)
    mass = trace.mass[rows][:, heads].double().mean((0, 1)).numpy()
    return cast(FloatArray, mass), f"{words}, {trace.dtype}, {trace.model}"


def _allowed(prompt: CompiledPrompt) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Which pairs of nodes attend at all, ``[N, N]``."""
    allowed = np.eye(len(prompt.graph), dtype=bool)
    for node, start, stop in zip(*prompt.visible.flat(), strict=True):
        allowed[node, start:stop] = True
    return allowed
