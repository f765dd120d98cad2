"""Keys: everything that keys and values depend on changes them, nothing else does."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import SCHEMES, VISIBILITIES, graphs, node_lists

import leattn
from leattn import ICLGraph, ICLNode, LeattnError, compile_prompt
from leattn.kv.keys import node_key, prompt_keys
from leattn.prompt.positions import Place

MODEL = b"a model"


def meaning(prompt, *, shifting):
    """What each node's keys and values are a function of, written out as nested values instead of hashed."""
    values = []
    for i, (first, last) in enumerate(prompt.spans.values()):
        start = int(prompt.position_ids[0, first])
        seen = Counter(
            (values[j], int(prompt.position_ids[0, prompt.offsets[j]]) - start) for j in prompt.visible.nodes_seen(i)
        )
        ids = tuple(prompt.input_ids[0, first:last].tolist())
        values.append((ids, frozenset(seen.items()), None if shifting else start))
    return values


@given(graphs(), VISIBILITIES, SCHEMES, st.booleans())
def test_equal_keys_are_equal_meanings(graph, visibility, positions, shifting):
    prompt = compile_prompt(graph, visibility=visibility, positions=positions)
    keys, meanings = prompt_keys(prompt, MODEL, shifting=shifting), meaning(prompt, shifting=shifting)
    for i in range(len(keys)):
        for j in range(i):
            assert (keys[i] == keys[j]) == (meanings[i] == meanings[j])


@given(graphs(), VISIBILITIES, SCHEMES, st.booleans())
def test_a_prompt_gives_what_node_key_gives(graph, visibility, positions, shifting):
    prompt = compile_prompt(graph, visibility=visibility, positions=positions)
    starts = [int(prompt.position_ids[0, first]) for first in prompt.offsets[:-1]]
    expected = []
    for i, node in enumerate(graph.nodes):
        seen = [(expected[j], starts[j] - starts[i]) for j in reversed(prompt.visible.nodes_seen(i))]
        expected.append(node_key(MODEL, prompt[node].input_ids, seen, Place(starts[i]), absolute=not shifting))
    assert prompt_keys(prompt, MODEL, shifting=shifting) == expected


@given(graphs(), VISIBILITIES, st.data())
def test_another_token_changes_the_node_and_whoever_depends_on_it(graph, visibility, data):
    changed = data.draw(st.sampled_from(graph.nodes))
    copies = {}
    for node in graph.nodes:
        content = [int(token) for token in node.tokenize(None)]
        if node is changed:
            content[data.draw(st.integers(0, len(content) - 1))] += 100
        copies[node] = ICLNode(content, [copies[parent] for parent in node.parents])
    before = compile_prompt(graph, visibility=visibility)
    after = compile_prompt([copies[sink] for sink in graph.sinks], visibility=visibility)
    names = {node: i for i, node in enumerate(after.graph.nodes)}
    old, new = prompt_keys(before, MODEL, shifting=True), prompt_keys(after, MODEL, shifting=True)
    reached = {changed}
    for i, node in enumerate(graph.nodes):
        if node is changed or reached & {graph.nodes[j] for j in before.visible.nodes_seen(i)}:
            reached.add(node)
        assert (old[i] == new[names[copies[node]]]) == (node not in reached)


@given(graphs(), VISIBILITIES, st.data())
def test_a_cut_edge_changes_the_node_and_whoever_depends_on_it(graph, visibility, data):
    prompt = compile_prompt(graph, visibility=visibility)
    edges = [(i, j) for i in range(len(graph)) for j in prompt.visible.nodes_seen(i)]
    assume(edges)
    i, j = data.draw(st.sampled_from(edges))
    old = prompt_keys(prompt, MODEL, shifting=True)
    new = prompt_keys(prompt.without_edge(graph.nodes[i], graph.nodes[j]), MODEL, shifting=True)
    reached = {i}
    for n in range(len(graph)):
        if reached & set(prompt.visible.nodes_seen(n)):
            reached.add(n)
        assert (old[n] == new[n]) == (n not in reached)


def test_a_relative_position_changes_the_key():
    def keys(gap):
        a = ICLNode([1, 2], id="a")
        b = ICLNode([3], [a], start_pos_id=2 + gap)
        return prompt_keys(compile_prompt(ICLNode([4], [b], start_pos_id=9)), MODEL, shifting=True)

    near, far = keys(0), keys(1)
    assert near[0] == far[0]
    assert near[1] != far[1]
    assert near[2] != far[2]


