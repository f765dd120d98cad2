"""Where each node starts counting its positions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode, whole_number
from leattn.errors import CompileError, LeattnError, LeattnWarning, choices
from leattn.prompt.visible import Visible

Starts: TypeAlias = Sequence[int] | Mapping[ICLNode, int]
StartsOf: TypeAlias = Callable[[ICLGraph, dict[ICLNode, int]], Starts | None]


@dataclass(frozen=True)
class Scheme:
    """A way to number positions. One of your own is passed as ``positions=``, or just its function.

    Attributes
    ----------
    starts
        From the graph and ``{node: tokens}`` to the first position of every node, in whole numbers, in layout order or by node;
        None where every node starts at the furthest end of what it sees.
    known_before_writing
        Whether it holds for graphs in which nodes are still to be written, whose lengths are not known.
    branches_collide
        Whether what continues one sink would stand at the positions of another.
    """

    starts: StartsOf | None
    known_before_writing: bool = False
    branches_collide: bool = False


Positions: TypeAlias = Literal["after_parents", "sequential", "restart"] | StartsOf | Scheme
SCHEMES = {
    "after_parents": Scheme(None, known_before_writing=True),
    "sequential": Scheme(lambda _graph, lengths: [0, *np.cumsum(list(lengths.values())[:-1]).tolist()], branches_collide=True),
    "restart": Scheme(lambda graph, _lengths: [0] * len(graph), known_before_writing=True),
}


def scheme_of(positions: Positions) -> Scheme:
    """The scheme by its name, or one of the user's own.

    Raises
    ------
    LeattnError
        An unknown name.
    """
    if isinstance(positions, Scheme):
        return positions
    if callable(positions):
        return Scheme(positions)
    if positions not in SCHEMES:
        raise LeattnError(choices("positions", positions, SCHEMES) + ", or give a callable (graph, lengths) → starts")
    return SCHEMES[positions]


def after_seen(ends: Iterable[int | None]) -> int | None:
    """Where a node starts by itself: at the furthest end of what it sees, 0 for a root; None while an end is not known."""
    known = list(ends)
    return None if None in known else max(known, default=0)  # type: ignore[type-var]


def start_positions(graph: ICLGraph, lengths: Sequence[int], visible: Visible, scheme: Positions) -> npt.NDArray[np.int64]:
    """The first position of every node, ``[N]``.

    ``"after_parents"``: the furthest end among the nodes it sees, 0 for a root. ``"sequential"``: the index in the layout.
    ``"restart"``: 0. A callable is given the graph and ``{node: tokens}`` and returns the starts, in layout order or by
    node. A pin on the node itself wins over all of them.

    Raises
    ------
    CompileError
        A callable that returns something else than one whole number from 0 up per node.

    Warns
    -----
    LeattnWarning
        A node pinned before the end of something it sees: relative positions there are negative.
    """
    pinned = [pinned_start(graph, node, length) for node, length in zip(graph.nodes, lengths, strict=True)]
    given = given_starts(graph, lengths, scheme_of(scheme))
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
    return starts


def pinned_start(graph: ICLGraph, node: ICLNode, length: int) -> int | None:
    """The first position of a node that is pinned, or None."""
    if node.end_pos_id is None:
        return node.start_pos_id
    if node.end_pos_id < length:
        raise CompileError(
            f"node {graph.names[node]!r} has {length} tokens and end_pos_id={node.end_pos_id}, so it would start at position "
            f"{node.end_pos_id - length}; give end_pos_id >= {length}"
        )
    return node.end_pos_id - length


def given_starts(graph: ICLGraph, lengths: Sequence[int], scheme: Scheme) -> list[int] | None:
    """What a scheme says, in layout order; None where nodes start after what they see. What it says of pinned nodes is unused.

    Raises
    ------
    CompileError
        Something else than one whole number from 0 up for each node without a pin.
    """
    given = None if scheme.starts is None else scheme.starts(graph, dict(zip(graph.nodes, lengths, strict=True)))
    if given is None:
        return None
    if isinstance(given, Mapping):
        missing = [graph.names[node] for node in graph.nodes if node not in given]
        if missing:
            raise CompileError(f"the positions callable gave no start for node {missing[0]!r}")
        given = [given[node] for node in graph.nodes]
    try:
        each = list(given)
    except TypeError:
        words = f"the positions callable gave {given!r}; give one start per node, in layout order or by node"
        raise CompileError(words) from None
    if len(each) != len(graph):
        raise CompileError(f"the positions callable gave {len(each)} starts for {len(graph)} nodes; give one per node")
    return [_given_start(graph, node, start) for node, start in zip(graph.nodes, each, strict=True)]


def _given_start(graph: ICLGraph, node: ICLNode, given: object) -> int:
    if node.start_pos_id is not None or node.end_pos_id is not None:
        return 0
    start = whole_number(given)
    if start is None:
        raise CompileError(
            f"the positions callable gave {given!r} as the start of node {graph.names[node]!r}; give a whole number, "
            "for example round(start)"
        )
    if start < 0:
        raise CompileError(f"node {graph.names[node]!r} would start at position {start}; positions start at 0")
    return start


def _warn_overlap(graph: ICLGraph, i: int, pin: int, runs: Sequence[tuple[int, int]], ends: npt.NDArray[np.int64]) -> None:
    seen = max((j for a, b in runs for j in range(a, b)), key=lambda j: int(ends[j]))
    names = [graph.names[node] for node in graph.nodes]
    warnings.warn(
        f"node {names[i]!r} is pinned to position {pin}, before the end {ends[seen]} of {names[seen]!r}, which it sees",
        LeattnWarning,
        stacklevel=4,
    )
