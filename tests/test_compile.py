"""Compiled prompts: what they hold, how they are edited, and what compiling costs."""

from __future__ import annotations

import dataclasses
import tracemalloc

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import VISIBILITIES, graphs

import leattn
from leattn import GraphError, ICLGraph, ICLNode, LeattnError, compile_prompt


@given(graphs(), VISIBILITIES)
def test_tokens_stand_in_layout_order(graph, visibility):
    prompt = compile_prompt(graph, visibility=visibility)
    tokens = oracles.tokens_of(graph.nodes)
    assert prompt.input_ids[0].tolist() == [node.content[i] for node, i in tokens]
    assert prompt.node_index.tolist() == [graph.index[node] for node, _ in tokens]
    assert len(prompt) == len(tokens)
    assert list(prompt.spans) == list(graph.nodes)
    for node, (start, end) in prompt.spans.items():
        assert [token[0] for token in tokens[start:end]] == [node] * len(node.content)
        view = prompt[node]
        assert view.span == (start, end)
        assert view.input_ids.tolist() == list(node.content)
        assert view.positions.tolist() == prompt.position_ids[0, start:end].tolist()
        assert prompt[graph.name(node)].span == view.span
        assert set(prompt.sees(node)) == oracles.relation(graph.nodes, visibility)[node]


def test_nodes_nodes_and_graphs_are_the_same_target():
    a = ICLNode([1], id="a")
    b, c = ICLNode([2], [a], id="b"), ICLNode([3], [a], id="c")
    expected = compile_prompt(ICLGraph(b, c)).dense_mask().tolist()
    assert compile_prompt([b, c]).dense_mask().tolist() == expected
    assert compile_prompt(node for node in (c, b)).dense_mask().tolist() == expected
    assert len(compile_prompt(b)) == 2


@pytest.mark.parametrize(
    ("target", "words"),
    [("text", "not from 'text'"), (3, "not from 3"), (["a"], "a target is an ICLNode, not 'a'"), ([], "at least one target")],
)
def test_bad_targets(target, words):
    with pytest.raises(LeattnError, match=words):
        compile_prompt(target)


def test_a_compiled_prompt_is_not_compiled_again():
    with pytest.raises(LeattnError, match="compiled already; use it as it is"):
        compile_prompt(compile_prompt(ICLNode([1])))


