"""What a graph asks of the model, as a list: nodes to compute, nodes to write, who sees whom, and where they start.

Several graphs become one program, in one sequence: what is equal in two of them is computed once.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from leattn.dag.gennode import GenNode
from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode, Position
from leattn.dag.tokens import tokenize_all
from leattn.errors import LeattnError
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.positions import Place, Positions, after_seen, given_places, pinned_start, place_of, scheme_of
from leattn.prompt.slots import Slots, Text, continued_name
from leattn.prompt.visible import Readings, Run, Visibility, Visible, merge, visible_relation


@dataclass(frozen=True)
class Unit:
    """One node of a program.

    ``ids`` are its tokens, or the header of what the model writes; a continuation has none, and goes on from the last token of
    the unit ``follows``. ``place`` is where it stands, or None: after what it sees.
    """

    name: str
    ids: tuple[int, ...]
    place: Place | None
    writes: bool = False
    follows: int | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


class Program:
    """Units in an order in which each comes after those it sees, and the visible relation. Targets are added first.

    With ``by_node`` only what is the same node is the same in two targets, so that what is done to one of them by name is not
    done to another.
    """

    def __init__(self, *, by_node: bool = False) -> None:
        self._by_node = by_node
        self.units: list[Unit] = []
        self._runs: list[tuple[Run, ...]] = []
        self._readings: dict[int, Readings] = {}
        self._equal: dict[Hashable, list[int]] = {}
        self._targets: list[tuple[ICLGraph, Sequence[int], dict[str, list[int]]]] = []

    @cached_property
    def visible(self) -> Visible:
        """Which units each unit sees."""
        return Visible(tuple(self._runs), self._readings)

    @cached_property
    def sees(self) -> tuple[tuple[int, ...], ...]:
        """The units that each unit sees, ascending."""
        return tuple(tuple(self.visible.nodes_seen(i)) for i in range(len(self.units)))

    @cached_property
    def is_whole(self) -> bool:
        """Whether all positions are whole numbers."""
        places = [unit.place for unit in self.units if unit.place is not None]
        return all(isinstance(each, int) for place in places for each in (place.start, *(place.apart or ())))

    @cached_property
    def written(self) -> tuple[int, ...]:
        """The units that the model writes."""
        return tuple(i for i, unit in enumerate(self.units) if unit.writes)

    @cached_property
    def waits_for(self) -> tuple[frozenset[int], ...]:
        """The written units that each unit depends on, however far back, itself not included."""
        waits: list[frozenset[int]] = []
        for seen in self.sees:
            direct = frozenset(j for j in seen if self.units[j].writes)
            waits.append(direct.union(*(waits[j] for j in seen)))
        return tuple(waits)

    @cached_property
    def texts(self) -> tuple[Text, ...]:
        """The targets as operations see them, all in the one row."""
        names = [unit.name if unit.follows is None else continued_name(unit.name) for unit in self.units]
        slots = Slots(names, [len(unit.ids) for unit in self.units], self.written)
        return tuple(Text(graph, 0, slots, place, new, grows=True) for graph, place, new in self._targets)

    def upwards(self, i: int) -> list[int]:
        """What unit i sees, what those see, and so on, ascending; itself not included."""
        found: set[int] = set()
        stack = [i]
        while stack:
            for j in self.sees[stack.pop()]:
                if j not in found:
                    found.add(j)
                    stack.append(j)
        return sorted(found)

    @cached_property
    def followers(self) -> Mapping[int, tuple[int, ...]]:
        """The continuations that go on from each unit."""
        found: dict[int, list[int]] = {}
        for i, unit in enumerate(self.units):
            if unit.follows is not None:
                found.setdefault(unit.follows, []).append(i)
        return {i: tuple(those) for i, those in found.items()}

    def add_graph(self, graph: ICLGraph, tokenizer: Any, positions: Positions, visibility: Visibility) -> Part:
        scheme = scheme_of(positions)
        if not scheme.known_before_writing:
            raise LeattnError(
                f"positions={positions!r} needs the length of every node, and a GenNode's is known only when it is written; "
                "use 'after_parents' or 'restart', pin nodes with start_pos_id, or say "
                "Scheme(starts, known_before_writing=True) of a scheme of your own that needs none"
            )
        ids = tokenize_all(graph.nodes, tokenizer)
        given = given_places(graph, [len(node_ids) for node_ids in ids], scheme)
        visible = visible_relation(graph, visibility)
        units: list[int] = []
        branches = {}
        for i, (node, node_ids) in enumerate(zip(graph.nodes, ids, strict=True)):
            name = graph.names[node]
            mapped = _mapped(visible.runs[i], units)
            start = pinned_start(graph, node, len(node_ids))
            place = None if given is None else given[i]
            if place is None or start is not None:
                start = after_seen(map(self._end, _members(mapped))) if start is None else start
                place = None if start is None else Place(start)
            unit = Unit(name, tuple(node_ids), place)
            if isinstance(node, GenNode):
                limit, stop, sampling = node.max_new_tokens, node.stop, node.sampling
                unit = replace(unit, writes=True, max_new_tokens=limit, stop=stop, sampling=sampling)
                branches[name] = i
            units.append(self._unit(node, unit, mapped, _read(visible, i, units), units))
        self._targets.append((graph, units, {}))
        return Part(graph, None, {name: units[i] for name, i in branches.items()})

    def add_prompt(self, prompt: CompiledPrompt) -> Part:
        """All sinks go on: each gets a continuation, which sees the sink and what that sees."""
        units, names = self.add_nodes(prompt), prompt.graph.names
        branches = {names[sink]: self.add_continuation(prompt, sink, units) for sink in prompt.graph.sinks}
        return Part(prompt.graph, prompt, branches)

    def add_nodes(self, prompt: CompiledPrompt) -> list[int]:
        """The units of a prompt's nodes, in layout order."""
        offsets = prompt.offsets
        ids, positions = prompt.input_ids[0].tolist(), prompt.position_ids[0].tolist()
        units: list[int] = []
        for i, node in enumerate(prompt.graph.nodes):
            span = slice(offsets[i], offsets[i + 1])
            unit = Unit(prompt.graph.names[node], tuple(ids[span]), place_of(positions[span]))
            units.append(self._unit(node, unit, _mapped(prompt.visible.runs[i], units), _read(prompt.visible, i, units), units))
        self._targets.append((prompt.graph, units, {}))
        return units

    def add_continuation(self, prompt: CompiledPrompt, sink: ICLNode, units: Sequence[int]) -> int:
        """A unit that goes on from a sink of the prompt added last, whose nodes are ``units``; it reads as that does."""
        follows = units[prompt.graph.index[sink]]
        after = Place(prompt.position_ids[0, prompt.spans[sink][1] - 1].item() + 1)
        if follows in self._readings:
            self._readings[len(self.units)] = self._readings[follows]
        self.units.append(Unit(prompt.graph.names[sink], (), after, writes=True, follows=follows))
        self._runs.append(merge([*self._runs[follows], (follows, follows + 1)]))
        found = len(self.units) - 1
        self._targets[-1][2].setdefault(continued_name(prompt.graph.names[sink]), []).append(found)
        return found

    def _end(self, i: int) -> Position | None:
        unit = self.units[i]
        return None if unit.writes or unit.place is None else unit.place.end(len(unit.ids))

    def _unit(self, node: ICLNode, unit: Unit, runs: tuple[Run, ...], readings: Readings, taken: Collection[int]) -> int:
        """The index of this unit: that of an equal one of another target, which is not ``taken`` in this one.

        Equal are nodes of the same tokens, in the same place, that see and read the same. Within one target two equal nodes are
        two: who sees both sees everything twice. What is to be written is the same only if it is the same node.
        """
        equal = self._equal.setdefault((node if unit.writes or self._by_node else unit.ids, unit.place, runs, readings), [])
        found = next((i for i in equal if i not in taken), None)
        if found is not None:
            return found
        equal.append(len(self.units))
        self.units.append(unit)
        self._runs.append(runs)
        if readings:
            self._readings[equal[-1]] = readings
        return equal[-1]


