"""Where each node starts counting its positions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode, Position, as_position
from leattn.errors import CompileError, LeattnError, LeattnWarning, choices
from leattn.prompt.equilibrium import equilibrium
from leattn.prompt.visible import Run, Visible

Given: TypeAlias = Position | Sequence[Position] | npt.NDArray[Any]
"""Of one node: its first position, or one for each of its tokens."""
Starts: TypeAlias = Sequence[Given] | Mapping[ICLNode, Given]
StartsOf: TypeAlias = Callable[[ICLGraph, dict[ICLNode, int]], Starts | None]


@dataclass(frozen=True)
class Scheme:
    """A way to number positions. One of your own is passed as ``positions=``, or just its function.

    Attributes
    ----------
    starts
        From the graph and ``{node: tokens}`` to the first position of every node, or to the positions of all its tokens, in
        layout order or by node; None where every node starts at the furthest end of what it sees. Numbers that are not whole
        take a model with rotary positions.
    known_before_writing
        Whether it holds for graphs in which nodes are still to be written, whose lengths are not known.
    branches_collide
        Whether what continues one sink would stand at the positions of another.
    """

    starts: StartsOf | None
    known_before_writing: bool = False
    branches_collide: bool = False


Positions: TypeAlias = Literal["after_parents", "sequential", "restart", "equilibrium"] | StartsOf | Scheme
SCHEMES = {
    "after_parents": Scheme(None, known_before_writing=True),
    "sequential": Scheme(lambda _graph, lengths: [0, *np.cumsum(list(lengths.values())[:-1]).tolist()], branches_collide=True),
    "restart": Scheme(lambda graph, _lengths: [0] * len(graph), known_before_writing=True),
    "equilibrium": Scheme(equilibrium),
}


@dataclass(frozen=True)
class Place:
    """Where a node stands: its first position and, unless its tokens count by one, how far each is from the first, ``[n]``."""

    start: Position
    apart: tuple[Position, ...] | None = None

    def end(self, length: int) -> Position:
        """One past the last position of ``length`` tokens; what follows counts by one."""
        return self.start + (length if self.apart is None else self.apart[-1] + 1)

    def of(self, tokens: range) -> npt.NDArray[Any]:
        """The positions of some tokens, ``[n]``; past those that have places of their own they count on by one."""
        if self.apart is None:
            return self.start + np.arange(tokens.start, tokens.stop)
        held = np.asarray(self.apart[tokens.start : tokens.stop])
        beyond = np.arange(max(tokens.start, len(self.apart)), tokens.stop) - len(self.apart) + self.apart[-1] + 1
        return self.start + np.concatenate([held, beyond]) if len(beyond) else self.start + held


def place_of(positions: Sequence[Position]) -> Place:
    """The place of tokens that stand at these positions."""
    apart = tuple(position - positions[0] for position in positions)
    return Place(positions[0], None if apart == tuple(range(len(apart))) else apart)


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


def after_seen(ends: Iterable[Position | None]) -> Position | None:
    """Where a node starts by itself: at the furthest end of what it sees, 0 for a root; None while an end is not known."""
    known = list(ends)
    return None if None in known else max(known, default=0)  # type: ignore[type-var]


def token_positions(
    graph: ICLGraph, lengths: Sequence[int], visible: Visible, scheme: Positions
) -> npt.NDArray[np.int64] | npt.NDArray[np.float64]:
    """The position of every token, ``[S]``: int64 where all of them are whole numbers, else float64.

    ``"after_parents"``: a node starts at the furthest end among the nodes it sees, 0 for a root. ``"sequential"``: the index in
    the layout. ``"restart"``: 0. ``"equilibrium"``: :func:`leattn.prompt.equilibrium.equilibrium`. A callable is given
    the graph and ``{node: tokens}`` and returns the starts, or the positions of all tokens, in layout order or by node. A pin
    on the node itself wins over all of them.

    Raises
    ------
    CompileError
        A callable that returns something else than positions from 0 up for every node.

    Warns
    -----
    LeattnWarning
        A node pinned before the end of something it sees: relative positions there are negative.
    """
    pinned = [pinned_start(graph, node, length) for node, length in zip(graph.nodes, lengths, strict=True)]
    given = given_places(graph, lengths, scheme_of(scheme))
    count = len(lengths)
    starts = np.zeros(count)
    ends = np.zeros(count)
    spread: dict[int, Place] = {}  # those whose tokens do not count by one
    furthest = 0.0  # the furthest end of everything so far: most runs begin at 0 and reach to the node itself
    last_runs, last_end = None, 0.0
    for i, runs in enumerate(visible.runs):
        pin = pinned[i]
        place = given[i] if given is not None and pin is None else None
        if place is not None:
            start, end = float(place.start), float(place.end(lengths[i]))
            if place.apart is not None:
                spread[i] = place
        else:
            if runs is last_runs:
                seen_end = last_end
            elif runs == ((0, i),):
                seen_end = furthest
            else:
                seen_end = max((float(ends[a:b].max()) if b - a > 1 else float(ends[a]) for a, b in runs), default=0.0)
            last_runs, last_end = runs, seen_end
            start = seen_end if pin is None else pin
            if pin is not None and pin < seen_end:
                _warn_overlap(graph, i, pin, runs, ends)
            end = start + lengths[i]
        starts[i] = start
        ends[i] = end
        furthest = max(furthest, end)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions: npt.NDArray[np.float64] = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    for i, place in spread.items():
        positions[offsets[i] : offsets[i + 1]] = place.of(range(lengths[i]))
    whole: npt.NDArray[np.int64] = positions.astype(np.int64)
    return whole if np.array_equal(whole, positions) else positions


def pinned_start(graph: ICLGraph, node: ICLNode, length: int) -> Position | None:
    """The first position of a node that is pinned, or None."""
    if node.end_pos_id is None:
        return node.start_pos_id
    if node.end_pos_id < length:
        raise CompileError(
            f"node {graph.names[node]!r} has {length} tokens and end_pos_id={node.end_pos_id}, so it would start at position "
            f"{node.end_pos_id - length}; give end_pos_id >= {length}"
        )
    return node.end_pos_id - length


def given_places(graph: ICLGraph, lengths: Sequence[int], scheme: Scheme) -> list[Place] | None:
    """What a scheme says, in layout order; None where nodes start after what they see. What it says of pinned nodes is unused.

    Raises
    ------
    CompileError
        Something else than positions from 0 up, one or one per token, for each node without a pin.
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
    return [_given_place(graph, node, of, n) for node, of, n in zip(graph.nodes, each, lengths, strict=True)]


