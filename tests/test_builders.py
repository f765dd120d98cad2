"""chain, parallel and causal."""

from __future__ import annotations

import time

import pytest
import torch

from leattn import GraphError, ICLGraph, ICLNode, causal, chain, compile_prompt, parallel
from leattn.dag.node import Prefix


def mask(*nodes: ICLNode) -> list[list[int]]:
    return compile_prompt(nodes).dense_mask().int().tolist()


def test_a_chain_sees_the_one_before():
    start = ICLNode([9])
    nodes = chain([[1], [2], [3]], parents=[start])
    assert [list(node.parents) for node in nodes] == [[start], [nodes[0]], [nodes[1]]]
    assert mask(*nodes) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_siblings_see_the_parents_alone():
    start = ICLNode([9])
    nodes = parallel([[1], [2], [3]], [start])
    assert mask(*nodes) == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    assert compile_prompt(nodes).position_ids.tolist() == [[0, 1, 1, 1]]


def test_causal_is_the_plain_prompt():
    prompt = compile_prompt(causal([[1, 2], [3], [4, 5, 6]]))
    assert torch.equal(prompt.dense_mask(), torch.ones(6, 6, dtype=torch.bool).tril())
    assert prompt.position_ids.tolist() == [list(range(6))]
    assert prompt.visible.is_causal


def test_causal_sees_its_parents_but_not_their_siblings():
    a, b = parallel([[8], [9]])
    nodes = causal([[1], [2]], [b])
    assert [list(node.parents) for node in nodes] == [[b], [b, nodes[0]]]
    assert mask(a, *nodes) == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


def test_the_returned_list_is_the_callers():
    """The shared list of parents must not grow when the caller's does."""
    nodes = causal([[1], [2]])
    last = nodes[1]
    nodes.insert(0, ICLNode([7]))
    assert len(last.parents) == 1
    assert last.parents[0] is nodes[1]


@pytest.mark.parametrize("build", [chain, parallel, causal])
def test_contents_ids_and_special_tokens(build):
    nodes = build(["text", [1, 2], torch.tensor([3])], ids=["a", None, "c"], special_tokens="text")
    assert [node.content for node in nodes] == ["text", (1, 2), (3,)]
    assert [node.id for node in nodes] == ["a", None, "c"]
    assert {node.special_tokens for node in nodes} == {"text"}
    assert build([]) == []
    assert len(build(str(i) for i in range(3))) == 3


@pytest.mark.parametrize("build", [chain, parallel, causal])
def test_errors(build):
    with pytest.raises(GraphError, match="contents is a list with one text per node, not the single text 'abc'; put it in a"):
        build("abc")
    with pytest.raises(GraphError, match="2 ids are given for 1 contents; give one per node"):
        build(["x"], ids=["a", "b"])
    with pytest.raises(GraphError, match="ids is a list with one name per node, not the single text 'a'"):
        build(["x"], ids="a")
    node = ICLNode("p", id="p")
    with pytest.raises(GraphError, match=r"write parents=\['p'\]"):
        build(["x"], parents=node)
    with pytest.raises(GraphError, match="parent 'p' is given twice"):
        build(["x"], parents=[node, node])
    with pytest.raises(GraphError, match="id 'a' is given to two nodes"):
        ICLGraph(*build(["x", "y"], ids=["a", "a"]))


def test_ten_thousand_causal_nodes():
    start = time.perf_counter()
    nodes = causal([[i % 50] for i in range(10_000)], [ICLNode([1])])
    prompt = compile_prompt(nodes)
    seconds = time.perf_counter() - start
    assert prompt.visible.runs[-1] == ((0, 10_000),)
    assert isinstance(nodes[-1].parents, Prefix)
    assert all(node.parents.base is nodes[0].parents.base for node in nodes)
    assert seconds < 5, f"{seconds:.1f} s; 0.2 s when written, minutes if each node held its own parents"
