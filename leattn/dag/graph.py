"""Nodes with all their ancestors, in one deterministic order and with unique names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leattn.dag import exchange
from leattn.dag.draw import draw
from leattn.dag.gennode import GenNode
from leattn.dag.node import ICLNode, Prefix
from leattn.errors import GraphError, LeattnError

if TYPE_CHECKING:
    import networkx


class ICLGraph:
    """Targets and everything they can see, however far back.

    Parameters
    ----------
    *targets
        The nodes to reach. Their ancestors come along.

    Attributes
    ----------
    nodes : tuple of ICLNode
        In layout order: parents first, and otherwise in the order in which the nodes were created.
    names : dict of ICLNode to str
        The given id, or the first ten characters of the content made unique (``"A simple f #2"``).
    sinks : tuple of ICLNode
        The nodes nobody sees.

    Raises
    ------
    GraphError
        No target, something that is no node, or one explicit id given to two nodes.

    Examples
    --------
    >>> x = ICLNode("example1.", id="X")
    >>> q = ICLNode("What does the fox say?", parents=[x], id="Q")
    >>> graph = ICLGraph(q)
    >>> print(graph)
    └── Q
        └── X
    >>> graph["X"] is x
    True
    """

    def __init__(self, *targets: ICLNode) -> None:
        if not targets:
            raise GraphError("a graph needs at least one target node")
        for target in targets:
            if not isinstance(target, ICLNode):
                raise GraphError(f"a target is an ICLNode, not {target!r}; unpack a list with ICLGraph(*nodes)")
        self.nodes: tuple[ICLNode, ...] = _with_ancestors(targets)
        self.index: dict[ICLNode, int] = {node: i for i, node in enumerate(self.nodes)}
        _check_ids(self.nodes)

    @cached_property
    def names(self) -> dict[ICLNode, str]:
        return _unique_names(self.nodes)

    @cached_property
    def _by_name(self) -> dict[str, ICLNode]:
        return {name: node for node, name in self.names.items()}

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[ICLNode]:
        return iter(self.nodes)

    def __contains__(self, node: object) -> bool:
        return node in self.index if isinstance(node, ICLNode) else node in self._by_name

    def __getitem__(self, key: str | ICLNode) -> ICLNode:
        """The node with this name; a node of the graph is returned as it is."""
        if isinstance(key, ICLNode):
            if key not in self.index:
                raise GraphError(f"node {str(key)!r} is not in this graph of {len(self)} nodes")
            return key
        if key not in self._by_name:
            some = ", ".join(repr(name) for name in list(self._by_name)[:8]) + (", ..." if len(self) > 8 else "")
            raise GraphError(f"no node is called {key!r}; this graph has {some}")
        return self._by_name[key]

    def name(self, node: str | ICLNode) -> str:
        """The unique name of a node in this graph."""
        return self.names[self[node]]

    def parents(self, node: str | ICLNode) -> tuple[ICLNode, ...]:
        """The nodes that ``node`` names as parents, in layout order."""
        return tuple(sorted(self[node].parents, key=self.index.__getitem__))

    def children(self, node: str | ICLNode) -> tuple[ICLNode, ...]:
        """The nodes that name ``node`` as a parent, in layout order."""
        return self._children.get(self[node], ())

    def ancestors(self, node: str | ICLNode) -> tuple[ICLNode, ...]:
        """Everything ``node`` depends on, in layout order, itself not included."""
        return _with_ancestors((self[node],))[:-1]

    @cached_property
    def _children(self) -> dict[ICLNode, tuple[ICLNode, ...]]:
        children: dict[ICLNode, list[ICLNode]] = {}
        for node in self.nodes:
            for parent in node.parents:
                children.setdefault(parent, []).append(node)
        return {node: tuple(found) for node, found in children.items()}

    @cached_property
    def sinks(self) -> tuple[ICLNode, ...]:
        seen = _all_parents(self.nodes)
        return tuple(node for node in self.nodes if node not in seen)

    def __str__(self) -> str:
        return draw(self.sinks, self.names)

    def __repr__(self) -> str:
        sinks = ", ".join(repr(self.names[sink]) for sink in self.sinks[:4]) + (", ..." if len(self.sinks) > 4 else "")
        written = sum(isinstance(node, GenNode) for node in self.nodes)
        return f"ICLGraph({len(self)} nodes, {f'{written} written by the model, ' * bool(written)}sinks: {sinks})"

    # Exchange with other tools. The formats live in leattn/dag/exchange.py.

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON or YAML: ``{"nodes": [{"id", "content", "parents", …}, …]}``, parents by name.

        A node with the field ``max_new_tokens`` is a :class:`GenNode`; it may have ``stop`` and ``sampling`` too.
        """
        return exchange.to_dict(self.nodes, self.names)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ICLGraph:
        """The graph of :meth:`to_dict`'s data. Nodes may come in any order; among equals the order of the data counts.

        A field ``root`` beside ``nodes``, text or token ids, makes a first node of that name, which every other node sees,
        whether it says so or not. ``"<s>"``, or what a tokenizer calls its BOS, makes it that token.

        Raises
        ------
        GraphError
            A cycle (printed), an unknown parent, an id given twice, an unknown field.
        """
        return cls(*exchange.from_dict(data))

    def to_file(self, path: str | Path) -> None:
        """Write a YAML prompt file, or JSON where the name ends in ``.json``. An existing file is replaced whole."""
        exchange.write(self.to_dict(), path)

    @classmethod
    def from_file(cls, path: str | Path) -> ICLGraph:
        """Read a YAML or JSON prompt file. Raises as :meth:`from_dict` does, with the name of the file."""
        return cls(*exchange.read(path))

    def to_networkx(self) -> networkx.DiGraph[str]:
        """A ``networkx.DiGraph`` over names. An edge runs from a parent to the node that sees it."""
        return exchange.to_networkx(self.nodes, self.names)

    @classmethod
    def from_networkx(cls, graph: networkx.DiGraph[Any]) -> ICLGraph:
        """The graph of a ``networkx.DiGraph`` whose nodes carry a ``content`` attribute.

        An edge (a, b) makes b see a. Names become ids; the other fields of :meth:`to_dict` are read where present.

        Raises
        ------
        GraphError
            A cycle (printed), a graph without direction, or a node without content.
        """
        return cls(*exchange.from_networkx(graph))


