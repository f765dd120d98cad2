"""A graph as a tree of text: from the sinks down to what they see, every shared node once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from leattn.dag.gennode import mark
from leattn.dag.node import ICLNode
from leattn.dag.reading import Reading

MAX_LINES = 400
MAX_DEPTH = 120


def draw(sinks: Sequence[ICLNode], names: Mapping[ICLNode, str], *, name_limit: int = 100, repeat: bool = False) -> str:
    """One line per edge to a node not drawn before; a later edge to a drawn node that has parents ends in ``↑``.

    Parameters
    ----------
    sinks
        Where to start. Each is a tree of its own.
    names
        The text of each node, cut after ``name_limit`` characters.
    repeat
        Draw what is above a node again wherever the node is seen: a line per path, and no ``↑``.

    Notes
    -----
    A diamond of depth 40 has 2⁴⁰ paths but 120 edges, and draws in about as many lines. Past ``MAX_LINES`` lines, or
    ``MAX_DEPTH`` levels, the rest is counted and not drawn.
    """
    lines: list[str] = []
    drawn: set[ICLNode] = set()
    stack = [(sink, "", i == len(sinks) - 1, 0) for i, sink in reversed(list(enumerate(sinks)))]
    while stack:
        if len(lines) >= MAX_LINES:
            lines.append(f"… {len(names) - len(drawn)} more nodes")
            break
        node, prefix, is_last, depth = stack.pop()
        repeated = node in drawn and not repeat
        drawn.add(node)
        ways = reads((len(group.nodes), group.reading) for group in node.readings)
        label = (" ".join(names[node][:name_limit].split()) or repr(names[node])) + mark(node) + ways
        lines.append(prefix + ("└── " if is_last else "├── ") + label + (" ↑" if repeated and node.parents else ""))
        if repeated or not node.parents:
            continue
        inner = prefix + ("    " if is_last else "│   ")
        if depth == MAX_DEPTH:
            lines.append(f"{inner}└── … deeper than {MAX_DEPTH} levels")
            continue
        # What the line budget cannot show need not wait on the stack: a causal prompt has N²/2 edges.
        parents = list(node.parents[: MAX_LINES + 1])
        last = len(parents) == len(node.parents)
        for i in range(len(parents) - 1, -1, -1):
            stack.append((parents[i], inner, last and i == len(parents) - 1, depth + 1))
    return "\n".join(lines)


def reads(groups: Iterable[tuple[int, Reading]]) -> str:
    """What stands behind the name of a node that reads groups of so many nodes in other ways."""
    return "".join(f"  ◂ {count} at {reading}" for count, reading in groups)
