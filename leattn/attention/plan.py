"""Stretches grouped so that few large calls compute them: the plan of the sparse backend, before any tensor is touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import numpy.typing as npt

from leattn.prompt.columns import Stretch, columns_in
from leattn.prompt.visible import Run

WINDOW_QUERIES = 256
"""Queries that one mask of a window covers at most: fewer of them reach back to fewer keys, and masks stay small."""


@dataclass(frozen=True)
class Group:
    """``count`` adjacent stretches of ``length`` queries from column ``start`` on, to be computed as a batch.

    ``seen`` are the columns that all of them see whole; with ``window``, instead, each stretch sees the ``window`` columns
    before its own start.
    """

    start: int
    length: int
    count: int
    seen: tuple[Run, ...]
    window: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.length * self.count

    def pieces(self, most: int) -> Iterator[Group]:
        """The same in parts of at most ``most`` queries, but of whole stretches."""
        step = max(1, most // self.length)
        for first in range(0, self.count, step):
            yield replace(self, start=self.start + first * self.length, count=min(step, self.count - first))

    @property
    def seen_keys(self) -> int:
        return self.window or size(self.seen)


@dataclass(frozen=True, eq=False)
class Mixed:
    """Adjacent single queries from column ``start`` on that see different keys, to be computed as one masked call.

    ``keys`` ``[K]`` int64 are the columns to compute with, ascending, and ``mask`` ``[Q, K]`` says which of them each query
    sees.
    """

    start: int
    keys: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]

    @property
    def stop(self) -> int:
        return self.start + len(self.mask)


def size(runs: Sequence[Run]) -> int:
    """How many columns the intervals hold."""
    return sum(stop - start for start, stop in runs)


def plan_groups(stretches: Sequence[Stretch]) -> list[Group | Mixed]:
    """What covers the queries of the stretches, in order."""
    groups: list[Group] = []
    for stretch in stretches:
        longer = _joined(groups[-1], stretch) if groups else None
        if longer is None:
            groups.append(Group(stretch.start, stretch.stop - stretch.start, 1, stretch.seen))
        else:
            groups[-1] = longer
    steps: list[Group | Mixed] = []
    for is_single, several in groupby(groups, lambda group: group.length * group.count == 1):
        those = list(several)
        steps += _mixed(those) if is_single else those
    return steps


def _joined(group: Group, stretch: Stretch) -> Group | None:
    """The group with one more stretch, if it is of the same kind."""
    length = stretch.stop - stretch.start
    if group.length != length or group.stop != stretch.start:
        return None
    count = group.count + 1
    if not group.window and group.seen == stretch.seen:
        return Group(group.start, length, count, stretch.seen)
    # A chain: each sees one interval of constant width that ends where it starts itself.
    width = _width_before(stretch.start, stretch.seen)
    if width and width == (group.window or (_width_before(group.start, group.seen) if group.count == 1 else 0)):
        return Group(group.start, length, count, (), window=width)
    return None


def _width_before(start: int, seen: tuple[Run, ...]) -> int:
    return start - seen[0][0] if len(seen) == 1 and seen[0][1] == start else 0


def _mixed(singles: Sequence[Group]) -> Iterator[Group | Mixed]:
    """Single queries in as few calls as pay: together they compute more pairs, apart they copy more keys."""
    taken: list[Group] = []
    rows: list[npt.NDArray[np.bool_]] = []
    union, worth = np.zeros(0, np.bool_), 0
    for group in singles:
        row = _row(group, singles[-1].stop)
        # Scattered keys are copied for a call of their own, which costs a few times what computing them does.
        alone = int(row.sum()) * (1 if len(group.seen) < 2 and _touches(group) else 3)
        grown = union | row if taken else row
        if taken and ((len(taken) + 1) * int(grown.sum()) > worth + alone or taken[-1].stop != group.start):
            yield _step(taken, rows, union)
            taken, rows, grown, worth = [], [], row, 0
        taken.append(group)
        rows.append(row)
        union, worth = grown, worth + alone
    yield _step(taken, rows, union)


def _row(group: Group, columns: int) -> npt.NDArray[np.bool_]:
    """The columns that a single query sees, its own included."""
    edges = np.zeros(columns + 1, np.int8)
    bounds = np.array(group.seen, np.int64).reshape(-1, 2)
    edges[bounds[:, 0]], edges[bounds[:, 1]] = 1, -1
    row = edges[:-1].cumsum(dtype=np.int8).view(np.bool_)
    row[group.start] = True
    return row


def _touches(group: Group) -> bool:
    return not group.seen or group.seen[-1][1] == group.start


def _step(singles: list[Group], rows: list[npt.NDArray[np.bool_]], union: npt.NDArray[np.bool_]) -> Group | Mixed:
    if len(singles) == 1:
        return singles[0]
    keys = np.flatnonzero(union)
    low, high = int(keys[0]), int(keys[-1]) + 1
    if high - low < 1.5 * len(keys):  # a view of some more is cheaper than a copy
        keys = np.arange(low, high)
    return Mixed(singles[0].start, keys, np.stack(rows)[:, keys])


def plan_windowed(stretches: Sequence[Stretch], positions: npt.NDArray[np.int64], window: int) -> list[Group | Mixed]:
    """The same under a sliding window: what reaches further back goes under a mask, the rest as ever.

    A window is measured in positions, ``pos_q − pos_k < W``, so that keys at later positions are always inside. ``positions``
    ``[K]`` are those of all columns.
    """
    steps: list[Group | Mixed] = []
    free: list[Stretch] = []
    for stretch in stretches:
        keys = columns_in(sorted((*stretch.seen, (stretch.start, stretch.stop))))
        if positions[stretch.start : stretch.stop].max() - positions[keys].min() < window:
            free.append(stretch)
            continue
        steps += plan_groups(free)
        steps += _masked(stretch, keys, positions, window)
        free = []
    return [*steps, *plan_groups(free)]


def _masked(stretch: Stretch, keys: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], window: int) -> Iterator[Mixed]:
    own = (keys >= stretch.start) & (keys < stretch.stop)
    for start in range(stretch.start, stretch.stop, WINDOW_QUERIES):
        queries = np.arange(start, min(start + WINDOW_QUERIES, stretch.stop))
        within = positions[queries][:, None] - positions[keys] < window
        mask = within & (~own | (keys <= queries[:, None]))
        needed = mask.any(0)
        yield Mixed(start, keys[needed], mask[:, needed])
