"""What a graph asks of the model, as a list: nodes to compute, nodes to write, who sees whom, and where they start.

Several graphs become one program, in one sequence: a node that two of them share, seeing the same, is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from leattn.dag.gennode import GenNode
from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode
from leattn.dag.tokens import tokenize_all
from leattn.errors import LeattnError
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.positions import Positions, after_seen, given_starts, pinned_start, scheme_of
from leattn.prompt.slots import Slots, Text, continued_name
from leattn.prompt.visible import Readings, Run, Visibility, Visible, merge, visible_relation


@dataclass(frozen=True)
class Unit:
    """One node of a program.

    ``ids`` are its tokens, or the header of what the model writes; a continuation has none, and goes on from the last token of
    the unit ``follows``. ``start`` is its first position, or None: after what it sees.
    """

    name: str
    ids: tuple[int, ...]
    start: int | None
    writes: bool = False
    follows: int | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


class Program:
    """Units in an order in which each comes after those it sees, and the visible relation. Targets are added first."""

    def __init__(self) -> None:
        self.units: list[Unit] = []
        self._runs: list[tuple[Run, ...]] = []
        self._readings: dict[int, Readings] = {}
        self._known: dict[tuple[ICLNode, int | None, tuple[Run, ...], Readings], int] = {}
        self._targets: list[tuple[ICLGraph, Sequence[int], Mapping[str, int]]] = []

    @cached_property
    def visible(self) -> Visible:
        """Which units each unit sees."""
        return Visible(tuple(self._runs), self._readings)

    @cached_property
    def sees(self) -> tuple[tuple[int, ...], ...]:
        """The units that each unit sees, ascending."""
        return tuple(tuple(self.visible.nodes_seen(i)) for i in range(len(self.units)))

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
        given = given_starts(graph, [len(node_ids) for node_ids in ids], scheme)
        visible = visible_relation(graph, visibility)
        place: list[int] = []
        branches = {}
        for i, (node, node_ids) in enumerate(zip(graph.nodes, ids, strict=True)):
            name = graph.names[node]
            mapped = _mapped(visible.runs[i], place)
            start = pinned_start(graph, node, len(node_ids))
            if start is None:
                start = after_seen(map(self._end, _members(mapped))) if given is None else given[i]
            unit = Unit(name, tuple(node_ids), start)
            if isinstance(node, GenNode):
                limit, stop, sampling = node.max_new_tokens, node.stop, node.sampling
                unit = replace(unit, writes=True, max_new_tokens=limit, stop=stop, sampling=sampling)
                branches[name] = i
            place.append(self._unit(node, unit, mapped, _read(visible, i, place)))
        self._targets.append((graph, place, {}))
        return Part(graph, None, {name: place[i] for name, i in branches.items()})

    def add_prompt(self, prompt: CompiledPrompt) -> Part:
        """All sinks go on: each gets a continuation, which sees the sink and what that sees."""
        graph, offsets = prompt.graph, prompt.offsets
        ids, positions = prompt.input_ids[0].tolist(), prompt.position_ids[0].tolist()
        place: list[int] = []
        for i, node in enumerate(graph.nodes):
            tokens = tuple(ids[offsets[i] : offsets[i + 1]])
            unit = Unit(graph.names[node], tokens, positions[offsets[i]])
            place.append(self._unit(node, unit, _mapped(prompt.visible.runs[i], place), _read(prompt.visible, i, place)))
        branches = {}
        for sink in graph.sinks:
            i = graph.index[sink]
            follows = place[i]
            branches[graph.names[sink]] = len(self.units)
            if follows in self._readings:
                self._readings[len(self.units)] = self._readings[follows]
            self.units.append(Unit(graph.names[sink], (), positions[offsets[i + 1] - 1] + 1, writes=True, follows=follows))
            self._runs.append(merge([*self._runs[follows], (follows, follows + 1)]))
        self._targets.append((graph, place, {continued_name(name): i for name, i in branches.items()}))
        return Part(graph, prompt, branches)

    def _end(self, i: int) -> int | None:
        unit = self.units[i]
        return None if unit.writes or unit.start is None else unit.start + len(unit.ids)

    def _unit(self, node: ICLNode, unit: Unit, runs: tuple[Run, ...], readings: Readings) -> int:
        """The index of this unit: the one at hand if another target has the same node, reading the same, in the same place."""
        known = self._known.setdefault((node, unit.start, runs, readings), len(self.units))
        if known == len(self.units):
            self.units.append(unit)
            self._runs.append(runs)
            if readings:
                self._readings[known] = readings
        return known


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
) -> tuple[Program, list[Part]]:
    """One program of all targets. A graph is one with nodes to write; what has none comes compiled.

    Raises
    ------
    LeattnError
        Positions that depend on lengths which are not known yet.
    """
    program = Program()
    parts = [
        program.add_prompt(target)
        if isinstance(target, CompiledPrompt)
        else program.add_graph(target, tokenizer, positions, visibility)
        for target in targets
    ]
    return program, parts


def _read(visible: Visible, node: int, place: Sequence[int]) -> Readings:
    """The readings of a node of one target's layout, over units."""
    return tuple((_mapped(runs, place), reading) for runs, reading in visible.readings.get(node, ()))


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
