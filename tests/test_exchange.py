"""Graphs as dicts, files and networkx graphs: there and back, and what may be wrong with them."""

from __future__ import annotations

import json

import networkx
import pytest
import yaml
from hypothesis import given
from strategies import graphs

from leattn import CompileError, GraphError, ICLGraph, ICLNode, compile_prompt
from leattn.dag import exchange


def described(graph):
    """What a round trip has to keep."""
    return [
        (
            graph.name(node),
            node.content,
            [graph.name(parent) for parent in graph.parents(node)],
            node.start_pos_id,
            node.end_pos_id,
            node.special_tokens,
        )
        for node in graph
    ]


@pytest.fixture
def graph():
    root = ICLNode('tabs\t, "quotes", 日本語 and a # : - \n line', id="root")
    pinned = ICLNode([5, 6, 7], [root], start_pos_id=3)
    text = ICLNode("yes", [root], id="1", special_tokens="text", end_pos_id=8)
    return ICLGraph(ICLNode("no", [text, pinned, root], id="null"))


@given(graphs())
def test_dict_round_trip(graph):
    again = ICLGraph.from_dict(graph.to_dict())
    assert described(again) == described(graph)
    assert again.to_dict() == graph.to_dict()


@given(graphs())
def test_networkx_round_trip(graph):
    exported = graph.to_networkx()
    assert set(exported.edges) == {(graph.name(parent), graph.name(node)) for node in graph for parent in node.parents}
    assert described(ICLGraph.from_networkx(exported)) == described(graph)


@given(graphs())
def test_dicts_are_json_and_yaml(graph):
    data = graph.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert yaml.safe_load(yaml.safe_dump(data)) == data


@pytest.mark.parametrize("name", ["prompt.json", "prompt.yaml", "prompt.yml"])
def test_file_round_trip(graph, tmp_path, name):
    path = tmp_path / name
    graph.to_file(path)
    assert described(ICLGraph.from_file(path)) == described(graph)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    if name.endswith(".json"):
        json.loads(path.read_text(encoding="utf-8"))


def test_round_trips_keep_the_prompt(graph, words):
    graph = ICLGraph(ICLNode("one two", [ICLNode("three", id="a"), ICLNode([1, 2])]))
    prompt = compile_prompt(graph, words)
    again = compile_prompt(ICLGraph.from_dict(graph.to_dict()), words)
    assert again.input_ids.tolist() == prompt.input_ids.tolist()
    assert again.position_ids.tolist() == prompt.position_ids.tolist()
    assert again.dense_mask().tolist() == prompt.dense_mask().tolist()


def test_records_may_come_in_any_order_and_ties_follow_the_file():
    data = {
        "nodes": [
            {"id": "Q", "content": "q", "parents": ["B", "A"]},
            {"id": "B", "content": "b"},
            {"id": "A", "content": "a", "parents": None},
            {"content": "unnamed"},
        ]
    }
    graph = ICLGraph.from_dict(data)
    assert [graph.name(node) for node in graph] == ["B", "A", "Q", "unnamed"]
    assert graph["unnamed"].id is None


def test_numbers_as_ids_are_names():
    graph = ICLGraph.from_dict({"nodes": [{"id": 1, "content": "a"}, {"id": 2, "content": "b", "parents": [1]}]})
    assert graph.parents("2") == (graph["1"],)


def test_a_minimal_file(tmp_path):
    path = tmp_path / "prompt.yaml"
    path.write_text("nodes:\n- {id: X, content: example1.}\n- {id: Q, content: 'What?', parents: [X]}\n")
    assert str(ICLGraph.from_file(path)) == "└── Q\n    └── X"


CYCLE = {
    "nodes": [
        {"id": "A", "content": "a", "parents": ["C"]},
        {"id": "B", "content": "b", "parents": ["A"]},
        {"id": "C", "content": "c", "parents": ["B", "root"]},
        {"id": "D", "content": "d", "parents": ["C"]},
        {"id": "root", "content": "r"},
    ]
}


def test_a_cycle_is_printed():
    with pytest.raises(GraphError, match=r"^the graph has a cycle: A → B → C → A$"):
        ICLGraph.from_dict(CYCLE)


