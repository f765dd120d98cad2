"""A sweep over layers: curves with bands, and the heat map of an injection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.ticker import MaxNLocator

from leattn.errors import LeattnError, choices
from leattn.viz.canvas import colour_bar, finish, heat_map, label_axes, name_ends, new_axes, number_ticks, write_values
from leattn.viz.style import INK, drawable, node_colours, text_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from leattn.analysis.sweep_result import SweepResult

ANNOTATED = 14
"""Up to this many layers, every cell of a heat map says its value."""
_MARKS = "osD^vP*X"
"""With a mark of its own, a curve is told apart without its colour."""


def plot_sweep(
    result: SweepResult,
    *,
    kind: Literal["layers", "injection"] | None = None,
    operation: str | Sequence[str] | None = None,
    target: Literal["own", "donor"] = "own",
    ax: Axes | None = None,
    path: str | Path | None = None,
    title: str | None = None,
) -> Axes:
    r"""A metric against the layer of an intervention, or against both layers of an injection.

    Parameters
    ----------
    result
        What :func:`leattn.analysis.sweep` returned.
    kind
        ``"layers"``: one curve per operation with its 95 % interval over prompts, and a dashed line where nothing is touched.
        ``"injection"``: a heat map, states put in at x that come from y. None: curves if there are any.
    operation
        Which; all curves, or the first injection, for None.
    target
        Of an injection: whether the prompt's own answer stays (``"own"``), or the donor's takes its place (``"donor"``).
    ax
        Where to draw; otherwise a new figure.
    path
        Write the figure there: PNG, SVG or PDF by its suffix.
    title
        Instead of the one that states quantity, model, prompts and interval; ``""`` for none.

    Raises
    ------
    LeattnError
        An unknown kind or operation, one that the kind cannot show, a target that was not measured.

    Examples
    --------
    >>> import leattn
    >>> from random import Random
    >>> from leattn.tiny.examples import make
    >>> model, tokenizer = leattn.tiny.load()
    >>> example = make("parallel", Random(0), n=2)
    >>> result = leattn.analysis.sweep(model, [example.compile(tokenizer)], ["skip"], targets=[example.answer])
    >>> plot_sweep(result).get_ylabel()
    'accuracy (share of prompts)'
    """
    injections = [name for name in result.operations if result.source_layers(name)]
    curves = [name for name in result.operations if name not in injections]
    kind = kind or ("layers" if curves else "injection")
    if kind not in ("layers", "injection"):
        raise LeattnError(choices("kind", kind, ("layers", "injection")))
    known = curves if kind == "layers" else injections
    if not known:
        raise LeattnError(f"this sweep has nothing to show as kind={kind!r}; its operations are {', '.join(result.operations)}")
    chosen = known if operation is None else [operation] if isinstance(operation, str) else list(operation)
    for name in chosen:
        if name not in known:
            raise LeattnError(choices(f"operation for kind={kind!r}", name, known))
    if kind == "layers":
        return _curves(result, chosen, ax, path, title)
    return _heat_map(result, chosen[0], target, ax, path, title)


def _curves(result: SweepResult, chosen: Sequence[str], ax: Axes | None, path: str | Path | None, title: str | None) -> Axes:
    if title is None:
        seeds = f", {len(result.seeds)} seeds" if len(result.seeds) > 1 else ""
        title = f"{_quantity(result.metric)} against layer\n{_model(result)}{seeds}, {result.interval} 95 % interval"
    ends = [drawable(name) for name in chosen]
    font = 8.5
    if ax is None:
        width, height = float(np.clip(0.3 * len(result.layers), 3.6, 6.5)), 2.6
        right = max(text_width(end, font) for end in [*ends, "untouched"]) + 0.3
        ax = new_axes(width, height, title, left=0.75, bottom=0.5, right=right, above=0.04)
    colours = node_colours(len(chosen))
    last = []
    for i, name in enumerate(chosen):
        order = result.measured(name)
        points = [result.summary(name, layer) for layer in order]
        means = [point.mean for point in points]
        low, high = [point.low for point in points], [point.high for point in points]
        ax.fill_between(order, low, high, color=colours[i], alpha=0.13, linewidth=0)
        mark = _MARKS[i % len(_MARKS)] if len(order) <= 40 else ""
        style: dict[str, Any] = {"marker": mark, "markersize": 4, "markeredgewidth": 0, "linewidth": 1.6}
        ax.plot(order, means, color=colours[i], clip_on=False, zorder=3, **style)
        last.append(means[-1])
    base = result.summary("untouched")
    ax.axhline(base.mean, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=2)
    if result.metric == "accuracy":
        ax.set_ylim(-0.03, 1.03)
    ax.margins(x=0.02)
    name_ends(ax, [*last, base.mean], [*ends, "untouched"], [*colours, INK], font=font, pitch=1.25 * font)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    label_axes(ax, "layer of the operation", _axis(result.metric), spines=["left", "bottom"], labelsize=7.5)
    return finish(ax, title, path)


def _heat_map(result: SweepResult, name: str, target: str, ax: Axes | None, path: str | Path | None, title: str | None) -> Axes:
    columns, rows = sorted(result.layers), result.source_layers(name)
    means = np.array([[result.mean(name, b, source_layer=a, target=target) for b in columns] for a in rows])
    whose = "the prompt's own answer" if target == "own" else "the donor's answer"
    if title is None:
        title = f"{_quantity(result.metric)} of {whose}, states injected\n{_model(result)}"
    if ax is None:
        cell = float(np.clip(4.2 / max(len(columns), len(rows)), 0.12, 0.6))
        width, height = max(cell * len(columns), 1.6), max(cell * len(rows), 1.6)
        ax = new_axes(width, height, title, left=0.75, bottom=0.55, right=0.9, above=0.04)
    low, high = (0.0, 1.0) if result.metric == "accuracy" else (float(means.min()), float(means.max()))
    image = heat_map(ax, means, low, high, origin="lower")
    number_ticks(ax.xaxis, columns, 16)
    number_ticks(ax.yaxis, rows, 16)
    label_axes(ax, "into layer", "from layer", labelsize=7.5)
    if max(means.shape) <= ANNOTATED:
        write_values(ax, means, means > low + 0.6 * (high - low))
    colour_bar(ax, image, _axis(result.metric), longest=float("inf"))
    return finish(ax, title, path)


def _quantity(metric: str) -> str:
    return drawable(metric.rsplit(".", 1)[-1], 40)


def _axis(metric: str) -> str:
    return {"accuracy": "accuracy (share of prompts)", "loss": "loss (nats, sum over target tokens)"}.get(
        metric, _quantity(metric)
    )


def _model(result: SweepResult) -> str:
    return f"{result.model}, {result.prompts} prompt{'s' * (result.prompts != 1)}"