def _given_place(graph: ICLGraph, node: ICLNode, given: Any, length: int) -> Place:
    if node.start_pos_id is not None or node.end_pos_id is not None:
        return Place(0)
    name = graph.names[node]
    several = (isinstance(given, Sequence) and not isinstance(given, str)) or getattr(given, "ndim", 0) == 1
    each = [as_position(one) for one in (given if several else [given])]
    if None in each:
        raise CompileError(
            f"the positions callable gave {given!r} for node {name!r}; give a number, its first position, or one per token"
        )
    if several and len(each) != length:
        raise CompileError(
            f"the positions callable gave {len(each)} positions for node {name!r} of {length} tokens; give one per token, or "
            "its first alone"
        )
    found = cast(list[Position], each)
    if min(found) < 0:
        raise CompileError(
            f"node {name!r} would {'reach' if several else 'start at'} position {min(found)}; positions start at 0"
        )
    return place_of(found)


def _warn_overlap(graph: ICLGraph, i: int, pin: Position, runs: Sequence[Run], ends: npt.NDArray[np.float64]) -> None:
    seen = max((j for a, b in runs for j in range(a, b)), key=lambda j: float(ends[j]))
    names = [graph.names[node] for node in graph.nodes]
    warnings.warn(
        f"node {names[i]!r} is pinned to position {pin}, before the end {ends[seen]:g} of {names[seen]!r}, which it sees",
        LeattnWarning,
        stacklevel=4,
    )
