"""chain, parallel and causal."""

from __future__ import annotations

import time

import pytest
import torch
from templates import tokenizer_of

from leattn import CompileError, GraphError, ICLGraph, ICLNode, bos, causal, chain, compile_prompt, parallel
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


class TestRoot:
    """Against the same graph with every parent written out."""

    @staticmethod
    def same(nodes, by_hand):
        found, wanted = compile_prompt(nodes), compile_prompt(by_hand)
        assert found.input_ids.tolist() == wanted.input_ids.tolist()
        assert found.position_ids.tolist() == wanted.position_ids.tolist()
        assert found.dense_mask().tolist() == wanted.dense_mask().tolist()

    def test_every_node_of_a_chain_sees_it(self):
        r, a, b = ICLNode([9, 8]), [1], [2]
        one = ICLNode(a, [r])
        two = ICLNode(b, [r, one])
        nodes = chain([a, b, [3]], root=[9, 8])
        self.same(nodes, [two, ICLNode([3], [r, two])])
        assert len(nodes) == 3
        assert nodes[0].parents[0].id == "root"

    def test_siblings_and_their_question(self):
        r = ICLNode([9])
        by_hand = [ICLNode([1, 2], [r]), ICLNode([3], [r])]
        root = ICLNode([9], id="first")
        nodes = parallel([[1, 2], [3]], root=root)
        assert all(list(node.parents) == [root] for node in nodes)
        self.same(ICLNode([4], [root, *nodes]), ICLNode([4], [r, *by_hand]))

    def test_a_causal_sequence_goes_on_from_it(self):
        prompt = compile_prompt(causal([[1, 2], [3]], root=[9]))
        assert prompt.input_ids.tolist() == [[9, 1, 2, 3]]
        assert torch.equal(prompt.dense_mask(), torch.ones(4, 4, dtype=torch.bool).tril())
        assert isinstance(causal([[1], [2]], root=[9])[1].parents, Prefix)

    @pytest.mark.parametrize("build", [chain, parallel, causal])
    def test_what_sees_something_already_does_not_see_it(self, build):
        start = ICLNode([9])
        assert mask(*build([[1], [2]], parents=[start], root=[5])) == mask(*build([[1], [2]], parents=[start]))
        assert build([], root=[5]) == []

    @pytest.mark.parametrize("build", [chain, parallel, causal])
    def test_the_bos_of_a_tokenizer(self, build):
        tokenizer = tokenizer_of("llama3")
        begin = bos(tokenizer)
        for root in (begin, "<|begin_of_text|>", [tokenizer.bos_token_id]):
            ids = compile_prompt(build(["Hello"], root=root), tokenizer).input_ids[0].tolist()
            assert ids == tokenizer("<|begin_of_text|>Hello", add_special_tokens=False)["input_ids"]
        assert build(["Hello"], root=begin)[0].parents[0] is begin

    @pytest.mark.parametrize("build", [chain, parallel, causal])
    def test_what_is_no_root(self, build):
        with pytest.raises(
            GraphError, match=r"root='bos' needs a tokenizer.*give leattn\.bos\(tokenizer\), or what the token is"
        ):
            build(["x"], root="bos")
        with pytest.raises(GraphError, match="the root 'b' sees 'a', and a root sees nothing; give the first node itself"):
            build(["x"], root=ICLNode("b", [ICLNode("a", id="a")], id="b"))
        with pytest.raises(CompileError, match=r"node 'root' has no content"):
            build(["x"], root="")
