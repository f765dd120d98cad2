"""The prompts that families are checked on, as plain data, and as leattn's nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from leattn import CompiledPrompt, ICLNode, compile_prompt

LOWEST, HIGHEST = 3, 90
"""Token ids that are no family's special ones."""


@dataclass(frozen=True)
class Chunk:
    """A node: its name, its tokens, the names of the nodes it sees whole, and where it begins if that is pinned."""

    name: str
    tokens: tuple[int, ...]
    parents: tuple[str, ...] = ()
    start: int | None = None


Graph: TypeAlias = tuple[Chunk, ...]
"""Chunks in an order in which parents come first."""


def tokens(count: int, seed: int) -> tuple[int, ...]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(LOWEST, HIGHEST, (count,), generator=generator).tolist())


def fan(root: int = 4, a: int = 11, b: int = 9, c: int = 13, question: int = 5, tail: int = 3, *, seed: int = 0) -> Graph:
    """Three documents below a root, a question that sees two of them, and a node that sees the question alone."""
    return (
        Chunk("root", tokens(root, seed)),
        Chunk("a", tokens(a, seed + 1), ("root",)),
        Chunk("b", tokens(b, seed + 2), ("root",)),
        Chunk("c", tokens(c, seed + 3), ("root",)),
        Chunk("question", tokens(question, seed + 4), ("root", "a", "b")),
        Chunk("tail", tokens(tail, seed + 5), ("question",)),
    )


def long_fan() -> Graph:
    """The same, so long that what begins after a hundred tokens has begun."""
    return fan(20, 37, 31, 23, 12, 5, seed=20)


def one_sink(*, seed: int = 40) -> Graph:
    """A graph to continue: the question sees two documents, and a note on the third."""
    root, a, b, c, question, _ = fan(seed=seed)
    note = Chunk("note", tokens(3, seed + 6), ("root", "c"))
    return (root, a, b, c, note, replace(question, parents=("root", "a", "b", "note")))


def pieces(lengths: Sequence[int], *, seed: int = 60) -> list[tuple[int, ...]]:
    """One text in several pieces."""
    return [tokens(length, seed + i) for i, length in enumerate(lengths)]


def chain(lengths: Sequence[int], *, seed: int = 60) -> Graph:
    """Each chunk names the one before as its parent; with ``visibility="ancestors"`` it is plain text."""
    return tuple(
        Chunk(f"part {i}", piece, (f"part {i - 1}",) if i else ()) for i, piece in enumerate(pieces(lengths, seed=seed))
    )


def everyone(lengths: Sequence[int], *, seed: int = 60) -> Graph:
    """Each chunk names all before it as its parents: plain text."""
    return tuple(
        Chunk(f"part {i}", piece, tuple(f"part {j}" for j in range(i))) for i, piece in enumerate(pieces(lengths, seed=seed))
    )


def ancestors(graph: Graph, name: str) -> set[str]:
    """Everything upstream of a node."""
    by_name = {chunk.name: chunk for chunk in graph}
    found: set[str] = set()
    waiting = list(by_name[name].parents)
    while waiting:
        other = waiting.pop()
        if other not in found:
            found.add(other)
            waiting += by_name[other].parents
    return found


def alone(graph: Graph, name: str) -> Graph:
    """A node and its ancestors, where they stand."""
    kept = ancestors(graph, name) | {name}
    starts = start_of(graph)
    return tuple(replace(chunk, start=starts[chunk.name]) for chunk in graph if chunk.name in kept)


def start_of(graph: Graph) -> dict[str, int]:
    """First position of every node: where it is pinned, or at the furthest end among those it sees."""
    starts: dict[str, int] = {}
    lengths = {chunk.name: len(chunk.tokens) for chunk in graph}
    for chunk in graph:
        ends = [starts[name] + lengths[name] for name in chunk.parents]
        starts[chunk.name] = max(ends, default=0) if chunk.start is None else chunk.start
    return starts


def reordered(graph: Graph, names: Sequence[str]) -> Graph:
    """The same graph, written down in another order."""
    by_name = {chunk.name: chunk for chunk in graph}
    return tuple(by_name[name] for name in names)


def changed(graph: Graph, name: str) -> Graph:
    """The same graph with other tokens in one node."""
    other = tuple(LOWEST + (token - LOWEST + 29) % (HIGHEST - LOWEST) for token in graph_tokens(graph, name))
    return tuple(replace(chunk, tokens=other) if chunk.name == name else chunk for chunk in graph)


def graph_tokens(graph: Graph, name: str) -> tuple[int, ...]:
    """The tokens of one node."""
    return next(chunk.tokens for chunk in graph if chunk.name == name)


def is_plain(graph: Graph, name: str) -> bool:
    """Whether a node and its ancestors are plain text: each sees all before it, and positions count from 0."""
    own = alone(graph, name)
    end = 0
    for i, chunk in enumerate(own):
        if set(chunk.parents) != {other.name for other in own[:i]} or chunk.start != end:
            return False
        end += len(chunk.tokens)
    return True


def nodes(graph: Graph) -> dict[str, ICLNode]:
    """leattn's nodes of a graph, created in its order, which is the order they are laid out in."""
    made: dict[str, ICLNode] = {}
    for chunk in graph:
        parents = [made[name] for name in chunk.parents]
        made[chunk.name] = ICLNode(list(chunk.tokens), parents, id=chunk.name, start_pos_id=chunk.start)
    return made


def compiled(graph: Graph, visibility: str = "parents") -> CompiledPrompt:
    """leattn's compiled prompt of a graph."""
    seen = {name for chunk in graph for name in chunk.parents}
    made = nodes(graph)
    sinks = [node for name, node in made.items() if name not in seen]
    return compile_prompt(sinks, visibility=visibility)  # type: ignore[arg-type]
