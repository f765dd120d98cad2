"""Which keys each stretch of queries needs, cut so that few large calls do it: the plan of the sparse backend.

Columns are those of the batch, as the cache holds them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from leattn.prompt.visible import Run, Visible, merge


@dataclass(frozen=True)
class Stretch:
    """Queries in the columns ``start`` to ``stop``: all see the columns ``seen`` whole, and their stretch up to themselves.

    ``seen`` is sorted, and no two of its intervals touch.
    """

    start: int
    stop: int
    seen: tuple[Run, ...]


def prompt_stretches(visible: Visible, offsets: Sequence[int]) -> list[Stretch]:
    """A prompt as few stretches; node i holds the columns ``offsets[i]`` to ``offsets[i + 1]``.

    Nodes that see each other as plain causal text would are one stretch, but for the first of several equal siblings.
    """
    stretches: list[Stretch] = []
    first = 0
    for i, runs in enumerate(visible.runs):
        if stretches and not _leads_siblings(visible, offsets, i) and runs == merge([*visible.runs[first], (first, i)]):
            stretches[-1] = replace(stretches[-1], stop=offsets[i + 1])
        else:
            first = i
            stretches.append(Stretch(offsets[i], offsets[i + 1], merge([(offsets[a], offsets[b]) for a, b in runs])))
    return stretches


def clipped(stretches: Sequence[Stretch], queries: range) -> list[Stretch]:
    """The stretches of some queries only; what is in front of them in their own stretch, they see whole."""
    found = []
    first = bisect_right(stretches, queries.start, key=lambda stretch: stretch.start) - 1
    for stretch in stretches[max(0, first) :]:
        if stretch.start >= queries.stop:
            break
        start, stop = max(stretch.start, queries.start), min(stretch.stop, queries.stop)
        if start < stop:
            seen = stretch.seen if start == stretch.start else merge([*stretch.seen, (stretch.start, start)])
            found.append(Stretch(start, stop, seen))
    return found


def _leads_siblings(visible: Visible, offsets: Sequence[int], i: int) -> bool:
    if i + 2 >= len(offsets) or visible.runs[i + 1] != visible.runs[i]:
        return False
    return offsets[i + 2] - offsets[i + 1] == offsets[i + 1] - offsets[i]


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


Step: TypeAlias = Group | Mixed


def size(runs: Sequence[Run]) -> int:
    """How many columns the intervals hold."""
    return sum(stop - start for start, stop in runs)


def plan_groups(stretches: Sequence[Stretch]) -> list[Step]:
    """Steps that cover the queries of the stretches, in order."""
    groups: list[Group] = []
    for stretch in stretches:
        longer = _joined(groups[-1], stretch) if groups else None
        if longer is None:
            groups.append(Group(stretch.start, stretch.stop - stretch.start, 1, stretch.seen))
        else:
            groups[-1] = longer
    steps: list[Step] = []
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


def _mixed(singles: Sequence[Group]) -> Iterator[Step]:
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


def _step(singles: list[Group], rows: list[npt.NDArray[np.bool_]], union: npt.NDArray[np.bool_]) -> Step:
    if len(singles) == 1:
        return singles[0]
    keys = np.flatnonzero(union)
    low, high = int(keys[0]), int(keys[-1]) + 1
    if high - low < 1.5 * len(keys):  # a view of some more is cheaper than a copy
        keys = np.arange(low, high)
    return Mixed(singles[0].start, keys, np.stack(rows)[:, keys])
