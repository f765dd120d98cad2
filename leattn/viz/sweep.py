"""A sweep over layers: curves with bands, and the heat map of an injection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from matplotlib.ticker import MaxNLocator

from leattn.errors import LeattnError, choices
from leattn.viz.spread import spread_within
from leattn.viz.style import FAINT, INK, PLAIN, drawable, new_axes, node_colours, save, size_inches, text_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    drawn = _curves(result, chosen, ax, title) if kind == "layers" else _heat_map(result, chosen[0], target, ax, title)
    save(drawn, path)
    return drawn


def _curves(result: SweepResult, chosen: Sequence[str], ax: Axes | None, title: str | None) -> Axes:
    if title is None:
        seeds = f", {len(result.seeds)} seeds" if len(result.seeds) > 1 else ""
        title = f"{_quantity(result.metric)} against layer\n{_model(result)}{seeds}, {result.interval} 95 % interval"
    ends = [drawable(name) for name in chosen]
    font = 8.5
    if ax is None:
        width, height = float(np.clip(0.3 * len(result.layers), 3.6, 6.5)), 2.6
        right = max(text_width(end, font) for end in [*ends, "untouched"]) + 0.3
        right = max(right, *(text_width(line, 10) - width + 0.1 for line in ["", *title.splitlines()]))
        top = 0.15 + 0.18 * len(title.splitlines())
        ax = new_axes(0.75 + width + right, 0.5 + height + top, (0.75, 0.5, width, height))
    order = sorted(result.layers)
    colours = node_colours(len(chosen))
    last = []
    for i, name in enumerate(chosen):
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
    _end_labels(ax, [*last, base.mean], [*ends, "untouched"], [*colours, INK], font)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    ax.set_xlabel("layer of the operation", fontsize=8, color=FAINT)
    ax.set_ylabel(_axis(result.metric), fontsize=8, color=FAINT)
    ax.tick_params(length=2, width=0.5, labelsize=7.5, color=FAINT, labelcolor=FAINT)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.set_title(title, loc="left", fontsize=10, color=INK, **PLAIN)
    return ax


def _end_labels(ax: Axes, values: list[float], labels: list[str], colours: list[Any], font: float) -> None:
    """Names at the right ends of curves, kept apart."""
    low, high = ax.get_ylim()
    wanted = np.clip((np.array(values) - low) / (high - low), 0.0, 1.0)
    order = np.argsort(wanted, kind="stable")
    pitch = font * 1.25 / 72 / size_inches(ax)[1]
    places = spread_within(wanted[order], pitch, 0.02, 0.97)  # below the title
    for i, place in zip(order, places, strict=True):
        options: dict[str, Any] = {"transform": ax.transAxes, "clip_on": False}
        ax.plot([1.0, 1.025], [wanted[i], place], color=colours[i], linewidth=0.6, **options)
        ax.text(1.035, place, labels[i], color=colours[i], fontsize=font, va="center", **options, **PLAIN)


def _heat_map(result: SweepResult, name: str, target: str, ax: Axes | None, title: str | None) -> Axes:
    columns, rows = sorted(result.layers), result.source_layers(name)
    means = np.array([[result.mean(name, b, source_layer=a, target=target) for b in columns] for a in rows])
    whose = "the prompt's own answer" if target == "own" else "the donor's answer"
    if title is None:
        title = f"{_quantity(result.metric)} of {whose}, states injected\n{_model(result)}"
    if ax is None:
        cell = float(np.clip(4.2 / max(len(columns), len(rows)), 0.12, 0.6))
        width, height = max(cell * len(columns), 1.6), max(cell * len(rows), 1.6)
        right = max(0.9, *(text_width(line, 10) - width + 0.1 for line in ["", *title.splitlines()]))
        top = 0.15 + 0.18 * len(title.splitlines())
        ax = new_axes(0.75 + width + right, 0.55 + height + top, (0.75, 0.55, width, height))
    low, high = (0.0, 1.0) if result.metric == "accuracy" else (float(means.min()), float(means.max()))
    image = ax.imshow(means, cmap="GnBu", vmin=low, vmax=high, origin="lower", aspect="auto", interpolation="nearest")
    for axis, numbers, label in ((ax.xaxis, columns, "into layer"), (ax.yaxis, rows, "from layer")):
        step = -(-len(numbers) // 16)
        axis.set_ticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
        axis.set_label_text(label, fontsize=8, color=FAINT)
    ax.tick_params(length=2, width=0.5, labelsize=7.5, color=FAINT, labelcolor=FAINT)
    ax.spines[:].set_visible(False)
    width, height = size_inches(ax)
    if max(means.shape) <= ANNOTATED:
        font = min(8.0, 0.3 * min(width / len(columns), height / len(rows)) * 72)
        for (row, column), value in np.ndenumerate(means):
            colour = "white" if value > low + 0.6 * (high - low) else INK
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=font, color=colour)
    inset = ax.inset_axes((1 + 0.12 / width, 0.0, 0.11 / width, 1.0))
    bar = cast("Figure", ax.get_figure(root=True)).colorbar(image, cax=inset)
    bar.outline.set_visible(False)
    bar.set_label(_axis(result.metric), fontsize=7, color=FAINT)
    inset.tick_params(length=2, width=0.5, labelsize=7, color=FAINT, labelcolor=FAINT)
    ax.set_title(title, loc="left", fontsize=10, color=INK, **PLAIN)
    return ax


def _quantity(metric: str) -> str:
    return drawable(metric.rsplit(".", 1)[-1], 40)


def _axis(metric: str) -> str:
    return {"accuracy": "accuracy (share of prompts)", "loss": "loss (nats, sum over target tokens)"}.get(
        metric, _quantity(metric)
    )


def _model(result: SweepResult) -> str:
    return f"{result.model}, {result.prompts} prompt{'s' * (result.prompts != 1)}"
