"""Paraphrase groups against DESIGN.md section 5, read position by position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import tokenizer_of

from leattn import GraphError, ICLGraph, ICLNode, LeattnError, bos, compile_prompt, paraphrase_group, paraphrase_segments

PATTERNS = ["anchor", "shared", "isolated", "causal"]


def reference(segment: list[int], group: list[int], question: list[int], pattern: str) -> list[list[bool]]:
    """Who attends to whom, for every pair of positions of one text.

    ``segment``: a number per token that changes where a segment ends. ``group``: the paraphrase group of the token, −1 for
    context. ``question``: its index within the group.
    """
    size = len(segment)
    table = [[False] * size for _ in range(size)]
    for q in range(size):
        for k in range(q + 1):
            same = segment[q] == segment[k]
            if pattern == "causal" or group[q] == -1 or same:
                table[q][k] = True
            elif pattern == "anchor":
                table[q][k] = question[q] != 0 and question[k] == 0 and group[k] == group[q]
            elif pattern == "shared":
                table[q][k] = group[k] == -1 and group[q] not in group[:k]
            elif pattern == "isolated":
                table[q][k] = False
    return table


@st.composite
def texts(draw):
    """(group or −1, question, length) per segment: groups in any order, interleaved, with context anywhere."""
    items = draw(st.lists(st.tuples(st.integers(-1, 2), st.integers(1, 3)), min_size=1, max_size=10))
    asked: dict[int, int] = {}
    layout = []
    for group, length in items:
        index = -1 if group == -1 else asked.get(group, 0)
        asked[group] = index + 1
        layout.append((group, index, length))
    return layout


def segments_of(layout):
    segments, start = [], 0
    for group, index, length in layout:
        metadata = {"type": "context"} if group == -1 else {"type": "question", "paraphrase_idx": index, "group": group}
        segments.append({"start": start, "end": start + length, "metadata": metadata})
        start += length
    return segments, start


@pytest.mark.parametrize("pattern", PATTERNS)
@given(layout=texts(), shuffle=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=120)
def test_segments_equal_the_reference(pattern, layout, shuffle):
    segments, size = segments_of(layout)
    owner = [i for i, (_, _, length) in enumerate(layout) for _ in range(length)]
    wanted = reference(owner, [layout[i][0] for i in owner], [layout[i][1] for i in owner], pattern)
    shuffle.shuffle(segments)
    prompt = compile_prompt(paraphrase_segments(torch.arange(size)[None], segments, pattern=pattern))
    assert prompt.dense_mask().tolist() == wanted
    assert prompt.input_ids.tolist() == prompt.position_ids.tolist() == [list(range(size))]


@pytest.mark.parametrize("pattern", PATTERNS)
@given(
    contexts=st.lists(st.integers(1, 3), max_size=3),
    questions=st.lists(st.integers(1, 3), max_size=5),
    visibility=st.sampled_from(["parents", "ancestors"]),
)
@settings(deadline=None, max_examples=60)
def test_texts_equal_the_reference(pattern, contexts, questions, visibility):
    layout = [(-1, -1, n) for n in contexts] + [(0, i, n) for i, n in enumerate(questions)] + [(-1, -1, 2)]
    owner = [i for i, (_, _, length) in enumerate(layout) for _ in range(length)]
    wanted = reference(owner, [layout[i][0] for i in owner], [layout[i][1] for i in owner], pattern)
    graph = paraphrase_group([[7] * n for n in contexts], [[8] * n for n in questions], pattern=pattern, answer=[9, 9])
    prompt = compile_prompt(graph, visibility=visibility)
    assert prompt.dense_mask().tolist() == wanted
    sequential = compile_prompt(graph, visibility=visibility, positions="sequential")
    assert sequential.position_ids.tolist() == [list(range(len(owner)))]


@pytest.mark.parametrize(
    ("pattern", "seen"),
    [
        ("anchor", {"Q1": [], "Q2": ["Q1"], "Q3": ["Q1"]}),
        ("shared", {"Q1": ["context"], "Q2": ["context"], "Q3": ["context"]}),
        ("isolated", {"Q1": [], "Q2": [], "Q3": []}),
        ("causal", {"Q1": ["context"], "Q2": ["context", "Q1"], "Q3": ["context", "Q1", "Q2"]}),
    ],
)
def test_the_table_of_the_design(pattern, seen):
    graph = paraphrase_group("The sky is blue.", ["\nColour?", "\nWhich hue?", "\nWhat tint?"], pattern=pattern)
    everything = ["context", "Q1", "Q2", "Q3"]
    assert list(graph.names.values()) == [*everything, "answer"]
    parents = {graph.name(node): [graph.name(parent) for parent in graph.parents(node)] for node in graph}
    assert parents == {"context": [], **seen, "answer": everything}
    assert graph["answer"].content == "\nAnswer:"


def test_default_positions_put_questions_side_by_side():
    starts = {}
    for pattern in PATTERNS:
        prompt = compile_prompt(paraphrase_group([1, 1], [[2], [3, 3], [4]], pattern=pattern, answer=[5]))
        starts[pattern] = [int(prompt[name].positions[0]) for name in ("context", "Q1", "Q2", "Q3", "answer")]
    assert starts == {
        "anchor": [0, 0, 1, 1, 3],
        "shared": [0, 2, 2, 2, 4],
        "isolated": [0, 0, 0, 0, 2],
        "causal": [0, 2, 3, 5, 6],
    }


def test_several_contexts_and_nodes():
    tokenizer = tokenizer_of("llama3")
    start = bos(tokenizer)
    document = ICLNode("Zarvia.", [start], id="doc")
    graph = paraphrase_group([document, "First.", "Second."], ["Q?"], pattern="shared")
    assert list(graph.names.values()) == ["<|begin_of_text|>", "doc", "context 1", "context 2", "Q1", "answer"]
    names = [graph.name(parent) for parent in graph.parents("Q1")]
    assert names == ["<|begin_of_text|>", "doc", "context 1", "context 2"], "the ancestors of a node belong to the context"
    assert [graph.name(parent) for parent in graph.parents("context 2")] == ["<|begin_of_text|>", "doc", "context 1"]
    assert compile_prompt(graph, tokenizer).visible.nodes_seen(5) == [0, 1, 2, 3, 4]
    assert list(paraphrase_group(document, ["Q?"], pattern="isolated").names.values()) == [
        "<|begin_of_text|>",
        "doc",
        "Q1",
        "answer",
    ]
    assert paraphrase_group(torch.tensor([4, 5]), ["Q?"], pattern="isolated")["context"].content == (4, 5)


def test_groups_never_see_each_other_but_share_the_passages_before_them():
    layout = [(-1, -1, 1), (0, 0, 1), (0, 1, 1), (-1, -1, 1), (1, 0, 1), (1, 1, 1), (-1, -1, 1)]
    segments, size = segments_of(layout)
    prompt = compile_prompt(paraphrase_segments(range(size), segments, pattern="shared"))
    assert [prompt.visible.nodes_seen(i) for i in range(size)] == [[], [0], [0], [0, 1, 2], [0, 3], [0, 3], [0, 1, 2, 3, 4, 5]]


def question(start: int, index: object, **more: object) -> dict:
    return {"start": start, "end": start + 1, "metadata": {"type": "question", "paraphrase_idx": index, **more}}


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        (
            [question(0, 1), question(1, 0)],
            "the first question of group 0 in the text, segment tokens 0:1, has paraphrase_idx 1",
        ),
        ([question(0, 0), question(1, 1, group="b")], "the first question of group 'b' in the text, segment tokens 1:2, has"),
        ([question(0, None), question(1, 0)], "is a question with paraphrase_idx None; give 0, 1, 2"),
        ([question(0, True), question(1, 0)], "is a question with paraphrase_idx True"),
        ([question(0, -1), question(1, 0)], "is a question with paraphrase_idx -1"),
        ([question(0, 0, group=[1]), question(1, 0)], r"has the group [1]; a group is a number or a text"),
        ([question(0, 0, type="Question"), question(1, 0)], "has paraphrase_idx 0 and the type 'Question'; a question has the"),
        ([question(0, 0), {**question(1, 1), "parents": [0]}], "has parents=[0]; the pattern says who sees whom"),
        ([question(0, 0)], "tokens 1:2 of the text belong to no segment"),
    ],
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_impossible_segments(segments, words, pattern):
    with pytest.raises(GraphError) as error:
        paraphrase_segments([1, 2], segments, pattern=pattern)
    assert words in str(error.value)


def test_index_zero_is_first_in_the_text_not_in_the_list():
    graph = paraphrase_segments([1, 2, 3], [question(2, 1), question(1, 2), question(0, 0)], pattern="anchor")
    assert [list(node.parents) for node in graph] == [[], [graph.nodes[0]], [graph.nodes[0]]]


def test_other_errors():
    words = "unknown pattern 'parallel'; choose one of 'anchor', 'shared', 'isolated', 'causal'"
    with pytest.raises(LeattnError, match=words):
        paraphrase_group("c", ["q"], pattern="parallel")
    with pytest.raises(LeattnError, match=words):
        paraphrase_segments([1], [question(0, 0)], pattern="parallel")
    with pytest.raises(GraphError, match="questions is a list of texts, not the single text 'Why'; put it in a list"):
        paraphrase_group("c", "Why", pattern="anchor")
    with pytest.raises(
        GraphError, match="node 'n' stands after a text in the context; nodes exist already, so put them before"
    ):
        paraphrase_group(["c", ICLNode("n", id="n")], ["q"], pattern="anchor")
    with pytest.raises(GraphError, match="id 'Q1' is given to two nodes"):
        paraphrase_group(ICLNode("n", id="Q1"), ["q"], pattern="anchor")


def test_it_is_an_ordinary_graph():
    graph = paraphrase_group("c", ["one", "two"], pattern="anchor")
    again = ICLGraph.from_dict(graph.to_dict())
    assert again.to_dict() == graph.to_dict()


@pytest.mark.parametrize("contexts", [[], ["The sky."], ["The sky.", "The sea."]])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_node_sees_the_root(pattern, contexts):
    """The reference of the texts after it, with a column before them that everyone sees."""
    layout = [(-1, -1, 1) for _ in contexts] + [(0, i, 1) for i in range(3)] + [(-1, -1, 1)]
    owner = list(range(len(layout)))
    inner = reference(owner, [group for group, _, _ in layout], [index for _, index, _ in layout], pattern)
    wanted = [[True] + [False] * len(owner)] + [[True, *row] for row in inner]
    given = [[5 + i] for i in range(len(contexts))]
    questions = [[1], [2], [3]]
    graph = paraphrase_group(given, questions, pattern=pattern, answer=[4], root=[9])
    prompt = compile_prompt(graph)
    assert prompt.dense_mask().tolist() == wanted
    assert prompt.input_ids[0].tolist() == [9, *(i for one in [*given, *questions] for i in one), 4]
    assert next(iter(graph.names.values())) == "root"
    plain = compile_prompt(paraphrase_group(given, questions, pattern=pattern, answer=[4]))
    assert prompt.position_ids[0, 1:].tolist() == [position + 1 for position in plain.position_ids[0].tolist()]


def test_a_root_that_the_context_sees_already():
    root = ICLNode([9], id="r")
    document = ICLNode([8], [root], id="doc")
    graph = paraphrase_group([document, [7]], [[1], [2]], pattern="isolated", answer=[3], root=root)
    parents = {graph.name(node): [graph.name(parent) for parent in graph.parents(node)] for node in graph}
    assert parents == {
        "r": [],
        "doc": ["r"],
        "context": ["r", "doc"],
        "Q1": ["r"],
        "Q2": ["r"],
        "answer": ["r", "doc", "context", "Q1", "Q2"],
    }
    assert paraphrase_group(root, [[1]], pattern="isolated", root=root).parents("Q1") == (root,)
    for other in ([9], ICLNode([9], id="other")):
        with pytest.raises(GraphError, match=r"node 'r' of the context sees nothing.*build it with parents=\[root\]"):
            paraphrase_group(document, [[1]], pattern="isolated", root=other)


# The published recipe: a mask per query over one tokenized text, from the lists of its segments' positions and metadata


def recipe_mask(size, positions, metadata):
    """Its rule, token by token: 0 is no question, g the phrasing g − 1. Question 1 sees itself, others it too."""
    group = [0] * size
    for (start, end), about in zip(positions, metadata, strict=True):
        if about["type"] == "question":
            group[start:end] = [1 + about["paraphrase_idx"]] * (end - start)
    return [[k <= q and (group[q] == 0 or group[k] in (1, group[q])) for k in range(size)] for q in range(size)]


def parsed(kind, index, shot=None, shot_index=None):
    """Metadata as its parser writes them; every segment has a paraphrase_idx."""
    return {"type": kind, "paraphrase_idx": index, "few_shot_idx": shot, "fs_q_para_idx": shot_index}


POSITIONS = [(1, 3), (4, 6), (6, 7), (8, 9), (10, 12), (13, 15), (16, 17), (18, 20)]
METADATA = [
    parsed("instruction", 0),
    parsed("few_shot_q", 0, 0, 0),
    parsed("few_shot_q", 0, 0, 1),
    parsed("few_shot_a", 0, 0),
    parsed("question", 0),
    parsed("question", 1),
    parsed("question", 1),
    parsed("question", 2),
]
"""With separators between, BOS in front and the answer behind, all of which no segment covers."""


def test_the_pair_of_lists_of_the_recipe():
    given = torch.arange(22)[None], (POSITIONS, METADATA)
    prompt = compile_prompt(paraphrase_segments(*given, pattern="anchor"))
    assert prompt.dense_mask().tolist() == recipe_mask(22, POSITIONS, METADATA)
    assert prompt.position_ids.tolist() == [list(range(22))]
    causal = compile_prompt(paraphrase_segments(*given, pattern="causal"))
    assert causal.dense_mask().tolist() == torch.ones(22, 22).tril().bool().tolist()


def test_the_recipe_leaves_question_one_alone_where_its_flex_mask_left_separators_nothing():
    """The version of it for flex_attention hides everything from a token that no segment covers, and its softmax is 0/0."""
    prompt = compile_prompt(paraphrase_segments(range(22), (POSITIONS, METADATA), pattern="anchor"))
    mask = prompt.dense_mask()
    for separator in (0, 3, 7, 9, 12, 15, 17, 20, 21):
        assert mask[separator].tolist() == [k <= separator for k in range(22)]


@pytest.mark.parametrize("pattern", PATTERNS)
@given(layout=texts(), draw=st.data())
@settings(deadline=None, max_examples=60)
def test_a_question_in_several_pieces(pattern, layout, draw):
    """Each question cut at any of its tokens, with context between the pieces or not."""
    cut = []
    for group, index, length in layout:
        for _ in range(length):
            cut.append((group, index, 1))
            if group != -1 and draw.draw(st.integers(0, 4)) == 0:
                cut.append((-1, -1, 1))
    segments, size = segments_of(cut)
    table = [[False] * size for _ in range(size)]
    for q, (group, index, _) in enumerate(cut):
        opened = next(i for i, other in enumerate(cut) if other[0] == group)
        for k in range(q + 1):
            other, number, _ = cut[k]
            same = (other, number) == (group, index)
            if pattern == "causal" or group == -1:
                table[q][k] = True
            elif pattern == "anchor":
                table[q][k] = same or (other, number) == (group, 0)
            elif pattern == "shared":
                table[q][k] = same or (other == -1 and k < opened)
            else:
                table[q][k] = same
    prompt = compile_prompt(paraphrase_segments(range(size), segments, pattern=pattern))
    assert prompt.dense_mask().tolist() == table


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (([(0, 1)], []), "there are 1 positions and 0 metadata"),
        (([(0, 1, 2)], [{"type": "question"}]), "give a pair (start, end) and a mapping"),
        (([(0, 1)], ["question"]), "give a pair (start, end) and a mapping"),
        (([(0, 1)], [{"type": "question"}]), "is a question with paraphrase_idx None"),
        (([(0, 2), (1, 2)], [parsed("instruction", 0), parsed("instruction", 0)]), "overlap"),
        (([(0, 5)], [parsed("instruction", 0)]), "but the text has 2 tokens"),
    ],
)
def test_lists_that_are_not_the_recipes(given, words):
    with pytest.raises(GraphError) as error:
        paraphrase_segments([1, 2], given, pattern="anchor")
    assert words in str(error.value)