@given(node_lists(max_nodes=5), st.randoms(use_true_random=False))
def test_another_layout_of_the_same_nodes_finds_the_same_keys(nodes, random):
    """Positions by parents do not depend on the layout, so neither do the keys."""
    prompt = compile_prompt(ICLGraph(*nodes))
    copies: dict = {}
    waiting = list(nodes)
    while waiting:
        ready = [node for node in waiting if all(parent in copies for parent in node.parents)]
        node = random.choice(ready)
        waiting.remove(node)
        parents = [copies[parent] for parent in node.parents]
        random.shuffle(parents)
        copies[node] = ICLNode([int(token) for token in node.tokenize(None)], parents)
    other = compile_prompt(ICLGraph(*copies.values()))
    key = dict(zip(prompt.graph.nodes, prompt_keys(prompt, MODEL, shifting=True), strict=True))
    other_key = dict(zip(other.graph.nodes, prompt_keys(other, MODEL, shifting=True), strict=True))
    assert all(key[node] == other_key[copies[node]] for node in nodes)


def test_two_equal_siblings_count_twice():
    def last_key(count):
        siblings = [ICLNode([1, 2]) for _ in range(count)]
        return prompt_keys(compile_prompt(ICLNode([3], siblings)), MODEL, shifting=True)[-1]

    assert last_key(1) != last_key(2) != last_key(3)


def test_another_visibility_changes_the_key_where_it_changes_what_is_seen():
    a = ICLNode([1])
    b = ICLNode([2], [a])
    c = ICLNode([3], [b])
    keys = [prompt_keys(compile_prompt(c, visibility=v), MODEL, shifting=True) for v in ("parents", "ancestors")]
    assert [x == y for x, y in zip(*keys, strict=True)] == [True, True, False]


@given(graphs(), st.integers(1, 1000), st.booleans())
def test_a_prompt_moved_as_a_whole_keeps_its_keys_only_where_keys_can_be_shifted(graph, by, shifting):
    def moved(offset):
        base = compile_prompt(graph)
        starts = [int(base.position_ids[0, first]) for first in base.offsets[:-1]]
        return compile_prompt(graph, positions=lambda *_: [start + offset for start in starts])

    keys = [prompt_keys(moved(offset), MODEL, shifting=shifting) for offset in (0, by)]
    assert all((x == y) == shifting for x, y in zip(*keys, strict=True))


def test_another_model_changes_every_key():
    prompt = compile_prompt(ICLNode([2], [ICLNode([1])]))
    a, b = (set(prompt_keys(prompt, model, shifting=True)) for model in (b"one", b"other"))
    assert not a & b


def test_a_thousand_nodes_that_see_all_before_take_no_time():
    prompt = compile_prompt(leattn.causal([[i % 7, i % 5] for i in range(1000)]))
    begin = time.perf_counter()
    assert len(set(prompt_keys(prompt, MODEL, shifting=True))) == 1000
    assert time.perf_counter() - begin < 2


def test_a_key_of_another_length_is_refused():
    with pytest.raises(LeattnError, match="a key has 32 bytes, but one of the seen nodes came with 3"):
        node_key(MODEL, [1], [(b"abc", -1)], Place(0), absolute=False)


def test_how_far_tokens_stand_apart_changes_the_key_and_where_they_stand_does_not():
    def keys(places, shifting):
        doc = ICLNode([1, 2, 3], id="doc")
        prompt = compile_prompt(ICLNode([4], [doc], id="Q"), positions=lambda *_: places)
        return prompt_keys(prompt, MODEL, shifting=shifting)

    by_one, wide = [[0, 1, 2], 3], [[0, 1.5, 3], 4.5]
    assert keys(by_one, True) == keys([0, 3], True) == keys([10.25, 13.25], True)
    assert not set(keys(by_one, True)) & set(keys(wide, True))
    assert keys(wide, True) == keys([[7.5, 9, 10.5], 12], True)
    assert not set(keys(wide, True)) & set(keys([[0, 1.25, 3], 4.5], True))
    assert not set(keys(wide, False)) & set(keys([[7.5, 9, 10.5], 12], False))
    assert keys([[0, 1.5, 3], 4.5], True)[0] == keys([[0, 1.5, 3], 5], True)[0]
    assert keys([[0, 1.5, 3], 4.5], True)[1] != keys([[0, 1.5, 3], 5], True)[1]
