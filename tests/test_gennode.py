"""GenNode: what it takes and refuses, and graphs with such nodes: order, names, exchange, drawings, refusals."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import sys

import networkx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from strategies import node_lists

import leattn
from leattn import CompileError, GenNode, GraphError, ICLGraph, ICLNode, cli, compile_prompt
from leattn.dag.gennode import mark


def described(graph):
    """What a round trip has to keep."""
    return [
        (
            type(node),
            graph.name(node),
            node.content,
            [graph.name(parent) for parent in graph.parents(node)],
            (node.start_pos_id, node.end_pos_id, node.special_tokens),
            (node.max_new_tokens, node.stop, dict(node.sampling)) if isinstance(node, GenNode) else None,
        )
        for node in graph
    ]


PLAIN = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=3)
OPTIONS = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 500)},
    optional={
        "stop": st.text(min_size=1, max_size=4) | st.lists(st.text(min_size=1, max_size=4), max_size=3),
        "temperature": st.floats(0.1, 9),
        "do_sample": st.booleans(),
        "top_k": st.integers(1, 99),
        "bad_words_ids": st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=2), min_size=1, max_size=2),
        "anything": st.recursive(PLAIN, lambda one: st.lists(one, max_size=2) | st.dictionaries(st.text(max_size=2), one)),
    },
)


@st.composite
def programs(draw):
    """A graph in which some nodes are written by the model."""
    made = {}
    for node in draw(node_lists()):
        parents = [made[parent] for parent in node.parents]
        if draw(st.booleans()):
            pin = draw(st.sampled_from([None, 0, 7]))
            treatment = draw(st.sampled_from(["parse", "text"]))
            options = draw(OPTIONS)
            made[node] = GenNode(node.content, parents, node.id, start_pos_id=pin, special_tokens=treatment, **options)
        else:
            made[node] = ICLNode(node.content, parents, node.id)
    return ICLGraph(*draw(st.lists(st.sampled_from(list(made.values())), min_size=1, unique=True)))


@pytest.fixture
def graph():
    question = ICLNode("Q: Why?", id="question")
    drafts = [GenNode("\nA:", [question], f"draft {i}", max_new_tokens=32, stop="\n", top_p=0.9) for i in (1, 2)]
    vote = ICLNode("\nBest:", [question, *drafts], id="vote")
    return ICLGraph(GenNode([5, 6], [vote, *drafts], "answer", max_new_tokens=1, start_pos_id=90))


def test_its_fields():
    parent = ICLNode("p")
    node = GenNode("A:", [parent], "a", max_new_tokens=4, stop=["\n", "."], start_pos_id=3, special_tokens="text", top_k=5)
    assert isinstance(node, ICLNode)
    assert (node.content, node.parents, node.id) == ("A:", (parent,), "a")
    assert (node.start_pos_id, node.end_pos_id, node.special_tokens) == (3, None, "text")
    assert (node.max_new_tokens, node.stop, node.sampling) == (4, ("\n", "."), {"top_k": 5})
    assert GenNode("A:", max_new_tokens=1, stop="end").stop == ("end",)
    assert GenNode("A:", max_new_tokens=1, stop=[]).stop == GenNode("A:", max_new_tokens=1).stop == ()
    assert GenNode([1, 2], max_new_tokens=1).tokenize().tolist() == [1, 2]


def test_it_is_frozen():
    words = [[1]]
    node = GenNode("A:", max_new_tokens=4, stop=".", bad_words_ids=words)
    for name in ("content", "max_new_tokens", "stop", "sampling"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(node, name, None)
    with pytest.raises(TypeError):
        node.sampling["top_k"] = 3
    words.append([2])
    assert node.sampling["bad_words_ids"] == [[1]]


def test_it_is_compared_by_identity():
    assert GenNode("A:", max_new_tokens=4) != GenNode("A:", max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "node 'A' has max_new_tokens=0; give a whole number from 1 up"),
        ({"max_new_tokens": -3}, "max_new_tokens=-3; give a whole number from 1 up"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0; give a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens=True; give a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens=None; give a whole number"),
        ({"stop": ""}, "node 'A' has an empty stop string, which would end it at once; leave it out"),
        ({"stop": ["x", ""]}, "node 'A' has an empty stop string"),
        ({"stop": [3]}, "node 'A' has the stop string 3; give text, or a list of texts"),
        ({"stop": 3}, "node 'A' has the stop string 3; give text, or a list of texts"),
        ({"end_pos_id": 9}, "node 'A' has end_pos_id=9, but how long the node becomes is not known .* pin its start"),
        ({"num_beams": 4}, "node 'A' has num_beams=4, but a node is one sequence; search with beams is for graphs of ICLNodes"),
        ({"num_return_sequences": 2}, "num_return_sequences=2, but a node is one sequence; make one GenNode per sequence"),
        ({"max_length": 9}, "max_length=9, but the limit of a node counts what the model writes; use max_new_tokens"),
        ({"min_length": 9}, "min_length=9, but .*; use min_new_tokens"),
        ({"stop_strings": ["."]}, r"node 'A' has stop_strings=\['\.'\], but a node has its own field for them; use stop"),
        ({"seed": 1}, "seed=1, but seeds belong to a run; give leattn.generate the seed"),
        ({"sequence_bias": {(1,): 2.0}}, "the option sequence_bias of a GenNode is .*, a dict; give numbers, text, or lists"),
        ({"top_k": object()}, "the option top_k of a GenNode is <object .*, a object; give numbers"),
        ({"start_pos_id": -1}, "start_pos_id=-1; positions start at 0"),
    ],
)
def test_what_it_refuses(options, words):
    with pytest.raises(CompileError, match=words):
        GenNode("text", id="A", **{"max_new_tokens": 4, **options})


def test_a_header_and_a_limit_are_needed():
    with pytest.raises(CompileError, match="node '' has no content; give it text or token ids"):
        GenNode("", max_new_tokens=3)
    with pytest.raises(TypeError, match="max_new_tokens"):
        GenNode("text")


def test_repr_says_it_all():
    node = GenNode("x" * 99, [ICLNode("p", id="p")], "a", max_new_tokens=4, stop="\n", top_k=5)
    assert repr(node).startswith("GenNode('xxxx")
    assert repr(node).endswith(r"...., parents=['p'], id='a', max_new_tokens=4, stop=('\n',), top_k=5)".replace("....", "..."))
    assert repr(GenNode("x", max_new_tokens=4)) == "GenNode('x', parents=[], id=None, max_new_tokens=4)"


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda node: pickle.loads(pickle.dumps(node))])
def test_copies_keep_everything(again):
    node = GenNode("A:", [ICLNode("p", id="p")], "a", max_new_tokens=4, stop="\n", bad_words_ids=[[1]])
    other = again(node)
    assert other is not node
    assert described(ICLGraph(other)) == described(ICLGraph(node))
    with pytest.raises(TypeError):
        other.sampling["top_k"] = 3


def test_graphs_hold_them_like_any_node(graph):
    assert [graph.name(node) for node in graph] == ["question", "draft 1", "draft 2", "vote", "answer"]
    assert [graph.name(node) for node in graph.parents("answer")] == ["draft 1", "draft 2", "vote"]
    assert [graph.name(node) for node in graph.children("draft 1")] == ["vote", "answer"]
    assert len(graph.ancestors("answer")) == 4
    assert graph.sinks == (graph["answer"],)
    unnamed = ICLGraph(*(GenNode("A simple fact", max_new_tokens=2) for _ in range(2)))
    assert list(unnamed.names.values()) == ["A simple f", "A simple f #2"]


def test_builders_take_them_as_parents(graph):
    draft = graph["draft 1"]
    assert leattn.chain(["a", "b"], parents=[draft])[0].parents == (draft,)
    assert leattn.parallel(["a", "b"], [draft])[1].parents == (draft,)
    assert leattn.causal(["a", "b"], [draft])[1].parents[0] is draft


@given(programs())
def test_dict_round_trip(graph):
    again = ICLGraph.from_dict(graph.to_dict())
    assert described(again) == described(graph)
    assert again.to_dict() == graph.to_dict()


@given(programs())
def test_networkx_round_trip(graph):
    assert described(ICLGraph.from_networkx(graph.to_networkx())) == described(graph)


@given(programs())
def test_dicts_are_json_and_yaml(graph):
    data = graph.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert yaml.safe_load(yaml.safe_dump(data)) == data


@given(programs())
def test_drawings_mark_every_node_that_the_model_writes(graph):
    written = [node for node in graph if isinstance(node, GenNode)]
    assert (f"{len(written)} written by the model" in repr(graph)) == bool(written)
    drawn = str(graph)
    assert all(mark(node) in drawn for node in written)
    assert ("✎" in drawn) == bool(written)


@pytest.mark.parametrize("name", ["program.json", "program.yaml"])
def test_file_round_trip(graph, tmp_path, name):
    graph.to_file(tmp_path / name)
    assert described(ICLGraph.from_file(tmp_path / name)) == described(graph)


def test_fields_say_only_what_is_there(graph):
    first, draft, *_ = graph.to_dict()["nodes"]
    assert first == {"id": "question", "parents": [], "content": "Q: Why?"}
    options = {"max_new_tokens": 32, "stop": ["\n"], "sampling": {"top_p": 0.9}}
    assert draft == {"id": "draft 1", "parents": ["question"], "content": "\nA:", **options}
    assert "stop" not in graph.to_dict()["nodes"][-1]


def test_changing_exported_data_changes_no_node():
    node = GenNode("a", max_new_tokens=1, bad_words_ids=[[1]])
    ICLGraph(node).to_dict()["nodes"][0]["sampling"]["bad_words_ids"].append([2])
    assert node.sampling["bad_words_ids"] == [[1]]


def test_a_file_by_hand(tmp_path):
    path = tmp_path / "program.yaml"
    path.write_text("nodes:\n- {id: Q, content: 'Why?'}\n- {content: 'A:', parents: [Q], max_new_tokens: 8, stop: x}\n")
    graph = ICLGraph.from_file(path)
    assert str(graph) == "└── A: ✎ ≤ 8 tokens\n    └── Q"
    assert graph["A:"].stop == ("x",)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"stop": "x"},
            "node 'A' has 'stop', which is for nodes that the model writes; give it 'max_new_tokens', or remove it",
        ),
        ({"sampling": {}}, "node 'A' has 'sampling', which is for nodes that the model writes"),
        ({"max_new_tokens": 0}, "node 'A' has max_new_tokens=0; give a whole number from 1 up"),
        ({"max_new_tokens": "8"}, "node 'A' has max_new_tokens='8'; give a whole number from 1 up"),
        ({"max_new_tokens": 8, "end_pos_id": 9}, "node 'A' has end_pos_id=9, but how long"),
        ({"max_new_tokens": 8, "sampling": [1]}, r"'sampling' of node 'A' is a mapping of names, .*, not \[1\]"),
        ({"max_new_tokens": 8, "sampling": {1: 2}}, "'sampling' of node 'A' is a mapping of names"),
        (
            {"max_new_tokens": 8, "sampling": {"stop": "x"}},
            "'stop' of node 'A' is a field of the node; move it out of 'sampling'",
        ),
        ({"max_new_tokens": 8, "sampling": {"num_beams": 2}}, "node 'A' has num_beams=2, but a node is one sequence"),
        ({"max_new_token": 8}, "unknown field 'max_new_token'; known are id, .*, max_new_tokens, stop, sampling"),
    ],
)
def test_bad_fields(fields, words):
    with pytest.raises((GraphError, CompileError), match=words):
        ICLGraph.from_dict({"nodes": [{"id": "A", "content": "a", **fields}]})


def test_networkx_attributes_make_one():
    plain = networkx.DiGraph()
    plain.add_node(1, content="a", max_new_tokens=3, stop=("x", "y"), sampling={"top_k": 2})
    (node,) = ICLGraph.from_networkx(plain)
    assert (node.max_new_tokens, node.stop, node.sampling) == (3, ("x", "y"), {"top_k": 2})


REFUSAL = (
    r"node 'draft 1' is written by the model, so its tokens are not known yet; "
    r"use leattn\.generate\(model, graph, tokenizer\), and compile the result's \.realised where a prompt is needed"
)


def test_what_needs_a_prompt_points_to_generate(graph, words):
    for call in (
        lambda: compile_prompt(graph, words),
        lambda: compile_prompt(graph["draft 1"], words),
        lambda: compile_prompt([graph["vote"]], words),
        lambda: leattn.viz.plot_mask(compile_prompt(graph, words)),
        lambda: leattn.build_attention_matrix(list(graph), words),
    ):
        with pytest.raises(CompileError, match=REFUSAL):
            call()


@pytest.mark.parametrize("count", [1, 70])
def test_pictures_tell_them_apart(count):
    question = ICLNode("Q", id="question")
    drafts = [GenNode("A", [question], f"draft {i}", max_new_tokens=32) for i in range(count)]
    ax = leattn.viz.plot_dag(ICLNode("vote", drafts, id="vote"))
    boxes = [patch for patch in ax.patches if type(patch).__name__ == "Rectangle"]
    if boxes:
        dashed = [box.get_linestyle() != "solid" for box in boxes]
    else:
        styles = next(one for one in ax.collections if len(one.get_facecolors()) == count + 2).get_linestyles()
        dashed = [dashes is not None for _, dashes in styles]
    assert dashed == [False, *[True] * count, False]
    assert f"; dashed: written by the model ({count})" in ax.get_title(loc="left")
    labels = {text.get_text() for text in ax.texts}
    assert {"question", "vote", "draft 0 ✎ ≤ 32 tokens" if count == 1 else "draft 0 ✎"} <= labels
    assert "dashed" not in leattn.viz.plot_dag(question).get_title(loc="left")


def test_the_command_line_draws_program_files_and_says_what_writes_them(graph, tmp_path, monkeypatch, capsys):
    graph.to_file(tmp_path / "program.yaml")
    monkeypatch.chdir(tmp_path)
    for arguments, status in ((["-o", "dag.png", "--kind", "dag"], 0), (["-o", "mask.png", "--tokenizer", "tiny"], 1)):
        monkeypatch.setattr(sys, "argv", ["leattn", "render", "program.yaml", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert (left.value.code or 0) == status
    assert (tmp_path / "dag.png").read_bytes().startswith(b"\x89PNG")
    assert re.match(f"leattn: {REFUSAL}", capsys.readouterr().err)
