"""A graph from one tokenized text and its segments."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leattn import GraphError, compile_prompt, from_segments
from leattn.dag.segments import Segment

IDS = [50, 51, 52, 53, 54, 55]


def spans(*bounds: int) -> list[dict]:
    return [{"start": a, "end": b} for a, b in pairwise(bounds)]


def test_causal_segments_equal_the_plain_text():
    segments = [{**one, "parents": range(i)} for i, one in enumerate(spans(0, 2, 3, 6))]
    prompt = compile_prompt(from_segments(IDS, segments))
    assert torch.equal(prompt.dense_mask(), torch.ones(6, 6, dtype=torch.bool).tril())
    assert prompt.position_ids.tolist() == [list(range(6))]
    assert prompt.input_ids.tolist() == [IDS]
    assert prompt.visible.is_causal


@pytest.mark.parametrize(
    "input_ids",
    [IDS, tuple(IDS), [IDS], torch.tensor(IDS), torch.tensor([IDS]), torch.tensor(IDS, dtype=torch.int32), np.array([IDS])],
    ids=["list", "tuple", "nested", "tensor", "batch of one", "int32", "numpy"],
)
def test_forms_of_input_ids(input_ids):
    graph = from_segments(input_ids, spans(0, 2, 6))
    assert [node.content for node in graph] == [(50, 51), (52, 53, 54, 55)]
    assert [node.start_pos_id for node in graph] == [0, 2]


@st.composite
def layouts(draw):
    """A text, its segments in some order with some edges, and the edges by place in the text."""
    lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=7))
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    edges = [sorted(draw(st.sets(st.integers(0, i - 1)))) if i else [] for i in range(len(lengths))]
    order = draw(st.permutations(range(len(lengths))))
    by_id = draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    segments = [
        Segment(
            bounds[i],
            bounds[i + 1],
            f"s{i}",
            [f"s{j}" if by_id[j] else order.index(j) for j in edges[i]],
        )
        for i in order
    ]
    return lengths, edges, segments


@given(layouts())
@settings(deadline=None, max_examples=150)
def test_random_segments_in_any_order(layout):
    lengths, edges, segments = layout
    owner = [i for i, length in enumerate(lengths) for _ in range(length)]
    size = len(owner)
    prompt = compile_prompt(from_segments(list(range(100, 100 + size)), segments))
    wanted = [[k <= q and (owner[k] == owner[q] or owner[k] in edges[owner[q]]) for k in range(size)] for q in range(size)]
    assert prompt.dense_mask().tolist() == wanted
    assert prompt.input_ids[0].tolist() == list(range(100, 100 + size))
    assert prompt.position_ids[0].tolist() == list(range(size))


def test_ids_name_the_nodes_and_pins_hold_under_every_scheme():
    graph = from_segments(IDS, [{"start": 0, "end": 3, "id": "a"}, {"start": 3, "end": 6, "id": "b", "metadata": {"x": 1}}])
    assert list(graph.names.values()) == ["a", "b"]
    for positions in ("after_parents", "sequential", "restart"):
        assert compile_prompt(graph, positions=positions).position_ids.tolist() == [list(range(6))]


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ([], "there are no segments; give at least one"),
        (spans(0, 3), "tokens 3:6 of the text belong to no segment; add one for them"),
        (spans(1, 6), "tokens 0:1 of the text belong to no segment"),
        ([*spans(0, 2), *spans(4, 6)], "tokens 2:4 of the text belong to no segment"),
        (spans(0, 3, 7), "segment 1 is tokens 3:7, but the text has 6 tokens; keep 0 <= start < end <= 6"),
        (spans(-1, 6), "segment 0 is tokens -1:6, but the text has 6 tokens"),
        (spans(0, 3, 3, 6), "segment 1 is empty, tokens 3:3; remove or extend it"),
        ([*spans(0, 4), *spans(3, 6)], "segment 0, tokens 0:4, and segment 1, tokens 3:6, overlap; a token belongs to one"),
        ([*spans(0, 6), *spans(1, 2)], "segment 0, tokens 0:6, and segment 1, tokens 1:2, overlap"),
        ([{"start": 0}], "segment 0 is {'start': 0}; give a Segment or a mapping with 'start' and 'end'"),
        ([{"start": 0, "end": 6, "name": "x"}], "segment 0 has an unknown key 'name'; known are start, end, id, parents"),
        ([{"start": 0, "end": 6.0}], "segment 0 has end 6.0; give a whole number"),
        ([{"start": False, "end": 6}], "segment 0 has start False; give a whole number"),
        ([{"start": 0, "end": 6, "id": 3}], "segment 0 has the id 3; an id is a string"),
        ([{"start": 0, "end": 6, "metadata": "q"}], "segment 0 has the metadata 'q'; metadata is a mapping"),
        ([{**one, "id": "a"} for one in spans(0, 3, 6)], "id 'a' is given to segments 0 and 1; ids are unique"),
    ],
)
def test_impossible_segments(segments, words):
    with pytest.raises(GraphError) as error:
        from_segments(IDS, segments)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("parents", "words"),
    [
        (["c"], "segment 'b', which starts at token 2, names as parent the later segment 'c', which starts at 4; a segment"),
        ([2], "names as parent the later segment 'c'"),
        (["b"], "segment 'b', which starts at token 2, names as parent itself"),
        (["x"], "segment 'b' names the parent 'x', which does not exist; there are indices 0 to 2 and the ids 'a', 'b', 'c'"),
        ([3], "names the parent 3, which does not exist"),
        ([-1], "names the parent -1, which does not exist"),
        (range(2), "names as parent itself"),
        (["a", 0], "names a parent twice in ['a', 0]; name each once"),
        ("a", "segment 1 has parents='a'; give a list of ids and indices"),
        ([1.5], "segment 1 has parent 1.5; give an id (text) or an index (a whole number)"),
    ],
)
def test_impossible_parents(parents, words):
    segments = [{**one, "id": name} for one, name in zip(spans(0, 2, 4, 6), "abc", strict=True)]
    segments[1]["parents"] = parents
    with pytest.raises(GraphError) as error:
        from_segments(IDS, segments)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("input_ids", "words"),
    [
        ([], "input_ids is empty"),
        (torch.zeros(2, 6, dtype=torch.long), "shape [2, 6]; give one text, [S] or [1, S]"),
        (torch.tensor([1.0]), "dtype torch.float32; give whole numbers"),
        (torch.tensor([True]), "dtype torch.bool"),
        ("some text", "input_ids is a tensor or a list of token ids, not 'some text'; tokenize first"),
    ],
)
def test_impossible_input_ids(input_ids, words):
    with pytest.raises(GraphError) as error:
        from_segments(input_ids, spans(0, 6))
    assert words in str(error.value)


def test_ten_thousand_causal_segments():
    start = time.perf_counter()
    segments = [{"start": i, "end": i + 1, "parents": range(i)} for i in range(10_000)]
    prompt = compile_prompt(from_segments(torch.arange(10_000), segments))
    assert prompt.visible.is_causal
    assert time.perf_counter() - start < 5
