"""Who sees whom, as runs of layout intervals: a node that sees everything before it costs one interval, not N edges."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode, Prefix
from leattn.dag.reading import Reading
from leattn.errors import LeattnError, choices

Visibility: TypeAlias = Literal["parents", "ancestors"]
Run: TypeAlias = tuple[int, int]
"""A half-open interval of indices into the layout."""


Readings: TypeAlias = tuple[tuple[tuple[Run, ...], Reading], ...]
"""Groups of what is seen, as runs like those of what is seen, and how each is read. No two of them meet."""


@dataclass(frozen=True)
class Visible:
    """For every node of a layout, the nodes it sees, itself not included, and how it reads them.

    ``runs[i]`` is sorted and disjoint, and no two of its runs touch. ``readings`` has the nodes that read some of what they see
    in another way than as it is. Everything later (masks, plans, hashes, pictures) is derived from it.
    """

    runs: tuple[tuple[Run, ...], ...]
    readings: Mapping[int, Readings] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.runs)

    def sees(self, node: int, other: int) -> bool:
        """Whether the node at index ``node`` sees the one at ``other``."""
        return _covers(self.runs[node], other)

    def nodes_seen(self, node: int) -> list[int]:
        """Layout indices that ``node`` sees, ascending."""
        return [i for start, stop in self.runs[node] for i in range(start, stop)]

    def without_edge(self, node: int, other: int) -> Visible:
        """A copy in which ``node`` no longer sees ``other``."""
        runs = (*self.runs[:node], _remove(self.runs[node], other), *self.runs[node + 1 :])
        return Visible(runs, _without(self.readings, [node], other))

    def without_node(self, other: int) -> Visible:
        """A copy in which nobody sees ``other``."""
        return Visible(tuple(_remove(runs, other) for runs in self.runs), _without(self.readings, list(self.readings), other))

    def with_reading(self, node: int, others: Sequence[int], reading: Reading) -> Visible:
        """A copy in which ``node`` reads ``others``, which it sees, as one group, and in no other."""
        readings = self.readings
        for other in others:
            readings = _without(readings, [node], other)
        if reading.is_identity:
            return Visible(self.runs, readings)
        group = (merge([(other, other + 1) for other in others]), reading)
        return Visible(self.runs, {**readings, node: (*readings.get(node, ()), group)})

    def continued(self) -> Visible:
        """With one more node at the end: it sees the last one and what the last one sees, and reads it as that one does."""
        last = len(self.runs) - 1
        readings = {**self.readings, last + 1: self.readings[last]} if last in self.readings else self.readings
        return Visible((*self.runs, merge([*self.runs[last], (last, last + 1)])), readings)

    @property
    def is_causal(self) -> bool:
        """Whether every node sees everything before it, as it is."""
        return not self.readings and all(runs == (((0, i),) if i else ()) for i, runs in enumerate(self.runs))

    def flat(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """All runs as arrays ``(node, start, stop)``, each ``[R]``."""
        counts = np.fromiter((len(runs) for runs in self.runs), np.int64, len(self.runs))
        bounds = np.array([bound for runs in self.runs for run in runs for bound in run], dtype=np.int64).reshape(-1, 2)
        return np.repeat(np.arange(len(self.runs)), counts), bounds[:, 0], bounds[:, 1]

    def packed(self, width: int) -> npt.NDArray[np.int32]:
        """Row i holds one bit per node that node i sees: ``[N, ceil(width / 32)]`` int32, lowest bit first."""
        words = -(-width // 32)
        node, start, stop = self.flat()
        packed = np.zeros((len(self), words * 4), np.uint8)
        chunk = max(1, (1 << 21) // (words * 32 + 1))  # at most 2 MB of unpacked rows at a time
        first = np.searchsorted(node, np.arange(len(self) + 1))
        for low in range(0, len(self), chunk):
            high = min(low + chunk, len(self))
            steps = np.zeros((high - low, words * 32 + 1), np.int8)
            part = slice(first[low], first[high])
            # Runs of one node never touch, so no cell is written twice.
            steps[node[part] - low, start[part]] = 1
            steps[node[part] - low, stop[part]] = -1
            packed[low:high] = np.packbits(steps[:, :-1].cumsum(1, dtype=np.int8).astype(bool), axis=1, bitorder="little")
        words_of: npt.NDArray[np.int32] = packed.view(np.int32)
        return words_of


def merge(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Sorted, disjoint runs that cover the same indices.

    Examples
    --------
    >>> merge([(4, 6), (0, 2), (2, 3), (5, 7)])
    ((0, 3), (4, 7))
    """
    merged: list[Run] = []
    for start, stop in sorted(runs):
        if merged and start <= merged[-1][1]:
            if stop > merged[-1][1]:
                merged[-1] = (merged[-1][0], stop)
        elif start < stop:
            merged.append((start, stop))
    return tuple(merged)


