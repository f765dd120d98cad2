"""Sliding windows for the sparse backend: what reaches further back than its window goes under a mask, the rest as ever.

A window is measured in positions, ``pos_q − pos_k < W``, so that keys at later positions are always inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from leattn.attention.plan import Mixed, Step, Stretch, plan_groups

QUERIES = 256
"""Queries that one mask covers at most: fewer of them reach back to fewer keys, and masks stay small."""


def windowed_steps(stretches: Sequence[Stretch], positions: npt.NDArray[np.int64], window: int) -> list[Step]:
    """Steps that cover the queries of the stretches, in order; ``positions`` ``[K]`` are those of all columns."""
    steps: list[Step] = []
    free: list[Stretch] = []
    for stretch in stretches:
        keys = _columns(stretch)
        if positions[stretch.start : stretch.stop].max() - positions[keys].min() < window:
            free.append(stretch)
            continue
        steps += plan_groups(free)
        steps += _masked(stretch, keys, positions, window)
        free = []
    return [*steps, *plan_groups(free)]


def _columns(stretch: Stretch) -> npt.NDArray[np.int64]:
    """All columns that any query of a stretch may see, ascending: what it sees whole, and itself."""
    return np.concatenate([np.arange(*run) for run in sorted((*stretch.seen, (stretch.start, stretch.stop)))])


def _masked(stretch: Stretch, keys: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], window: int) -> Iterator[Mixed]:
    own = (keys >= stretch.start) & (keys < stretch.stop)
    for start in range(stretch.start, stretch.stop, QUERIES):
        queries = np.arange(start, min(start + QUERIES, stretch.stop))
        within = positions[queries][:, None] - positions[keys] < window
        mask = within & (~own | (keys <= queries[:, None]))
        needed = mask.any(0)
        yield Mixed(start, keys[needed], mask[:, needed])
