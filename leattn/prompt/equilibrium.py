"""Positions in equilibrium: every path of a fork is stretched or squeezed so that all of them end together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode

if TYPE_CHECKING:
    import networkx as nx

Shape: TypeAlias = "nx.DiGraph[int]"
"""The nodes of a graph by their place in the layout, and its edges."""


def equilibrium(graph: ICLGraph, lengths: dict[ICLNode, int]) -> list[npt.NDArray[np.float64]]:
    """The positions of every node's tokens, in layout order: Superposition prompting's (Merth et al., arXiv 2404.06910).

    Where a graph forks, its paths are between the node that all of them come from and the one that joins them. Paths of ℓ_1 to
    ℓ_n tokens are given the harmonic mean of their lengths, S = n / (1/ℓ_1 + … + 1/ℓ_n): tokens of path i stand S / ℓ_i
    apart. What all paths begin or end with in nodes of equal lengths, as with the same question behind every document, counts
    by one. A path may fork again. Where nodes are so entangled that nothing forks, each starts after the last of its parents.

    Examples
    --------
    >>> from leattn import ICLNode, compile_prompt
    >>> root = ICLNode([1, 2])
    >>> short, long = ICLNode([3, 4], [root]), ICLNode([5, 6, 7, 8, 9, 10], [root])
    >>> compile_prompt(ICLNode([11], [short, long]), positions="equilibrium").position_ids[0].tolist()
    [0.0, 1.0, 2.0, 3.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
    """
    import networkx as nx

    shape: Shape = nx.DiGraph()
    shape.add_nodes_from(range(len(graph)))
    shape.add_edges_from((graph.index[parent], i) for i, node in enumerate(graph.nodes) for parent in node.parents)
    tokens = [lengths[node] for node in graph.nodes]
    found = _one_after_another(_in_series(shape, tokens)).nodes
    return [start + step * np.arange(tokens[i], dtype=np.float64) for i, (start, step) in sorted(found.items())]


@dataclass(frozen=True)
class _Segment:
    """Nodes that stand within ``length`` positions: ``{node: (first position, how far apart its tokens are)}``."""

    nodes: dict[int, tuple[float, float]]
    length: float

    def moved(self, start: float, step: float = 1.0) -> dict[int, tuple[float, float]]:
        return {i: (start + step * first, step * apart) for i, (first, apart) in self.nodes.items()}


def _one_after_another(segments: Iterable[_Segment]) -> _Segment:
    found: dict[int, tuple[float, float]] = {}
    end = 0.0
    for segment in segments:
        found |= segment.moved(end)
        end += segment.length
    return _Segment(found, end)


def _in_series(graph: Shape, tokens: Sequence[int]) -> list[_Segment]:
    """What comes one after another: nodes that everything before leads to and everything after comes from, and what is between.

    The nodes of ``graph`` are numbered in a topological order.
    """
    nodes = sorted(graph)
    joins, forks = _ends(nodes, graph.predecessors), _ends(nodes[::-1], graph.successors)
    segments: list[_Segment] = []
    between: list[int] = []
    for i in [*nodes, None]:
        if i is not None and not (i in joins and i in forks):
            between.append(i)
            continue
        if between:
            segments.append(_between(graph.subgraph(between), tokens))
            between = []
        if i is not None:
            segments.append(_Segment({i: (0.0, 1.0)}, tokens[i]))
    return segments


def _ends(nodes: Sequence[int], before: Callable[[int], Iterable[int]]) -> set[int]:
    """Those that all nodes up to them lead to, in an order in which ``before`` a node come nodes already met."""
    open_ends: set[int] = set()
    found = set()
    for i in nodes:
        open_ends.difference_update(before(i))
        open_ends.add(i)
        if len(open_ends) == 1:
            found.add(i)
    return found


def _between(graph: Shape, tokens: Sequence[int]) -> _Segment:
    """What lies between two nodes in series: paths side by side, or one piece that does not come apart."""
    import networkx as nx

    parts = sorted(nx.weakly_connected_components(graph), key=min)
    if len(parts) == 1:
        return _entangled(graph, tokens)
    paths = [_in_series(graph.subgraph(part), tokens) for part in parts]
    first = _alike(paths)
    last = _alike([path[first:][::-1] for path in paths])
    stop = -last or None
    middles = [_one_after_another(path[first:stop]) for path in paths]
    # Harmonic mean: the middles are empty together or not at all.
    mean = len(paths) / sum(1 / middle.length for middle in middles) if middles[0].length else 0.0
    found: dict[int, tuple[float, float]] = {}
    length = 0.0
    for path, middle in zip(paths, middles, strict=True):
        head = _one_after_another(path[:first])
        tail = _one_after_another(path[stop:] if last else [])
        found |= head.nodes
        if middle.length:
            found |= middle.moved(head.length, mean / middle.length)
        found |= tail.moved(head.length + mean)
        length = head.length + mean + tail.length
    return _Segment(found, length)


def _alike(paths: Sequence[Sequence[_Segment]]) -> int:
    """How many segments all paths begin with that are single nodes of equal lengths; not the whole of some path alone."""
    count = 0
    for segments in zip(*paths, strict=False):
        if any(len(one.nodes) > 1 for one in segments) or len({one.length for one in segments}) > 1:
            break
        count += 1
    return count if len({len(path) for path in paths}) == 1 else min(count, min(map(len, paths)) - 1)


def _entangled(graph: Shape, tokens: Sequence[int]) -> _Segment:
    """Nodes that start after the last of their parents here."""
    ends: dict[int, float] = {}
    found = {}
    for i in sorted(graph):
        start = max((ends[parent] for parent in graph.predecessors(i)), default=0.0)
        found[i], ends[i] = (start, 1.0), start + tokens[i]
    return _Segment(found, max(ends.values()))
