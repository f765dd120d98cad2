"""Stretches as steps: few large calls that compute them, each of which knows how to run.

Adjacent stretches of equal length that see the same, or a window of constant width before themselves, are one group. Single
queries that see different keys go under one mask where that pays.

Shapes: B rows of one prompt, H query heads, G key heads, Q queries of a step, K keys, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from leattn.attention.group import Group, Ints, picked, select
from leattn.attention.kernels import Kernel
from leattn.attention.reader import Reader, readers
from leattn.prompt.stretch import Stretch, columns_in
from leattn.prompt.visible import Run

WINDOW_QUERIES = 256
"""Queries that one mask of a window covers at most: fewer of them reach back to fewer keys, and masks stay small."""


@dataclass(frozen=True, eq=False)
class Mixed:
    """Adjacent queries from column ``start`` on that see different keys, to be computed as one masked call.

    ``columns`` ``[K]`` are those to compute with, ascending, and ``mask`` ``[Q, K]`` says which of them each query sees.
    """

    start: int
    columns: Ints
    mask: npt.NDArray[np.bool_]

    @property
    def stop(self) -> int:
        return self.start + len(self.mask)

    def index(self, device: torch.device) -> slice | Tensor:
        return select(self.columns, device)

    def run(self, kernel: Kernel, index: slice | Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        mask = torch.from_numpy(self.mask).to(query.device)
        output.copy_(kernel.masked(query, picked(key, index), picked(value, index), mask))


@dataclass(frozen=True, eq=False)
class Continuation:
    """What is generated: it sees scattered columns of the prompt, gathered at the first step only, and everything after it.

    ``kept`` holds them by the order of calls. Rows of one prompt (beams, return sequences) share one copy. Where rows differ,
    because something noises each, beams may still trade places, so nothing is kept.
    """

    start: int
    stop: int
    seen: Ints
    own: slice
    kept: dict[Any, Any]
    name: Any

    def index(self, device: torch.device) -> slice | Tensor:
        return select(self.seen, device)

    def run(self, kernel: Kernel, index: slice | Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        name = (self.name, kernel.number)
        pair: tuple[Tensor, Tensor] | None = self.kept.get(name)
        if pair is None:
            pair = picked(key, index), picked(value, index)
            if kernel.with_lse and name not in self.kept:
                shared = all(map(_rows_agree, pair))
                self.kept[name] = (pair[0][:1].clone(), pair[1][:1].clone()) if shared else None
        kernel.continuation(query, *pair, key[:, :, self.own], value[:, :, self.own], output)


Step: TypeAlias = Group | Mixed | Continuation | Reader


def _rows_agree(x: Tensor) -> bool:
    """Whether rows are equal up to rounding."""
    return len(x) == 1 or bool((x - x[:1]).abs().max() <= 64 * torch.finfo(x.dtype).eps * x.abs().max())


def plan(
    stretches: Sequence[Stretch], positions: Ints | None = None, window: int | None = None
) -> list[Group | Mixed | Reader]:
    """Steps that cover the queries of the stretches, in order.

    With a sliding ``window``, measured in ``positions`` ``[K]`` (``pos_q − pos_k < window``, so that keys at later positions
    are always inside), what reaches further back goes under a mask.
    """
    steps: list[Group | Mixed | Reader] = []
    for reads, several in groupby(stretches, lambda stretch: bool(stretch.readings)):
        steps += (readers if reads else _as_they_are)(list(several), positions, window)
    return steps


def _as_they_are(stretches: Sequence[Stretch], positions: Ints | None, window: int | None) -> list[Group | Mixed]:
    if positions is None or window is None:
        return _grouped(stretches)
    steps: list[Group | Mixed] = []
    free: list[Stretch] = []
    for stretch in stretches:
        keys = columns_in(sorted((*stretch.seen, (stretch.start, stretch.stop))))
        if positions[stretch.start : stretch.stop].max() - positions[keys].min() < window:
            free.append(stretch)
        else:
            steps += [*_grouped(free), *_windowed(stretch, keys, positions, window)]
            free = []
    return [*steps, *_grouped(free)]


def _windowed(stretch: Stretch, keys: Ints, positions: Ints, window: int) -> Iterator[Mixed]:
    own = (keys >= stretch.start) & (keys < stretch.stop)
    for start in range(stretch.start, stretch.stop, WINDOW_QUERIES):
        queries = np.arange(start, min(start + WINDOW_QUERIES, stretch.stop))
        within = positions[queries][:, None] - positions[keys] < window
        mask = within & (~own | (keys <= queries[:, None]))
        needed = mask.any(0)
        yield Mixed(start, keys[needed], mask[:, needed])


def _grouped(stretches: Sequence[Stretch]) -> list[Group | Mixed]:
    groups: list[Group] = []
    for stretch in stretches:
        longer = _longer(groups[-1], stretch) if groups else None
        if longer is None:
            groups.append(Group(stretch.start, stretch.stop - stretch.start, 1, stretch.seen))
        else:
            groups[-1] = longer
    steps: list[Group | Mixed] = []
    for is_single, several in groupby(groups, lambda group: group.length * group.count == 1):
        those = list(several)
        steps += _mixed(those) if is_single else those
    return steps


def _longer(group: Group, stretch: Stretch) -> Group | None:
    """The group with one more stretch, if it is of the same kind."""
    if group.length != stretch.stop - stretch.start or group.stop != stretch.start:
        return None
    if not group.window and group.seen == stretch.seen:
        return replace(group, count=group.count + 1)
    # A chain: each sees one interval of constant width that ends where it starts itself.
    width = _width_before(stretch.start, stretch.seen)
    if width and width == (group.window or (_width_before(group.start, group.seen) if group.count == 1 else 0)):
        return Group(group.start, group.length, group.count + 1, (), window=width)
    return None


def _width_before(start: int, seen: tuple[Run, ...]) -> int:
    return start - seen[0][0] if len(seen) == 1 and seen[0][1] == start else 0


def _mixed(singles: Sequence[Group]) -> Iterator[Group | Mixed]:
    """Single queries in as few calls as pay: together they compute more pairs, apart they copy more keys."""
    taken: list[Group] = []
    rows: list[npt.NDArray[np.bool_]] = []
    union, worth = np.zeros(0, np.bool_), 0
    for group in singles:
        row = np.zeros(singles[-1].stop, np.bool_)
        row[columns_in([*group.seen, (group.start, group.stop)])] = True
        # Scattered keys are copied for a call of their own, which costs a few times what computing them does.
        touches = not group.seen or (len(group.seen) == 1 and group.seen[-1][1] == group.start)
        alone = int(row.sum()) * (1 if touches else 3)
        grown = union | row if taken else row
        if taken and ((len(taken) + 1) * int(grown.sum()) > worth + alone or taken[-1].stop != group.start):
            yield _together(taken, rows, union)
            taken, rows, grown, worth = [], [], row, 0
        taken.append(group)
        rows.append(row)
        union, worth = grown, worth + alone
    yield _together(taken, rows, union)


def _together(singles: list[Group], rows: list[npt.NDArray[np.bool_]], union: npt.NDArray[np.bool_]) -> Group | Mixed:
    if len(singles) == 1:
        return singles[0]
    keys = np.flatnonzero(union)
    low, high = int(keys[0]), int(keys[-1]) + 1
    if high - low < 1.5 * len(keys):  # a view of some more is cheaper than a copy
        keys = np.arange(low, high)
    return Mixed(singles[0].start, keys, np.stack(rows)[:, keys])
