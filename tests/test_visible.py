"""The visible relation: runs of layout intervals against sets of nodes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import relation
from strategies import VISIBILITIES, graphs

import leattn
from leattn import ICLGraph, ICLNode, LeattnError
from leattn.dag.node import Prefix
from leattn.prompt.visible import Visible, merge, visible_relation

RUNS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted).map(tuple))


def as_sets(visible):
    return [{j for start, stop in runs for j in range(start, stop)} for runs in visible.runs]


def assert_canonical(visible):
    for runs in visible.runs:
        assert all(start < stop for start, stop in runs)
        assert all(a[1] < b[0] for a, b in pairwise(runs)), "sorted, disjoint and not touching"


@given(RUNS)
def test_merge(runs):
    merged = merge(runs)
    assert_canonical(Visible((merged,)))
    assert as_sets(Visible((merged,))) == [{i for start, stop in runs for i in range(start, stop)}]


@given(graphs(max_nodes=9), VISIBILITIES)
def test_the_relation_is_the_definition(graph, visibility):
    visible = visible_relation(graph, visibility)
    expected = relation(graph.nodes, visibility)
    assert_canonical(visible)
    assert as_sets(visible) == [{graph.index[other] for other in expected[node]} for node in graph]
    for i in range(len(graph)):
        assert visible.nodes_seen(i) == sorted(as_sets(visible)[i])
        for j in range(len(graph)):
            assert visible.sees(i, j) == (j in as_sets(visible)[i])


@given(graphs(max_nodes=9), VISIBILITIES, st.data())
def test_edits_take_away_one_edge_or_one_column(graph, visibility, data):
    visible = visible_relation(graph, visibility)
    before = as_sets(visible)
    i = data.draw(st.integers(0, len(graph) - 1))
    j = data.draw(st.integers(0, len(graph) - 1))
    cut = visible.without_edge(i, j)
    assert_canonical(cut)
    assert as_sets(cut) == [seen - {j} if k == i else seen for k, seen in enumerate(before)]
    hidden = visible.without_node(j)
    assert_canonical(hidden)
    assert as_sets(hidden) == [seen - {j} for seen in before]
    assert as_sets(visible) == before, "edits return copies"


@given(graphs(), VISIBILITIES)
def test_the_continuation_sees_the_last_node_and_what_it_sees(graph, visibility):
    visible = visible_relation(graph, visibility)
    continued = visible.continued()
    assert_canonical(continued)
    last = len(graph) - 1
    assert as_sets(continued) == [*as_sets(visible), as_sets(visible)[last] | {last}]


@given(graphs(), VISIBILITIES)
def test_flat_lists_every_run(graph, visibility):
    visible = visible_relation(graph, visibility)
    node, start, stop = visible.flat()
    assert list(zip(node.tolist(), start.tolist(), stop.tolist(), strict=True)) == [
        (i, *run) for i, runs in enumerate(visible.runs) for run in runs
    ]


def test_an_unknown_visibility_lists_the_known():
    with pytest.raises(LeattnError, match="unknown visibility 'children'; choose one of 'parents', 'ancestors'"):
        visible_relation(ICLGraph(ICLNode([1])), "children")


@pytest.mark.parametrize("visibility", ["parents", "ancestors"])
def test_a_causal_graph_of_10000_nodes_has_one_run_per_node(visibility):
    count = 10_000
    graph = ICLGraph(*leattn.causal([[i] for i in range(count)]))
    visible = visible_relation(graph, visibility)
    assert [len(runs) for runs in visible.runs] == [0] + [1] * (count - 1)
    assert visible.is_causal
    assert visible.without_node(count // 2).is_causal is False


def test_prefixes_of_one_list_in_any_order_of_use():
    """A shorter prefix after a longer one must not inherit what only the longer one holds."""
    base = [ICLNode([i], id=f"b{i}") for i in range(4)]
    long = ICLNode([8], Prefix(base, 4), id="long")
    short = ICLNode([9], Prefix(base, 2), id="short")
    longer_again = ICLNode([9], Prefix(base, 3), id="again")
    for visibility in ("parents", "ancestors"):
        visible = visible_relation(ICLGraph(long, short, longer_again), visibility)
        assert as_sets(visible)[4:] == [{0, 1, 2, 3}, {0, 1}, {0, 1, 2}]
    assert ICLGraph(short).nodes == (base[0], base[1], short)


def test_ancestors_of_a_long_chain_are_runs():
    nodes = leattn.chain([[i] for i in range(5_000)])
    visible = visible_relation(ICLGraph(nodes[-1]), "ancestors")
    assert visible.runs[-1] == ((0, 4_999),)
    assert sum(map(len, visible.runs)) == 4_999
