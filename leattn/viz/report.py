"""A folder of pictures of one trace."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from leattn.viz.attention import plot_attention
from leattn.viz.canvas import not_shown
from leattn.viz.norms import plot_norms
from leattn.viz.select import layer_rows
from leattn.viz.sinks import plot_sinks

if TYPE_CHECKING:
    from leattn.analysis.trace import Trace

FIRST = 10


def save_report(trace: Trace, directory: str | Path, *, layers: Sequence[int] | None = None) -> tuple[Path, ...]:
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

    Returns
    -------
    The paths, in the order above.

    Raises
    ------
    LeattnError
        A layer that was not traced, before anything is written.

    Examples
    --------
    >>> import leattn, tempfile
    >>> from leattn.analysis import trace
    >>> model, tokenizer = leattn.tiny.load()
    >>> prompt = leattn.compile_prompt(leattn.ICLNode("The sky is blue.", [leattn.bos(tokenizer)]), tokenizer)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [path.name for path in save_report(trace(model, prompt, layers=0), folder)][:3]
    ['layer_0_attention.png', 'hidden_states_0_norm.png', 'kv_0_norm.png']
    """
    rows = range(min(FIRST, len(trace.layers))) if layers is None else layer_rows(trace, layers)
    pictures: dict[str, Callable[[Path], object]] = {}
    for number in (trace.layers[row] for row in rows):
        pictures[f"layer_{number}_attention.png"] = partial(_attention, trace, number)
        pictures[f"hidden_states_{number}_norm.png"] = partial(_hidden, trace, number)
        pictures[f"kv_{number}_norm.png"] = partial(_keys_and_values, trace, number)
    pictures["sinks.png"] = lambda path: plot_sinks(trace, path=path)
    pictures["hidden_norms.png"] = lambda path: plot_norms(trace, path=path)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        _write_whole(folder / name, draw)
    return tuple(folder / name for name in pictures)


def _attention(trace: Trace, layer: int, path: Path) -> None:
    plot_attention(trace, layer=layer, path=path)


def _hidden(trace: Trace, layer: int, path: Path) -> None:
    plot_norms(trace, layer=layer, path=path)


def _keys_and_values(trace: Trace, layer: int, path: Path) -> None:
    """Two axes, one above the other, each as large as it would be by itself."""
    upper = plot_norms(trace, kind="keys", layer=layer)
    figure = upper.get_figure(root=True)
    assert figure is not None
    width, height = figure.get_size_inches()
    left, bottom, across, up = upper.get_position(original=True).bounds
    figure.set_size_inches(width, 2 * height)
    upper.set_position((left, (1 + bottom) / 2, across, up / 2))
    lower = figure.add_axes((left, bottom / 2, across, up / 2))
    plot_norms(trace, kind="values", layer=layer, ax=lower, path=path)


def _write_whole(path: Path, draw: Callable[[Path], object]) -> None:
    """Draw to a file beside it, then rename: an interrupted report leaves no half of a picture."""
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        with not_shown():
            draw(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
