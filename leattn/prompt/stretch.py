"""Stretches: queries side by side that see the same columns whole, and themselves up to each; the only form of the mask.

Shapes: Q queries, K keys.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from leattn.prompt.visible import Readings, Run, merge


@dataclass(frozen=True, slots=True)
class Stretch:
    """Queries in the columns ``start`` to ``stop``: all see the columns ``seen`` whole, and their stretch up to themselves.

    ``seen`` is sorted, and no two of its intervals touch. ``readings`` are groups of columns among those seen that are read in
    another way than as they are.
    """

    start: int
    stop: int
    seen: tuple[Run, ...]
    readings: Readings = ()


def fill(mask: Tensor, stretches: Sequence[Stretch], first: int) -> None:
    """Set what stretches see in ``[Q, K]`` bool whose first query stands in column ``first``; every query sees itself."""
    for stretch in stretches:
        rows = mask[stretch.start - first : stretch.stop - first]
        for start, stop in stretch.seen:
            rows[:, start:stop] = True
        rows[:, stretch.start : stretch.stop].fill_(True).tril_()
    mask.diagonal(first).fill_(True)


def columns_in(runs: Sequence[Run]) -> npt.NDArray[np.int64]:
    """All columns of some intervals, ``[n]``."""
    return np.concatenate([np.arange(start, stop) for start, stop in runs] or [np.zeros(0, np.int64)])


def clipped(stretches: Sequence[Stretch], queries: range) -> list[Stretch]:
    """The stretches of some queries only; what is in front of them in their own stretch, they see whole."""
    found = []
    first = bisect_right(stretches, queries.start, key=lambda stretch: stretch.start) - 1
    for i in range(max(0, first), len(stretches)):
        stretch = stretches[i]
        if stretch.start >= queries.stop:
            break
        start, stop = max(stretch.start, queries.start), min(stretch.stop, queries.stop)
        if (start, stop) == (stretch.start, stretch.stop):
            found.append(stretch)
        elif start < stop:
            seen = stretch.seen if start == stretch.start else merge([*stretch.seen, (stretch.start, start)])
            found.append(replace(stretch, start=start, stop=stop, seen=seen))
    return found


def fused(parts: Sequence[Stretch]) -> list[Stretch]:
    """Nodes that see each other as plain causal text would are one stretch, but for the first of several equal siblings."""
    whole: list[Stretch] = []
    for i, part in enumerate(parts):
        as_they_are = whole and not part.readings and not whole[-1].readings
        if as_they_are and part.seen and part.seen[-1][1] == part.start == whole[-1].stop and not _leads_siblings(parts, i):
            last = whole[-1]
            if part.seen == merge([*last.seen, (last.start, last.stop)]):
                whole[-1] = Stretch(last.start, part.stop, last.seen)
                continue
        whole.append(part)
    return whole


def _leads_siblings(parts: Sequence[Stretch], i: int) -> bool:
    if i + 1 >= len(parts) or parts[i + 1].seen != parts[i].seen:
        return False
    return parts[i + 1].stop - parts[i + 1].start == parts[i].stop - parts[i].start