def visible_relation(graph: ICLGraph, visibility: Visibility) -> Visible:
    """The relation of a graph: direct parents, or all ancestors.

    Raises
    ------
    LeattnError
        An unknown ``visibility``.
    """
    if visibility not in ("parents", "ancestors"):
        raise LeattnError(choices("visibility", visibility, ("parents", "ancestors")))
    rows: list[tuple[Run, ...]] = []
    shared: dict[int, tuple[Run, ...]] = {}
    prefixes: dict[int, tuple[int, tuple[Run, ...]]] = {}
    for node in graph.nodes:
        parents = node.parents
        if type(parents) is Prefix:
            # The same list, longer than last time: only what was added needs looking at.
            known, runs = prefixes.get(id(parents.base), (0, ()))
            if len(parents) < known:
                known, runs = 0, ()
            runs = _union(parents.base[known : len(parents)], runs, graph, rows, visibility)
            prefixes[id(parents.base)] = (len(parents), runs)
        else:
            # Siblings often share one tuple of parents.
            found = shared.get(id(parents))
            runs = _union(parents, (), graph, rows, visibility) if found is None else found
            shared[id(parents)] = runs
        rows.append(runs)
    return Visible(tuple(rows), {i: _readings(graph, node) for i, node in enumerate(graph.nodes) if node.readings})


def _readings(graph: ICLGraph, node: ICLNode) -> Readings:
    groups = (([(graph.index[one], graph.index[one] + 1) for one in group.nodes], group.reading) for group in node.readings)
    return tuple((merge(runs), reading) for runs, reading in groups)


def _union(
    parents: Sequence[ICLNode], seen: tuple[Run, ...], graph: ICLGraph, rows: list[tuple[Run, ...]], visibility: Visibility
) -> tuple[Run, ...]:
    """``seen`` together with ``parents`` and, for ancestors, with all that they see."""
    if len(parents) == 1 and visibility == "parents":  # one more than the node before sees, most of the time
        i = graph.index[parents[0]]
        if not seen:
            return ((i, i + 1),)
        if seen[-1][1] == i:
            return (*seen[:-1], (seen[-1][0], i + 1))
    indices = sorted(graph.index[parent] for parent in parents)
    if visibility == "parents":
        return merge([*seen, *((i, i + 1) for i in indices)])
    for i in reversed(indices):
        # Seeing ancestors is transitive: a parent that is covered already brings nothing new.
        if not _covers(seen, i):
            seen = merge([*seen, *rows[i], (i, i + 1)])
    return seen


def _covers(runs: tuple[Run, ...], index: int) -> bool:
    at = bisect_right(runs, (index, np.iinfo(np.int64).max)) - 1
    return at >= 0 and runs[at][0] <= index < runs[at][1]


def _without(readings: Mapping[int, Readings], nodes: Iterable[int], other: int) -> dict[int, Readings]:
    """Readings after ``other`` left the groups of some nodes; groups without members, and nodes without groups, are gone."""
    kept = dict(readings)
    for node in [node for node in nodes if node in kept]:
        groups = ((_remove(runs, other), reading) for runs, reading in kept.pop(node))
        left = tuple((runs, reading) for runs, reading in groups if runs)
        if left:
            kept[node] = left
    return kept


def _remove(runs: tuple[Run, ...], index: int) -> tuple[Run, ...]:
    if not _covers(runs, index):
        return runs
    split: list[Run] = []
    for start, stop in runs:
        if start <= index < stop:
            split += [part for part in ((start, index), (index + 1, stop)) if part[0] < part[1]]
        else:
            split.append((start, stop))
    return tuple(split)