def test_a_cycle_in_networkx_is_printed():
    graph = networkx.DiGraph([("A", "B"), ("B", "C"), ("C", "A"), ("C", "D")])
    networkx.set_node_attributes(graph, "text", "content")
    with pytest.raises(GraphError, match=r"^the graph has a cycle: A → B → C → A$"):
        ICLGraph.from_networkx(graph)


def test_a_node_that_waits_for_a_cycle_is_not_called_part_of_it():
    data = {"nodes": [{"id": "A", "content": "a", "parents": ["Z"]}, {"id": "Z", "content": "z", "parents": ["Z"]}]}
    with pytest.raises(GraphError, match=r"the graph has a cycle: Z → Z$"):
        ICLGraph.from_dict(data)


def test_a_long_cycle_does_not_recurse():
    count = 3_000
    nodes = [{"id": f"n{i}", "content": "x", "parents": [f"n{(i + 1) % count}"]} for i in range(count)]
    with pytest.raises(GraphError, match="the graph has a cycle: n"):
        ICLGraph.from_dict({"nodes": nodes})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "a prompt is a mapping with a list 'nodes'"),
        (None, "a prompt is a mapping with a list 'nodes'"),
        ({"nodes": "text"}, "a prompt is a mapping with a list 'nodes'"),
        ({"nodes": [], "edges": []}, "unknown field 'edges' beside 'nodes'"),
        ({"nodes": []}, "at least one target"),
        ({"nodes": [{"id": "A"}]}, "node number 0 has no 'content'"),
        ({"nodes": ["A"]}, "node number 0 has no 'content': 'A'"),
        ({"nodes": [{"content": "a", "parent": []}]}, "unknown field 'parent'; known are id, content, parents"),
        (
            {"nodes": [{"id": "A", "content": "a", "parents": ["B"]}]},
            "node 'A' names the parent 'B', which is not in the graph",
        ),
        ({"nodes": [{"id": "A", "content": "a"}, {"id": "A", "content": "b"}]}, "id 'A' is given to two nodes; ids are unique"),
        ({"nodes": [{"id": "A", "content": "a", "parents": "B"}]}, "'parents' of node 'A' is a list of ids, not 'B'"),
        (
            {"nodes": [{"id": "A", "content": "a"}, {"id": "B", "content": "b", "parents": ["A", "A"]}]},
            "parent 'A' is given twice",
        ),
    ],
)
def test_bad_data(data, words):
    with pytest.raises(GraphError, match=words):
        ICLGraph.from_dict(data)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"content": ""}, "node 'A' has no content"),
        ({"content": "a", "start_pos_id": 1, "end_pos_id": 5}, "both start_pos_id=1 and end_pos_id=5"),
        ({"content": "a", "start_pos_id": -4}, "start_pos_id=-4; positions start at 0"),
        ({"content": "a", "start_pos_id": "3"}, "start_pos_id='3'; give a number"),
        ({"content": {"a": 1}}, "the content of a node is text or token ids"),
        ({"content": 5}, "the content of a node is text or token ids, not 5"),
    ],
)
def test_bad_nodes_in_data(fields, words):
    with pytest.raises(CompileError, match=words):
        ICLGraph.from_dict({"nodes": [{"id": "A", **fields}]})


def test_bad_networkx_graphs():
    undirected = networkx.Graph([("A", "B")])
    with pytest.raises(GraphError, match=r"a prompt is a networkx\.DiGraph, not a Graph"):
        ICLGraph.from_networkx(undirected)
    with pytest.raises(GraphError, match="not a MultiDiGraph"):
        ICLGraph.from_networkx(networkx.MultiDiGraph([("A", "B")]))
    with pytest.raises(GraphError, match="node 'A' of the networkx graph has no attribute 'content'"):
        ICLGraph.from_networkx(networkx.DiGraph([("A", "B")]))


