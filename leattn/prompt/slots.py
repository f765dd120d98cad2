"""The tokens of a sequence numbered by node before anything runs: where names are looked up, however the columns come.

A *slot* is one token that is known beforehand, or all that a node writes. A compiled prompt's slots are its token indices, and
one more for what is generated after it. In a program a node's tokens come in any order of columns, and their slots stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode

if TYPE_CHECKING:
    from leattn.prompt.compiled import CompiledPrompt


def continued_name(name: str) -> str:
    """What the text that continues a node is called."""
    return f"{name} (continued)"


class Slots:
    """The slots of one row of columns, whose nodes are numbered as in its visible relation.

    Parameters
    ----------
    names
        Of its nodes.
    lengths
        How many tokens of each are known beforehand; of one that is written, those of its header.
    written
        The nodes that are written, ascending.

    Attributes
    ----------
    offsets : ndarray
        The known tokens of node i have the slots ``offsets[i]`` to ``offsets[i + 1]``.
    known, count : int
        The slots of known tokens come first; how many, and how many slots there are.
    """

    def __init__(self, names: Sequence[str], lengths: Sequence[int], written: Sequence[int]) -> None:
        self.names, self.written = tuple(names), tuple(written)
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64))])
        self.known = int(self.offsets[-1])
        self.count = self.known + len(self.written)
        self._new = np.full(len(self.names) + 1, -1)
        self._new[list(self.written)] = np.arange(self.known, self.count)

    def known_of(self, node: int) -> range:
        """The slots of the tokens of a node that are known beforehand."""
        return range(int(self.offsets[node]), int(self.offsets[node + 1]))

    def new_of(self, node: int) -> list[int]:
        """The slot of what a node writes; none if it is not written."""
        return [int(self._new[node])] if self._new[node] >= 0 else []

    def at(self, nodes: npt.NDArray[np.int64], indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The slots of some tokens by node and by index within it, ``[n]`` each; −1 where it is no node's."""
        place = self.start_of(nodes) + indices
        is_known = (nodes < len(self.names)) & (place < np.append(self.offsets[1:], 0)[nodes])
        return np.where(is_known, place, self._new[nodes])

    def start_of(self, nodes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The first slot of each of some nodes, ``[n]``."""
        return self.offsets[nodes]


@dataclass(frozen=True, eq=False)
class Text:
    """One prompt of a batch, or one target of a program: its nodes, and the slots of their tokens.

    Attributes
    ----------
    row
        Which row of the columns it stands in: one of its own, or the one that it shares with a program's other targets.
    nodes
        The row's node for each node of the graph, in layout order.
    continuations
        By name, the row's nodes of the texts that continue a sink.
    grows
        Whether its columns come node by node, as a program's do.
    """

    graph: ICLGraph
    row: int
    slots: Slots
    nodes: Sequence[int]
    continuations: Mapping[str, Sequence[int]] = field(default_factory=dict)
    grows: bool = False

    @property
    def names(self) -> list[str]:
        """Of its nodes, and of what continues them."""
        return [*self.graph.names.values(), *self.continuations]

    def slots_of(self, key: ICLNode | str) -> list[int]:
        """The slots of a node by itself, by name, or of a continuation by its name: of all tokens, the written ones too."""
        nodes = self._nodes(key)
        return [slot for node in nodes for slot in (*self.slots.known_of(node), *self.slots.new_of(node))]

    def known_of(self, key: ICLNode | str) -> list[int]:
        """The slots of a node's tokens that are known beforehand."""
        return [slot for node in self._nodes(key) for slot in self.slots.known_of(node)]

    def is_written(self, slot: int) -> bool:
        """Whether this is the slot of all that a node writes."""
        return slot >= self.slots.known

    @cached_property
    def by_index(self) -> list[int]:
        """The slots of the tokens that have an index before anything is written: up to the first header, in layout order."""
        found: list[int] = []
        for node in self.nodes:
            found += self.slots.known_of(node)
            if self.slots.new_of(node):
                break
        return found

    @cached_property
    def lasts(self) -> list[int]:
        """The slot of the last token of every sink: of one that is written, of its header's last."""
        return [self.slots.known_of(self.nodes[self.graph.index[sink]])[-1] for sink in self.graph.sinks]

    @cached_property
    def known(self) -> list[int]:
        """The slots of all tokens that are known beforehand, in layout order."""
        return [slot for node in self.nodes for slot in self.slots.known_of(node)]

    @cached_property
    def new(self) -> list[int]:
        """The slots of all that is written."""
        nodes = (*self.nodes, *chain.from_iterable(self.continuations.values()))
        return [slot for node in nodes for slot in self.slots.new_of(node)]

    def _nodes(self, key: ICLNode | str) -> Sequence[int]:
        if isinstance(key, str) and key in self.continuations and key not in self.graph.names.values():
            return self.continuations[key]
        return [self.nodes[self.graph.index[self.graph[key]]]]


def text_of(prompt: CompiledPrompt, row: int = 0, *, generates: bool = True) -> Text:
    """A compiled prompt, and what is generated after it, if it has one sink and anything is."""
    graph = prompt.graph
    names = [graph.names[node] for node in graph.nodes]
    after = continued_name(names[-1])
    slots = Slots([*names, after], [*np.diff(prompt.offsets).tolist(), 0], [len(names)])
    return Text(graph, row, slots, range(len(names)), {after: [len(names)]} if generates and len(graph.sinks) == 1 else {})
