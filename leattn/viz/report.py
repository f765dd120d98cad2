"""A folder of pictures of one trace."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

from matplotlib.artist import Artist
from matplotlib.figure import Figure

from leattn.errors import LeattnError
from leattn.viz.attention import plot_attention
from leattn.viz.canvas import check_suffix, not_shown, save
from leattn.viz.norms import plot_norms
from leattn.viz.select import check_trace, layer_rows
from leattn.viz.sinks import plot_sinks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from leattn.analysis.trace import Trace

Plot: TypeAlias = "Callable[..., Axes | Figure]"
"""``plot(trace)``, or ``plot(trace, layer=i)`` where its file has ``{layer}`` in its name."""
FIRST = 10


def _keys_and_values(trace: Trace, *, layer: int) -> Axes:
    """Two axes, one above the other, each as large as it would be by itself."""
    upper = plot_norms(trace, kind="keys", layer=layer)
    figure = upper.get_figure(root=True)
    assert figure is not None
    width, height = figure.get_size_inches()
    left, bottom, across, up = upper.get_position(original=True).bounds
    figure.set_size_inches(width, 2 * height)
    upper.set_position((left, (1 + bottom) / 2, across, up / 2))
    return plot_norms(trace, kind="values", layer=layer, ax=figure.add_axes((left, bottom / 2, across, up / 2)))


PLOTS: Mapping[str, Plot] = MappingProxyType(
    {
        "layer_{layer}_attention.png": plot_attention,
        "hidden_states_{layer}_norm.png": plot_norms,
        "kv_{layer}_norm.png": _keys_and_values,
        "sinks.png": plot_sinks,
        "hidden_norms.png": plot_norms,
    }
)
"""The pictures of a report: file name → what draws it."""


def save_report(
    trace: Trace, directory: str | Path, *, layers: Sequence[int] | None = None, plots: Mapping[str, Plot] = PLOTS
) -> tuple[Path, ...]:
    """Write pictures of attention and norms, layer by layer.

    For each layer i ``layer_{i}_attention.png`` (node to node, mean over the heads), ``hidden_states_{i}_norm.png`` and
    ``kv_{i}_norm.png`` (keys and values, per head); for all traced layers together ``sinks.png`` (attention to root tokens)
    and ``hidden_norms.png`` (the three largest and the median). A file is there whole or not at all; others are left alone.

    Parameters
    ----------
    trace
        What :func:`leattn.analysis.trace` returns.
    directory
        Made if need be.
    layers
        Which; by default the first ten that were traced.
    plots
        Which pictures, as file name → function: ``dict(leattn.viz.PLOTS)`` with any of them added, replaced or left out. The
        function of ``"mine.png"`` is called with the trace, that of ``"mine_{layer}.png"`` once per layer with ``layer=i``,
        too; each returns the axes or the figure to be written. PNG, SVG or PDF by the suffix.

    Returns
    -------
    The paths as they were written: layer by layer, then those of all layers.

    Raises
    ------
    LeattnError
        Something else than one trace, a layer that was not traced or a name that no picture can have, before anything is
        written. A plot that returns neither axes nor a figure.

    Examples
    --------
    >>> import leattn, tempfile
    >>> from leattn.analysis import trace
    >>> model, tokenizer = leattn.tiny.load()
    >>> prompt = leattn.compile_prompt(leattn.ICLNode("The sky is blue.", [leattn.bos(tokenizer)]), tokenizer)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [path.name for path in save_report(trace(model, prompt, layers=0), folder)][:3]
    ['layer_0_attention.png', 'hidden_states_0_norm.png', 'kv_0_norm.png']

    A picture of one's own beside them, how widely each node looks around in a layer:

    >>> import torch
    >>> from matplotlib.figure import Figure
    >>> def entropy(trace, *, layer):
    ...     shares = trace.mass[trace.layers.index(layer)].mean(0)
    ...     ax = Figure().add_subplot(ylabel="entropy of attention over nodes (nats)")
    ...     ax.bar(list(trace.prompt.graph.names.values()), torch.special.entr(shares).sum(-1).tolist())
    ...     return ax
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plots = {**leattn.viz.PLOTS, "entropy_{layer}.svg": entropy}
    ...     [path.name for path in save_report(trace(model, prompt, layers=0), folder, plots=plots)][-3:]
    ['entropy_0.svg', 'sinks.png', 'hidden_norms.png']
    """
    check_trace("save_report", trace)
    rows = range(min(FIRST, len(trace.layers))) if layers is None else layer_rows(trace, layers)
    for name in plots:
        check_suffix(name)
        if Path(name).name != name:
            raise LeattnError(f"{name!r} is a path; plots are named by files, which are all put into the folder of the report")
    each = [name for name in plots if "{layer}" in name]
    pictures = {
        name.replace("{layer}", str(number)): partial(plots[name], trace, layer=number)
        for number in (trace.layers[row] for row in rows)
        for name in each
    }
    pictures |= {name: partial(plot, trace) for name, plot in plots.items() if name not in each}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        _write_whole(folder / name, draw)
    return tuple(folder / name for name in pictures)


def _write_whole(path: Path, draw: Callable[[], Axes | Figure]) -> None:
    """Write to a file beside it, then rename: an interrupted report leaves no half of a picture."""
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    with not_shown():
        drawn: object = draw()
    figure = drawn.get_figure(root=True) if isinstance(drawn, Artist) else None
    if not isinstance(figure, Figure):
        raise LeattnError(f"the plot for {path.name} returned {drawn!r}; return the axes or the figure to be written")
    try:
        save(figure, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        if "matplotlib.pyplot" in sys.modules:  # which else would keep a figure that was made with it, and show it
            sys.modules["matplotlib.pyplot"].close(figure)