@dataclass(frozen=True)
class Part:
    """One target within a program, and the unit of everything that is written for it, by name."""

    graph: ICLGraph
    prompt: CompiledPrompt | None
    branches: Mapping[str, int]


def is_program(target: CompiledPrompt | ICLGraph) -> bool:
    """Whether this takes more than continuing one sink: several sinks, or nodes that the model writes."""
    graph = target.graph if isinstance(target, CompiledPrompt) else target
    return len(graph.sinks) > 1 or any(isinstance(node, GenNode) for node in graph.nodes)


def build(
    targets: Sequence[CompiledPrompt | ICLGraph],
    tokenizer: Any,
    *,
    positions: Positions = "after_parents",
    visibility: Visibility = "parents",
    by_node: bool = False,
) -> tuple[Program, list[Part]]:
    """One program of all targets. A graph is one with nodes to write; what has none comes compiled.

    Raises
    ------
    LeattnError
        Positions that depend on lengths which are not known yet.
    """
    program = Program(by_node=by_node)
    parts = [
        program.add_prompt(target)
        if isinstance(target, CompiledPrompt)
        else program.add_graph(target, tokenizer, positions, visibility)
        for target in targets
    ]
    return program, parts


def _read(visible: Visible, node: int, units: Sequence[int]) -> Readings:
    """The readings of a node of one target's layout, over units."""
    return tuple((_mapped(runs, units), reading) for runs, reading in visible.readings.get(node, ()))


def _mapped(runs: Sequence[Run], place: Sequence[int]) -> tuple[Run, ...]:
    """Runs of one target's layout as runs of units."""
    return merge(list(_pieces(runs, place)))


def _pieces(runs: Sequence[Run], place: Sequence[int]) -> Iterator[Run]:
    for start, stop in runs:
        first = start
        for i in range(start + 1, stop + 1):
            if i == stop or place[i] != place[i - 1] + 1:
                yield place[first], place[i - 1] + 1
                first = i


def _members(runs: Sequence[Run]) -> Iterator[int]:
    return (i for start, stop in runs for i in range(start, stop))
