"""Which keys each stretch of queries needs, cut so that few large calls do it: the plan of the sparse backend.

Columns are those of the padded batch. A *run* is one node, or several that see each other as plain causal text would; a
*group* is several adjacent runs of one length that can be computed as a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from leattn.visible import Run, Visible, merge


@dataclass(frozen=True)
class Group:
    """``count`` adjacent runs of ``length`` queries from column ``start`` on; every query sees its run up to itself.

    ``parents`` are the columns that all of them see whole, as intervals; with ``window``, instead, each run sees the ``window``
    columns before its own start. ``own`` is where the keys of the (one) run start if queries begin later: chunked prefill.
    """

    start: int
    length: int
    count: int
    parents: tuple[Run, ...]
    window: int = 0
    own: int | None = None

    @property
    def stop(self) -> int:
        return self.start + self.length * self.count

    def pieces(self, most: int) -> Iterator[Group]:
        """The same in parts of at most ``most`` queries, but of whole runs."""
        step = max(1, most // self.length)
        for first in range(0, self.count, step):
            yield replace(self, start=self.start + first * self.length, count=min(step, self.count - first))

    @property
    def is_single(self) -> bool:
        """One query, as in decoding, or queries that begin within their run: nothing to compute as a batch."""
        return self.own is not None or self.length * self.count == 1

    @property
    def parent_keys(self) -> int:
        return self.window or sum(b - a for a, b in self.parents)


def plan_groups(visible: Visible, offsets: Sequence[int], queries: range) -> list[Group]:
    """Groups that cover the query columns, in order; node i holds the columns ``offsets[i]`` to ``offsets[i + 1]``."""
    groups: list[Group] = []
    for first, last in _fused(visible):
        start, stop = offsets[first], offsets[last]
        begin, end = max(start, queries.start), min(stop, queries.stop)
        if begin >= end:
            continue
        parents = merge([(offsets[a], offsets[b]) for a, b in visible.runs[first]])
        if begin > start:
            groups.append(Group(begin, end - begin, 1, parents, own=start))
        elif groups and (longer := _joined(groups[-1], begin, end - begin, parents)) is not None:
            groups[-1] = longer
        else:
            groups.append(Group(begin, end - begin, 1, parents))
    return groups


def _fused(visible: Visible) -> list[tuple[int, int]]:
    """Intervals of nodes in which each sees exactly what the first sees and all of the interval before itself."""
    fused: list[tuple[int, int]] = []
    for i, runs in enumerate(visible.runs):
        if fused:
            first, last = fused[-1]
            if last == i and runs == merge([*visible.runs[first], (first, i)]):
                fused[-1] = (first, i + 1)
                continue
        fused.append((i, i + 1))
    return fused


def _joined(group: Group, start: int, length: int, parents: tuple[Run, ...]) -> Group | None:
    """The group with one more run, if it is of the same kind."""
    if group.own is not None or group.length != length or group.stop != start:
        return None
    count = group.count + 1
    if not group.window and group.parents == parents:
        return Group(group.start, length, count, parents)
    # A chain: each sees one interval of constant width that ends where it starts itself.
    if len(parents) == 1 and parents[0][1] == start:
        width = start - parents[0][0]
        before = group.window or (_width_before(group) if group.count == 1 else 0)
        if before == width:
            return Group(group.start, length, count, (), window=width)
    return None


def _width_before(group: Group) -> int:
    return group.start - group.parents[0][0] if len(group.parents) == 1 and group.parents[0][1] == group.start else 0