def _all_parents(nodes: tuple[ICLNode, ...]) -> set[ICLNode]:
    """Every node that some node names as a parent; parents shared between nodes are walked once."""
    found: set[ICLNode] = set()
    walked: dict[int, int] = {}
    for node in nodes:
        found.update(_new_parents(node, walked))
    return found


def _new_parents(node: ICLNode, walked: dict[int, int]) -> tuple[ICLNode, ...]:
    """The parents of ``node`` in parent lists not met so far; ``walked`` maps a list to how much of it was met."""
    parents = node.parents
    base = parents.base if type(parents) is Prefix else parents
    start, stop = walked.get(id(base), 0), len(parents)
    if start >= stop:
        return ()
    walked[id(base)] = stop
    return tuple(base[start:stop])


def _with_ancestors(targets: tuple[ICLNode, ...]) -> tuple[ICLNode, ...]:
    """Targets and ancestors by creation order, which is topological because parents exist first."""
    # A dict keeps the order in which nodes were met: nodes pickled in two processes may share a creation number.
    found = dict.fromkeys(targets)
    stack = list(targets)
    walked: dict[int, int] = {}
    while stack:
        for parent in _new_parents(stack.pop(), walked):
            if parent not in found:
                found[parent] = None
                stack.append(parent)
    return tuple(sorted(found, key=lambda node: node.created))


def _check_ids(nodes: tuple[ICLNode, ...]) -> None:
    taken: set[str] = set()
    for node in nodes:
        if node.id is not None:
            if node.id in taken:
                raise GraphError(f"id {node.id!r} is given to two nodes of one graph; ids are unique, give one of them another")
            taken.add(node.id)


def _unique_names(nodes: tuple[ICLNode, ...]) -> dict[ICLNode, str]:
    taken = {node.id for node in nodes if node.id is not None}
    names: dict[ICLNode, str] = {}
    next_number: dict[str, int] = {}
    for node in nodes:
        if node.id is not None:
            names[node] = node.id
            continue
        name = base = node.default_name
        number = next_number.get(base, 2)
        while name in taken:
            name = f"{base} #{number}"
            number += 1
        next_number[base] = number
        taken.add(name)
        names[node] = name
    return names


def as_graph(target: ICLNode | Iterable[ICLNode] | ICLGraph) -> ICLGraph:
    """A graph as it is, a node or several nodes with their ancestors."""
    if isinstance(target, ICLGraph):
        return target
    if isinstance(target, ICLNode):
        return ICLGraph(target)
    if isinstance(target, str) or not isinstance(target, Iterable):
        raise LeattnError(f"a prompt is compiled from an ICLNode, several of them or an ICLGraph, not from {target!r}")
    return ICLGraph(*target)