def test_prompts_are_frozen():
    prompt = compile_prompt(ICLNode([1]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        prompt.input_ids = torch.zeros(1, 1)


def test_text_of_nodes(words):
    doc = ICLNode("one two", id="doc")
    prompt = compile_prompt(ICLNode("three .", [doc], id="Q"), words)
    assert prompt["Q"].text == words.decode(words("three .")["input_ids"])
    without_tokenizer = compile_prompt(ICLNode([5, 6], id="ids"))
    assert without_tokenizer["ids"].text == "[5, 6]"


# Edits


def unchanged(before, after):
    """Everything but the relation."""
    assert after.graph is before.graph
    assert after.tokenizer is before.tokenizer
    assert after.offsets == before.offsets
    assert torch.equal(after.input_ids, before.input_ids)
    assert torch.equal(after.position_ids, before.position_ids)


@given(graphs(), VISIBILITIES, st.data())
def test_without_edge_and_without_node_change_the_relation_alone(graph, visibility, data):
    prompt = compile_prompt(graph, visibility=visibility)
    sees = oracles.relation(graph.nodes, visibility)
    mask = oracles.dense(graph.nodes, sees)
    hidden = data.draw(st.sampled_from(graph.nodes))
    without = prompt.without_node(hidden if data.draw(st.booleans()) else graph.name(hidden))
    unchanged(prompt, without)
    assert without.dense_mask().tolist() == oracles.dense(graph.nodes, {n: seen - {hidden} for n, seen in sees.items()})
    # What is derived was cached on the first prompt, and must not be on the second.
    assert without.pairs == sum(map(sum, without.dense_mask().tolist()))
    assert without.columns.dense(range(len(prompt)), len(prompt))[0].tolist() == without.dense_mask().tolist()

    edges = [(node, other) for node in graph for other in sorted(sees[node], key=graph.index.__getitem__)]
    if edges:
        node, other = data.draw(st.sampled_from(edges))
        cut = prompt.without_edge(graph.name(node), other)
        unchanged(prompt, cut)
        expected = {n: seen - {other} if n is node else seen for n, seen in sees.items()}
        assert cut.dense_mask().tolist() == oracles.dense(graph.nodes, expected)
        with pytest.raises(GraphError, match="does not see"):
            cut.without_edge(node, other)
    assert prompt.dense_mask().tolist() == mask, "the prompt that was edited is as it was"


def test_edits_name_what_is_wrong():
    root = ICLNode([1], id="root")
    leaf = ICLNode([2], [root], id="leaf")
    prompt = compile_prompt(leaf)
    with pytest.raises(GraphError, match="'root' does not see 'leaf', so there is no such edge"):
        prompt.without_edge("root", "leaf")
    with pytest.raises(GraphError, match="no node is called 'nobody'; this graph has 'root', 'leaf'"):
        prompt.without_edge("leaf", "nobody")
    with pytest.raises(GraphError, match="no node is called 'nobody'"):
        prompt.without_node("nobody")
    with pytest.raises(GraphError, match="is not in this graph"):
        prompt[ICLNode([3])]


def test_an_edge_between_ancestors_can_be_cut_where_ancestors_are_seen():
    root = ICLNode([1], id="root")
    leaf = ICLNode([3], [ICLNode([2], [root], id="middle")], id="leaf")
    prompt = compile_prompt(leaf, visibility="ancestors")
    assert prompt.without_edge("leaf", "root").dense_mask().int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


# As text


def test_prompts_print_spans_positions_and_blocks():
    doc = ICLNode([1, 2], id="doc")
    other = ICLNode([3], id="other\nline")
    prompt = compile_prompt(ICLNode([4, 5], [doc], id="Q"), None)
    assert str(prompt).splitlines() == [
        "2 nodes, 4 tokens, density 1.00",
        "  0  doc  tokens 0:2  positions 0:2  ■⬚",
        "  1  Q    tokens 2:4  positions 2:4  ■■",
    ]
    assert repr(prompt) == "CompiledPrompt(2 nodes, 4 tokens, density 1.00)"
    assert all(len(line) < 80 for line in str(compile_prompt([other, doc])).splitlines())
    assert len(str(compile_prompt([other, doc])).splitlines()) == 3


def test_prompts_of_many_nodes_print_their_ends():
    text = str(compile_prompt(leattn.causal([[i] for i in range(5_000)])))
    assert len(text.splitlines()) < 60
    assert "more nodes" in text
    assert "4999" in text.splitlines()[-1]


def test_html_is_escaped(words):
    prompt = compile_prompt(ICLNode("one two", id="<script>alert(1)</script>"), words)
    html = prompt._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "one two" in html


# Cost


def test_nothing_of_size_s_times_s_is_made():
    """200 000 tokens: a boolean S × S mask would take 40 GB, a table over nodes a few megabytes."""
    root = ICLNode([1] * 20_000, id="root")
    documents = [ICLNode([2] * 1_000, [root], id=f"doc{i}") for i in range(179)]
    question = ICLNode([3] * 1_000, [root, *documents], id="Q")
    tracemalloc.start()
    try:
        prompt = compile_prompt(question)
        block_mask = prompt.block_mask()
        prompt.columns.dense(range(len(prompt) - 1, len(prompt)), len(prompt))
        assert str(prompt)
        assert prompt.without_edge("Q", "doc3").pairs == prompt.pairs - 1_000 * 1_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(prompt) == 200_000
    # Blocks of 128: 1563² of them, some bytes each. tracemalloc sees numpy's memory and lists, not torch's.
    assert peak < 400e6
    tensors = [value for value in vars(block_mask).values() if isinstance(value, torch.Tensor)]
    assert sum(value.nbytes for value in tensors) < 100e6


def test_a_causal_prompt_of_10000_nodes_is_linear():
    nodes = leattn.causal([[i] for i in range(10_000)])
    prompt = compile_prompt(nodes[-1])
    assert sum(map(len, prompt.visible.runs)) == 9_999
    assert prompt.density == 1.0
    assert prompt.position_ids[0].tolist() == list(range(10_000))
    expected = torch.arange(10_000) <= 7_000
    assert torch.equal(prompt.columns.dense(range(7_000, 7_001), 10_000)[0, 0], expected)


def test_a_continued_prompt_keeps_edits_positions_and_layout():
    a, b = ICLNode([1, 2, 3], id="a"), ICLNode([4, 5], id="b", start_pos_id=7)
    prompt = compile_prompt(ICLNode([6], [a, b], id="Q")).without_edge("Q", "a")
    longer = prompt.continued([8, 9], "answer")
    assert longer.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 8, 9]]
    assert longer.position_ids.tolist() == [[0, 1, 2, 7, 8, 9, 10, 11]]
    assert [longer.graph.name(node) for node in longer.sees("answer")] == ["b", "Q"]
    assert longer.graph.nodes[:3] == prompt.graph.nodes
    assert torch.equal(longer.dense_mask()[:6, :6], prompt.dense_mask())
    with pytest.raises(GraphError, match=r"several sinks \('a', 'b'\) has no single end to continue"):
        compile_prompt([a, b]).continued([1])
