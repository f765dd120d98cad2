"""Methods compared: means with intervals, against what they cost, and by the place of the document that holds the answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.ticker import MaxNLocator

from leattn.errors import LeattnError
from leattn.viz.canvas import finish, label_axes, name_ends, new_axes
from leattn.viz.style import INK, PLAIN, drawable, node_colours, text_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from leattn.comparison.comparison import Comparison

_UNITS = {
    "loss": "loss (nats per token)",
    "right": "right answers (share)",
    "accuracy": "accuracy (share)",
    "accuracy_by_token": "accuracy by token (share)",
    "tokens_cold": "tokens to the first one, cold",
    "tokens_warm": "tokens to the first one, documents known",
    "seconds_cold": "seconds to the first token, cold",
    "seconds_warm": "seconds to the first token, documents known",
}
FONT = 8.0


def plot_comparison(
    found: Comparison,
    metric: str,
    *,
    against: str | None = None,
    baseline: str | None = "plain",
    ax: Axes | None = None,
    path: str | Path | None = None,
    title: str | None = None,
) -> Axes:
    """Means of a metric with their 95 % intervals, a line per method; or ``against`` another one, such as ``"seconds_warm"``.

    Parameters
    ----------
    found
        What :func:`leattn.compare` returned.
    metric, against
        Columns of it.
    baseline
        A method whose mean is drawn as a dashed line, if it was measured.
    ax, path, title
        As in :func:`leattn.viz.plot_sweep`.

    Raises
    ------
    LeattnError
        A metric that was not measured.

    Examples
    --------
    >>> from leattn.comparison.comparison import Comparison, Row
    >>> rows = [Row(method, str(i), "right", float(i < n)) for method, n in (("plain", 3), ("pcw", 2)) for i in range(4)]
    >>> plot_comparison(Comparison(tuple(rows), {"model": "m"}, frozenset(["right"])), "right").get_xlabel()
    'right answers (share)'
    """
    names = [name for name in found.methods if metric in found.metrics and _has(found, name, metric)]
    if against is not None:
        names = [name for name in names if _has(found, name, against)]
    if not names:
        what = repr(metric) if against is None else f"{metric!r} and {against!r}"
        raise LeattnError(f"no method has {what}; there are {', '.join(found.metrics)}")
    points = [found.summary(name, metric) for name in names]
    if title is None:
        title = f"{drawable(metric, 40)} by method\n{_what(found)}"
    colours = node_colours(len(names))
    labels = [drawable(name, 40) for name in names]
    if against is not None:
        return _scatter(found, names, labels, metric, against, ax, path, title)
    if ax is None:
        left = max(text_width(label, FONT) for label in labels) + 0.25
        ax = new_axes(3.8, 0.26 * len(names) + 0.2, title, left=left, bottom=0.5, right=0.25, above=0.04)
    for i, (point, colour) in enumerate(zip(points, colours, strict=True)):
        ax.plot([point.low, point.high], [i, i], color=colour, linewidth=1.6, solid_capstyle="butt")
        ax.plot(point.mean, i, "o", color=colour, markersize=5, markeredgewidth=0)
    if baseline in names:
        ax.axvline(points[names.index(baseline)].mean, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    label_axes(ax, _UNITS.get(metric, drawable(metric, 40)), "", spines=["bottom"])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_yticks(range(len(names)), labels, fontsize=FONT, color=INK, **PLAIN)
    ax.tick_params(axis="y", length=0)
    return finish(ax, title, path)


def plot_places(
    found: Comparison,
    metric: str,
    *,
    methods: Sequence[str] | None = None,
    ax: Axes | None = None,
    path: str | Path | None = None,
    title: str | None = None,
) -> Axes:
    """A metric against the place of the document that holds the answer, a line per method ("lost in the middle").

    Parameters
    ----------
    found, metric
        As in :func:`plot_comparison`.
    methods
        Which; all that have a place for None.
    ax, path, title
        As in :func:`leattn.viz.plot_sweep`.

    Raises
    ------
    LeattnError
        No example says where its gold document is.
    """
    lines = {name: found.by_place(name, metric) for name in (found.methods if methods is None else methods)}
    lines = {name: places for name, places in lines.items() if places}
    if not lines:
        raise LeattnError(f"nothing was measured of {metric!r} by place; give examples their gold document")
    if title is None:
        title = f"{drawable(metric, 40)} by the place of the gold document\n{_what(found)}"
    labels = [drawable(name, 40) for name in lines]
    if ax is None:
        right = max(text_width(label, FONT) for label in labels) + 0.3
        ax = new_axes(4.2, 2.8, title, left=0.7, bottom=0.5, right=right, above=0.04)
    colours = node_colours(len(lines))
    ends = []
    for (_, places), colour in zip(lines.items(), colours, strict=True):
        order = list(places)
        means = [places[place].mean for place in order]
        ax.plot([place + 1 for place in order], means, "o-", color=colour, markersize=3.5, markeredgewidth=0, linewidth=1.4)
        ends.append(means[-1])
    ax.margins(x=0.02)
    name_ends(ax, ends, labels, list(colours), font=FONT, pitch=1.25 * FONT)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    label_axes(
        ax, "place of the document that holds the answer", _UNITS.get(metric, drawable(metric, 40)), spines=["left", "bottom"]
    )
    return finish(ax, title, path)


def _scatter(
    found: Comparison,
    names: Sequence[str],
    labels: Sequence[str],
    metric: str,
    against: str,
    ax: Axes | None,
    path: str | Path | None,
    title: str,
) -> Axes:
    if ax is None:
        right = max(text_width(label, FONT) for label in labels) + 0.3
        ax = new_axes(4.2, 3.0, title, left=0.7, bottom=0.5, right=right, above=0.04)
    colours = node_colours(len(names))
    ends = []
    for name, colour in zip(names, colours, strict=True):
        x, y = found.summary(name, against), found.summary(name, metric)
        ax.plot([x.low, x.high], [y.mean, y.mean], color=colour, linewidth=1.0)
        ax.plot([x.mean, x.mean], [y.low, y.high], color=colour, linewidth=1.0)
        ax.plot(x.mean, y.mean, "o", color=colour, markersize=5, markeredgewidth=0)
        ends.append(y.mean)
    name_ends(ax, ends, labels, list(colours), font=FONT, pitch=1.25 * FONT)
    x_label, y_label = (_UNITS.get(each, drawable(each, 40)) for each in (against, metric))
    label_axes(ax, x_label, y_label, spines=["left", "bottom"])
    return finish(ax, title, path)


def _has(found: Comparison, method: str, metric: str) -> bool:
    return any(row.method == method and row.metric == metric for row in found.rows)


def _what(found: Comparison) -> str:
    count = len({row.example for row in found.rows})
    return f"{drawable(str(found.settings.get('model', 'model')), 40)}, {count} examples, 95 % intervals"
