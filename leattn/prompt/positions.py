"""Where each node starts counting its positions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode
from leattn.errors import CompileError, LeattnError, LeattnWarning, choices
from leattn.prompt.visible import Visible

Starts: TypeAlias = Sequence[int] | Mapping[ICLNode, int]
Positions: TypeAlias = Literal["after_parents", "sequential", "restart"] | Callable[[ICLGraph, dict[ICLNode, int]], Starts]
SCHEMES = ("after_parents", "sequential", "restart")


def start_positions(graph: ICLGraph, lengths: Sequence[int], visible: Visible, scheme: Positions) -> npt.NDArray[np.int64]:
    """The first position of every node, ``[N]``.

    ``"after_parents"``: the furthest end among the nodes it sees, 0 for a root. ``"sequential"``: the index in the layout.
    ``"restart"``: 0. A callable is given the graph and ``{node: tokens}`` and returns the starts, in layout order or by
    node. A pin on the node itself wins over all of them.

    Raises
    ------
    CompileError
        A negative position, or a callable that returns something else than one start per node.

    Warns
    -----
    LeattnWarning
        A node pinned before the end of something it sees: relative positions there are negative.
    """
    pinned = [_pin(graph, node, length) for node, length in zip(graph.nodes, lengths, strict=True)]
    if callable(scheme):
        given = _called(graph, lengths, scheme)
    elif scheme == "sequential":
        given = [0, *np.cumsum(lengths[:-1]).tolist()]
    elif scheme == "restart":
        given = [0] * len(lengths)
    elif scheme == "after_parents":
        given = None
    else:
        raise LeattnError(choices("positions", scheme, SCHEMES) + ", or give a callable (graph, lengths) → starts")

    count = len(lengths)
    starts = np.zeros(count, np.int64)
    ends = np.zeros(count, np.int64)
    furthest = 0  # the furthest end of everything so far: most runs begin at 0 and reach to the node itself
    last_runs, last_end = None, 0
    for i, runs in enumerate(visible.runs):
        pin = pinned[i]
        if given is not None and pin is None:
            start = given[i]
        else:
            if runs is last_runs:
                seen_end = last_end
            elif runs == ((0, i),):
                seen_end = furthest
            else:
                seen_end = max((int(ends[a:b].max()) if b - a > 1 else int(ends[a]) for a, b in runs), default=0)
            last_runs, last_end = runs, seen_end
            start = seen_end if pin is None else pin
            if pin is not None and pin < seen_end:
                _warn_overlap(graph, i, pin, runs, ends)
        starts[i] = start
        end = start + lengths[i]
        ends[i] = end
        furthest = max(furthest, end)
    if starts.size and starts.min() < 0:
        i = int(starts.argmin())
        raise CompileError(f"node {graph.names[graph.nodes[i]]!r} would start at position {starts[i]}; positions start at 0")
    return starts


def _pin(graph: ICLGraph, node: ICLNode, length: int) -> int | None:
    if node.end_pos_id is None:
        return node.start_pos_id
    if node.end_pos_id < length:
        raise CompileError(
            f"node {graph.names[node]!r} has {length} tokens and end_pos_id={node.end_pos_id}, so it would start at position "
            f"{node.end_pos_id - length}; give end_pos_id >= {length}"
        )
    return node.end_pos_id - length


def _called(graph: ICLGraph, lengths: Sequence[int], scheme: Callable[[ICLGraph, dict[ICLNode, int]], Starts]) -> list[int]:
    given = scheme(graph, dict(zip(graph.nodes, lengths, strict=True)))
    if isinstance(given, Mapping):
        missing = [graph.names[node] for node in graph.nodes if node not in given]
        if missing:
            raise CompileError(f"the positions callable gave no start for node {missing[0]!r}")
        given = [given[node] for node in graph.nodes]
    if len(given) != len(graph):
        raise CompileError(f"the positions callable gave {len(given)} starts for {len(graph)} nodes; give one per node")
    return [int(start) for start in given]


def _warn_overlap(graph: ICLGraph, i: int, pin: int, runs: Sequence[tuple[int, int]], ends: npt.NDArray[np.int64]) -> None:
    seen = max((j for a, b in runs for j in range(a, b)), key=lambda j: int(ends[j]))
    names = [graph.names[node] for node in graph.nodes]
    warnings.warn(
        f"node {names[i]!r} is pinned to position {pin}, before the end {ends[seen]} of {names[seen]!r}, which it sees",
        LeattnWarning,
        stacklevel=4,
    )
