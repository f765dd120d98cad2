"""Random graphs of token-id nodes, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from leattn import ICLGraph, ICLNode
from leattn.dag.node import Prefix

VISIBILITIES = st.sampled_from(["parents", "ancestors"])
SCHEMES = st.sampled_from(["after_parents", "sequential", "restart"])


@st.composite
def node_lists(draw, max_nodes: int = 7, max_tokens: int = 5) -> list[ICLNode]:
    """Nodes in creation order, each with any of the earlier ones as parents, in any order of the list."""
    nodes: list[ICLNode] = []
    for i in range(draw(st.integers(1, max_nodes))):
        content = draw(st.lists(st.integers(0, 99), min_size=1, max_size=max_tokens))
        if nodes and draw(st.integers(0, 4)) == 0:
            parents = Prefix(nodes, len(nodes))
        else:
            parents = draw(st.lists(st.sampled_from(nodes), unique=True)) if nodes else []
        nodes.append(ICLNode(content, parents, id=draw(st.sampled_from([None, f"n{i}"]))))
    return nodes


@st.composite
def graphs(draw, max_nodes: int = 7, max_tokens: int = 5) -> ICLGraph:
    """A graph of one or several targets."""
    nodes = draw(node_lists(max_nodes, max_tokens))
    return ICLGraph(*draw(st.lists(st.sampled_from(nodes), min_size=1, unique=True)))
