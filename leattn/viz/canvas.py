"""What all pictures are drawn on: a figure with room for its title, labels of axes, heat maps and their bars, files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from leattn.errors import LeattnError, choices
from leattn.viz.spread import spread_within
from leattn.viz.style import DPI, FAINT, INK, MASKED, PLAIN, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.image import AxesImage

TITLE = 10.0
"""Points."""
QUARTERS = (0, 0.25, 0.5, 0.75, 1)
"""Ticks at the bar of a share."""
_aside: ContextVar[bool] = ContextVar("leattn_figures_aside", default=False)


@contextmanager
def not_shown() -> Iterator[None]:
    """Figures made in the block are only for files: a notebook does not show them."""
    token = _aside.set(True)
    try:
        yield
    finally:
        _aside.reset(token)


def title_width(title: str) -> float:
    """Inches that the longest of its lines takes."""
    return max((text_width(line, TITLE) for line in title.splitlines()), default=0.0)


def new_axes(
    width: float,
    height: float,
    title: str,
    *,
    left: float,
    bottom: float,
    right: float = 0.0,
    above: float = 0.12,
    before: float = 0.0,
) -> Axes:
    """Axes of ``width`` × ``height`` inches in a figure of their own, with as much around them and room for the title.

    ``above`` is between the axes and the title, which begins ``before`` inches to the left of them. Only where a notebook
    shows pyplot's figures, and closes them itself, is the figure one of pyplot's.
    """
    top = above + 0.09 + 0.19 * len(title.splitlines()) if title else max(above, 0.12)
    right = max(right, title_width(title) - before - width + 0.15)
    size = left + width + right, bottom + height + top
    if "inline" in str(matplotlib.get_backend(auto_select=False)) and not _aside.get():
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=size)
    else:
        figure = Figure(figsize=size)
    return figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))


def size_inches(ax: Axes) -> tuple[float, float]:
    """Width and height of the axes' place in the figure, in inches."""
    place = ax.get_position(original=True)
    width, height = cast(Figure, ax.get_figure(root=True)).get_size_inches()
    return float(place.width * width), float(place.height * height)


def label_axes(ax: Axes, x: str = "", y: str = "", *, spines: Sequence[str] = (), **ticks: Any) -> None:
    """Faint labels and ticks, and no other spines than those named; ``ticks`` go to ``tick_params``."""
    ax.set_xlabel(x, fontsize=8, color=FAINT, **PLAIN)
    ax.set_ylabel(y, fontsize=8, color=FAINT, **PLAIN)
    style: dict[str, Any] = {"length": 2, "width": 0.5, "labelsize": 7, "color": FAINT, "labelcolor": FAINT}
    ax.tick_params(**(style | ticks))
    for side, spine in ax.spines.items():
        spine.set_visible(side in spines)
        spine.set_color(FAINT)


def number_ticks(axis: Axis, numbers: Sequence[int], most: int) -> None:
    """Ticks at 0, 1, …, of which no more than ``most`` are there and say their number."""
    step = max(1, -(-len(numbers) // most))
    axis.set_ticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])


def name_ends(
    ax: Axes, ends: Sequence[float], names: Sequence[str], colours: Sequence[Any] = (), *, font: float, pitch: float
) -> None:
    """Names at the right ends of lines, ``pitch`` points apart; with ``colours``, lines lead from the ends to them."""
    low, high = ax.get_ylim()
    scaled = np.array([low, high, *ends])
    low, high, *rest = np.log(scaled) if ax.get_yscale() == "log" else scaled
    wanted = np.clip((np.array(rest) - low) / (high - low), 0.0, 1.0)
    order = np.argsort(wanted, kind="stable")
    width, height = size_inches(ax)
    places = spread_within(wanted[order], pitch / 72 / height, 0.02, 0.97)  # below the title
    options: dict[str, Any] = {"transform": ax.transAxes, "clip_on": False}
    for i, place in zip(order, places, strict=True):
        if colours:
            ax.plot([1.0, 1.025], [wanted[i], place], color=colours[i], linewidth=0.6, **options)
        x, colour = (1.035, colours[i]) if colours else (1 + 4 / 72 / width, INK)
        ax.text(x, place, names[i], color=colour, fontsize=font, va="center", **options, **PLAIN)


def heat_map(ax: Axes, values: Any, low: float = 0.0, high: float = 1.0, **options: Any) -> AxesImage:
    """``values``, ``[R, C]``, as an image; what is masked in them is grey."""
    colours = matplotlib.colormaps["GnBu"].with_extremes(bad=MASKED)
    options = {"interpolation": "nearest"} | options
    return ax.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", **options)


def write_values(
    ax: Axes,
    values: Any,
    dark: Any,
    *,
    at: float = 0.0,
    largest: float = 8.0,
    share: float = 0.3,
    text: Callable[[float], str] = "{:.2f}".format,
) -> None:
    """The number of every cell that is not masked: white where ``dark``, ``at`` right of and below the cell's indices.

    Its font is ``share`` of the width of a cell, and no larger than ``largest``.
    """
    width, height = size_inches(ax)
    rows, columns = values.shape
    font = min(largest, share * 72 * width / columns, 0.6 * 72 * height / rows)
    for row, column in np.argwhere(~np.ma.getmaskarray(values)):
        colour = "white" if dark[row, column] else INK
        said = text(float(values[row, column]))
        ax.text(column + at, row + at, said, ha="center", va="center", fontsize=font, color=colour)


def colour_bar(ax: Axes, image: AxesImage, label: str, *, ticks: Sequence[float] | None = None, longest: float = 2.4) -> None:
    """A small bar to the right of the axes."""
    width, height = size_inches(ax)
    # An inset moves with its axes and takes no room from them.
    inset = ax.inset_axes((1 + 0.12 / width, 0.0, 0.11 / width, min(1.0, longest / height)))
    bar = cast(Figure, ax.get_figure(root=True)).colorbar(image, cax=inset, ticks=ticks)
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=7, color=FAINT)
    inset.tick_params(length=2, width=0.5, labelsize=7, color=FAINT, labelcolor=FAINT)


def finish(ax: Axes, title: str, path: str | Path | None, *, lift: float = 0.0, before: float = 0.0) -> Axes:
    """Write the title, ``lift`` inches higher than usual and ``before`` further to the left, and the file, if there is one."""
    x = -before / size_inches(ax)[0]
    ax.set_title(title, loc="left", fontsize=TITLE, color=INK, pad=6 + 72 * lift, x=x, ha="left", **PLAIN)
    if path is not None:
        save(cast(Figure, ax.get_figure(root=True)), path)
    return ax


def check_suffix(path: str | Path) -> str:
    """The suffix of a file that a figure can be written to.

    Raises
    ------
    LeattnError
        It is that of no picture format.
    """
    known = Figure().canvas.get_supported_filetypes()
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in known:
        raise LeattnError(f"cannot write {str(path)!r}: " + choices("suffix", suffix, sorted(known)))
    return suffix


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure; without the date, so that the same picture is the same file."""
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    figure.savefig(path, dpi=DPI, metadata=undated.get(check_suffix(path)))
