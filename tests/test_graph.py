"""Graphs: order, names, neighbours, drawing."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import seen_by
from strategies import graphs, node_lists

import leattn
from leattn import GraphError, ICLGraph, ICLNode
from leattn.dag.draw import MAX_DEPTH, MAX_LINES, draw


@given(node_lists(), st.data())
def test_nodes_are_the_ancestors_in_creation_order(nodes, data):
    targets = data.draw(st.lists(st.sampled_from(nodes), min_size=1, unique=True))
    wanted = set(targets).union(*(seen_by(target, "ancestors") for target in targets))
    graph = ICLGraph(*targets)
    assert list(graph.nodes) == [node for node in nodes if node in wanted]
    assert list(graph) == list(graph.nodes)
    assert len(graph) == len(wanted)
    # The order of the targets, and of the parents, is of no consequence.
    assert ICLGraph(*reversed(targets)).nodes == graph.nodes


@given(graphs())
def test_parents_come_first(graph):
    for node in graph:
        assert all(graph.index[parent] < graph.index[node] for parent in node.parents)


@given(graphs())
def test_neighbours(graph):
    for node in graph:
        assert graph.parents(node) == tuple(other for other in graph if other in set(node.parents))
        assert graph.children(node) == tuple(other for other in graph if node in set(other.parents))
        assert graph.ancestors(node) == tuple(other for other in graph if other in seen_by(node, "ancestors"))
    assert graph.sinks == tuple(node for node in graph if not graph.children(node))


@given(graphs())
def test_names_are_unique_and_lead_back(graph):
    assert list(graph.names) == list(graph.nodes)
    assert len(set(graph.names.values())) == len(graph)
    for node in graph:
        name = graph.name(node)
        assert graph[name] is node
        assert graph[node] is node
        assert name in graph
        assert node in graph
        assert node.id in (None, name)


def test_names_of_nodes_without_id():
    a, b, c = (ICLNode("A simple fact, number " + n) for n in "123")
    taken = ICLNode("x", id="A simple f #2")
    ids = ICLNode([1, 2, 3])
    graph = ICLGraph(a, b, c, taken, ids)
    assert list(graph.names.values())[:4] == ["A simple f", "A simple f #3", "A simple f #4", "A simple f #2"]
    assert graph["A simple f"] is a
    assert graph.names[ids]


def test_one_id_given_twice():
    x, y = ICLNode("x", id="doc"), ICLNode("y", id="doc")
    with pytest.raises(GraphError, match="id 'doc' is given to two nodes of one graph"):
        ICLGraph(ICLNode("q", [x, y]))
    # In two graphs there is no conflict.
    assert len(ICLGraph(x)) == len(ICLGraph(y)) == 1


def test_unknown_names():
    graph = ICLGraph(ICLNode("x", id="X"))
    with pytest.raises(GraphError, match="no node is called 'Y'; this graph has 'X'"):
        graph["Y"]
    with pytest.raises(GraphError, match="node 'Z' is not in this graph of 1 nodes"):
        graph[ICLNode("z", id="Z")]
    assert "Y" not in graph


@pytest.mark.parametrize(
    ("targets", "words"),
    [((), "at least one target"), (("text",), "a target is an ICLNode, not 'text'"), (([],), r"not \[\]; unpack a list")],
)
def test_bad_targets(targets, words):
    with pytest.raises(GraphError, match=words):
        ICLGraph(*targets)


ORDER = """
from leattn import ICLGraph, ICLNode
roots = [ICLNode(f"root {i}") for i in range(30)]
middle = [ICLNode(f"middle {i}", parents=roots[i::3]) for i in range(20)]
leaf = ICLNode("leaf", parents=middle[::-1])
graph = ICLGraph(leaf)
print([*graph.names.values()], [graph.name(n) for n in graph.ancestors(leaf)], graph, graph.to_dict())
"""


def test_the_order_is_the_same_in_every_run(capsys):
    exec(ORDER, {})
    runs = {capsys.readouterr().out}
    for seed in ("0", "1"):
        command = [sys.executable, "-c", ORDER]
        runs.add(subprocess.run(command, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout)
    assert len(runs) == 1


def test_the_order_is_the_same_when_a_graph_is_built_again():
    def build():
        roots = [ICLNode(f"root {i}") for i in range(10)]
        return ICLGraph(*[ICLNode(f"leaf {i}", roots[i::2]) for i in range(4)])

    assert build().to_dict() == build().to_dict()


# Drawing


def test_drawing_of_a_chain():
    x1 = ICLNode("example1.", id="X1")
    x2 = ICLNode("example2.", id="X2", parents=[x1])
    assert str(ICLGraph(ICLNode("q", id="Q", parents=[x2]))) == "└── Q\n    └── X2\n        └── X1"


def test_drawing_of_branches_shared_nodes_and_several_sinks():
    root = ICLNode("r", id="root")
    doc = ICLNode("d", id="doc", parents=[root])
    other = ICLNode("o", id="other", parents=[root])
    one = ICLNode("1", id="Q1", parents=[doc, other])
    two = ICLNode("2", id="Q2", parents=[doc, root])
    assert str(ICLGraph(one, two)) == "\n".join(
        [
            "├── Q1",
            "│   ├── doc",
            "│   │   └── root",
            "│   └── other",
            "│       └── root",
            "└── Q2",
            "    ├── doc ↑",
            "    └── root",
        ]
    )


def test_drawing_keeps_names_on_one_line():
    graph = ICLGraph(ICLNode("\nQ: what\nnow"), ICLNode("\n\n"))
    assert len(str(graph).splitlines()) == 2


def test_a_diamond_of_depth_40_draws_in_few_lines():
    node = ICLNode("root")
    for i in range(40):
        sides = [ICLNode(f"left {i}", [node]), ICLNode(f"right {i}", [node])]
        node = ICLNode(f"join {i}", sides)
    lines = str(ICLGraph(node)).splitlines()
    edges = 40 * 4
    assert 121 <= len(lines) <= edges + 1


def test_a_chain_of_10000_nodes_draws_and_does_not_recurse():
    nodes = leattn.chain([[i] for i in range(10_000)])
    graph = ICLGraph(nodes[-1])
    lines = str(graph).splitlines()
    assert len(lines) <= MAX_LINES + 1
    assert max(map(len, lines)) < 5 * MAX_DEPTH
    assert "deeper than" in lines[-1]
    assert len(graph.ancestors(nodes[-1])) == 9_999


def test_a_wide_graph_draws_its_first_lines_and_counts_the_rest():
    parents = [ICLNode([i], id=f"n{i}") for i in range(10_000)]
    graph = ICLGraph(ICLNode("q", parents, id="Q"))
    lines = draw(graph.sinks, graph.names).splitlines()
    assert len(lines) == MAX_LINES + 1
    assert lines[-1] == f"… {10_001 - MAX_LINES} more nodes"


def test_a_causal_graph_of_10000_nodes_is_cheap():
    """N²/2 = 50 million edges: walking them would take a minute, walking the nodes takes a fraction of a second."""
    start = time.process_time()
    nodes = leattn.causal([[i] for i in range(10_000)])
    graph = ICLGraph(*nodes)
    assert graph.sinks == (nodes[-1],)
    assert len(str(graph).splitlines()) <= MAX_LINES + 1
    assert time.process_time() - start < 20
