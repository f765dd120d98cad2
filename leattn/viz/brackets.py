"""Names of nodes on brackets beside an axis; they thin out where there are more than fit."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.collections import LineCollection

from leattn.viz.canvas import new_axes, size_inches
from leattn.viz.spread import spread_within
from leattn.viz.style import FAINT, INK, PLAIN, FloatArray, node_colours, node_shades, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THIN = 3.0
"""Nodes narrower than this many points share a bracket with neighbours of their colour."""
THINNED = 26
"""Names along an axis where not all have room: more are slow to draw and no easier to read."""
_NEAR, _FAR, _LEADER, _TEXT = 3.0, 6.5, 13.0, 15.0
"""Distances from the axes in points: ends of a bracket, its back, the end of a leader, the text."""


@dataclass(frozen=True)
class Brackets:
    """The names along both axes of one square picture.

    Attributes
    ----------
    bounds
        ``[N + 1]``, where each node starts and ends, in data units from 0.
    labels
        What stands at each bracket, ``N`` of them.
    length
        Of either axis, in inches.
    """

    bounds: FloatArray
    labels: Sequence[str]
    length: float

    @property
    def font(self) -> float:
        return 8.5 if len(self.labels) <= 24 else 7.0

    @property
    def widest(self) -> float:
        """Inches that the widest label takes, whether or not it will be shown."""
        return max(text_width(label, self.font) for label in self.labels)

    @property
    def level(self) -> bool:
        """Whether all labels on top fit above their own brackets, so that they need no slant."""
        room = np.diff(self.bounds) * self.length / self.bounds[-1]
        return all(text_width(label, self.font) + 0.08 < width for label, width in zip(self.labels, room, strict=True))

    @property
    def left(self) -> float:
        """Inches that the names of the queries take beside the axes."""
        return self.widest + (_TEXT + 2) / 72

    @property
    def top(self) -> float:
        """Inches that the names of the keys take above the axes."""
        return (self.font * 1.2 if self.level else self.widest * 72 * 0.71 + self.font * 0.8) / 72 + (_TEXT - 1) / 72

    @property
    def overhang(self) -> float:
        """Inches by which slanted names may reach past the right end."""
        return 0.0 if self.level else max(0.0, self.widest * 0.71 - 0.1)

    def draw(self, ax: Axes, sides: Sequence[Literal["left", "top"]] = ("left", "top")) -> None:
        """Queries on the left, keys on top."""
        for side in sides:
            self._side(ax, side)

    def _side(self, ax: Axes, side: Literal["left", "top"]) -> None:
        width, height = size_inches(ax)
        total = self.bounds[-1]
        # Positions along the axis are fractions, as distances from it are: no transform depends on the data.
        along = (total - self.bounds) / total if side == "left" else self.bounds / total
        point = (-1 / 72 / width) if side == "left" else (1 / 72 / height)
        edge = 0.0 if side == "left" else 1.0
        points_long = (height if side == "left" else width) * 72

        def at(distance: float, place: float) -> tuple[float, float]:
            outside = edge + point * distance
            return (outside, place) if side == "left" else (place, outside)

        lines, colours = [], []
        for first, last, colour in self._groups(points_long):
            start, end = sorted((along[first], along[last]))
            inset = min(1.1 / points_long, (end - start) / 4)
            start, end = start + inset, end - inset
            lines.append([at(_NEAR, start), at(_FAR, start), at(_FAR, end), at(_NEAR, end)])
            colours.append(colour)
        options: dict[str, Any] = {"transform": ax.transAxes, "clip_on": False}
        ax.add_collection(LineCollection(lines, colors=colours, linewidths=1.2, capstyle="butt", **options), autolim=False)

        level = side == "top" and self.level
        pitch = self.font * (1.2 if side == "left" else 1.55) / points_long
        centres = (along[:-1] + along[1:]) / 2
        shown = list(range(len(centres))) if level else self._chosen(centres, pitch)
        shown.sort(key=lambda i: centres[i])
        places = centres[shown] if level else spread_within(centres[shown], pitch, 0.35 * pitch, 1 - 0.35 * pitch)
        leaders = [[at(_FAR, centres[i]), at(_LEADER, place)] for i, place in zip(shown, places, strict=True)]
        if not level:
            ax.add_collection(LineCollection(leaders, colors=FAINT, linewidths=0.5, **options), autolim=False)
        for i, place in zip(shown, places, strict=True):
            x, y = at(_FAR + 3 if level else _TEXT, place)
            align: dict[str, Any] = (
                {"ha": "right", "va": "center"} if side == "left" else {"ha": "center" if level else "left", "va": "bottom"}
            )
            if side == "top" and not level:
                # Anchored where a slanted line of text begins, so that it grows out of its leader.
                align |= {"rotation": 45, "rotation_mode": "anchor", "va": "baseline"}
                x += self.font * 0.3 / 72 / width
            ax.text(x, y, self.labels[i], transform=ax.transAxes, fontsize=self.font, color=INK, **align, **PLAIN)

    def _groups(self, points_long: float) -> list[tuple[int, int, FloatArray]]:
        """First bound, last bound and colour of each bracket."""
        count = len(self.labels)
        thin = np.diff(self.bounds) * points_long / self.bounds[-1] < THIN
        shade, colours = node_shades(count), node_colours(count)
        groups: list[tuple[int, int, FloatArray]] = []
        for i in range(count):
            if i and thin[i] and thin[i - 1] and shade[i] == shade[i - 1]:
                groups[-1] = (groups[-1][0], i + 1, colours[i])
            else:
                groups.append((i, i + 1, colours[i]))
        return groups

    def _chosen(self, centres: FloatArray, pitch: float) -> list[int]:
        """All nodes if there is room, else the ends of the layout and then the largest that do not crowd one another."""
        count = len(centres)
        if count * pitch <= 1:
            return list(range(count))
        pitch = max(pitch, 1 / THINNED)
        sizes = np.diff(self.bounds)
        taken: list[float] = []
        chosen: list[int] = []
        for i in sorted(range(count), key=lambda i: (i not in (0, count - 1), -sizes[i], i)):
            centre = float(centres[i])
            near = bisect_left(taken, centre)
            if all(abs(other - centre) >= pitch for other in taken[max(near - 1, 0) : near + 1]):
                insort(taken, centre)
                chosen.append(i)
        return chosen


def square(
    ax: Axes | None,
    bounds: FloatArray,
    labels: Sequence[str],
    title: str,
    side: float,
    *,
    left: float = 0.15,
    bottom: float = 0.35,
    right: float,
) -> tuple[Axes, Brackets]:
    """The axes of a picture with brackets on both sides, ``side`` inches long unless they are given, and the brackets."""
    if ax is not None:
        return ax, Brackets(bounds, labels, min(size_inches(ax)))
    found = Brackets(bounds, labels, side)
    left, right = max(found.left, 0.5) + left, max(found.overhang + 0.15, right)
    return new_axes(side, side, title, left=left, bottom=bottom, right=right, above=found.top + 0.12), found