@pytest.mark.parametrize("key", [1, ("a", 1), "name"])
def test_any_networkx_key_becomes_a_name(key):
    graph = networkx.DiGraph()
    graph.add_node(key, content="text", start_pos_id=2)
    (node,) = ICLGraph.from_networkx(graph)
    assert (node.id, node.start_pos_id) == (str(key), 2)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{"),
        ("a.yaml", "nodes: [}"),
        ("a.yaml", "!!python/object/apply:os.system ['true']"),
        ("a.json", "[1, 2]"),
        ("a.yaml", ""),
        ("a.yaml", "nodes: [{id: A, content: a, parents: [B]}]"),
        ("a.yaml", "nodes: [{id: A, content: a, start_pos_id: -1}]"),
        ("a.yaml", "nodes: [{1: a, b: c, content: a}]"),
        ("a.yaml", "{1: a, b: c, nodes: [{content: a}]}"),
    ],
)
def test_errors_in_files_name_the_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.(json|yaml)") as caught:
        ICLGraph.from_file(path)
    assert isinstance(caught.value, (GraphError, CompileError))


def test_bytes_that_are_no_text_are_an_error_of_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GraphError, match=r"a\.yaml is not a prompt file"):
        ICLGraph.from_file(path)


@pytest.mark.parametrize("name", ["prompt.json", "prompt.yaml"])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file_whole(graph, tmp_path, monkeypatch, name, where):
    path = tmp_path / name
    graph.to_file(path)
    before = path.read_bytes()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(exchange.os, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        ICLGraph(ICLNode("something else")).to_file(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_written_files_can_be_read_by_others(graph, tmp_path):
    """mkstemp makes files private; a prompt file has the permissions that any new file has."""
    plain = tmp_path / "plain"
    plain.touch()
    graph.to_file(tmp_path / "prompt.yaml")
    assert (tmp_path / "prompt.yaml").stat().st_mode == plain.stat().st_mode


def test_writing_through_a_link_keeps_the_link(graph, tmp_path):
    (tmp_path / "link.yaml").symlink_to(tmp_path / "real.yaml")
    graph.to_file(tmp_path / "link.yaml")
    assert (tmp_path / "link.yaml").is_symlink()
    assert described(ICLGraph.from_file(tmp_path / "real.yaml")) == described(graph)


def test_every_node_of_a_file_sees_its_root(tmp_path, words):
    first = ICLNode("one two", id="root")
    a, b = ICLNode("three", [first], id="a"), ICLNode("four five", [first], id="b")
    wanted = compile_prompt(ICLNode("six", [first, a, b], id="Q"), words)
    nodes = [{"id": "Q", "content": "six", "parents": ["a", "b"]}, {"id": "a", "content": "three"}]
    nodes += [{"id": "b", "content": "four five", "parents": ["root"]}]
    for name in ("prompt.yaml", "prompt.json"):
        for root in ("one two", words("one two")["input_ids"]):
            exchange.write({"root": root, "nodes": nodes}, tmp_path / name)
            graph = ICLGraph.from_file(tmp_path / name)
            prompt = compile_prompt(graph, words)
            assert list(graph.names.values()) == ["root", "a", "b", "Q"]
            assert prompt.input_ids.tolist() == wanted.input_ids.tolist()
            assert prompt.position_ids.tolist() == wanted.position_ids.tolist()
            assert prompt.dense_mask().tolist() == wanted.dense_mask().tolist()
    assert described(ICLGraph.from_dict(graph.to_dict())) == described(graph)


def test_a_root_and_nodes_without_names():
    graph = ICLGraph.from_dict({"root": [5], "nodes": [{"content": "a"}, {"content": "b"}]})
    assert [list(map(graph.name, graph.parents(node))) for node in graph] == [[], ["root"], ["root"]]
    without = ICLGraph.from_dict({"root": None, "nodes": [{"content": "a"}]})
    assert list(without.names.values()) == ["a"]


@pytest.mark.parametrize(
    ("root", "error", "words"),
    [
        ("bos", GraphError, "root='bos' needs a tokenizer"),
        (7, CompileError, "the content of a node is text or token ids, not 7"),
        ("", CompileError, "node 'root' has no content"),
        ({"content": "x"}, CompileError, "the content of a node is text or token ids"),
    ],
)
def test_what_is_no_root(root, error, words):
    with pytest.raises(error, match=words):
        ICLGraph.from_dict({"root": root, "nodes": [{"content": "a"}]})


def test_the_name_of_the_root_is_taken():
    with pytest.raises(GraphError, match="id 'root' is given to a node, and the field 'root' makes a node of that name"):
        ICLGraph.from_dict({"root": "x", "nodes": [{"id": "root", "content": "a"}]})
