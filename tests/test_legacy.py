"""LE-ATTENTION's own names, as its README shows them, and without its faults."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from matplotlib.image import imread
from oracles import dense, relation, word_tokenizer
from strategies import graphs

from leattn import (
    CompileError,
    ICLGraph,
    ICLNode,
    LeattnError,
    build_attention_matrix,
    generate_flex_attention_mask_mod,
    prepare_inputs,
    print_dag,
    upstream_nodes,
    visualize_attention_matrix,
)

# X1 and X2 have 3 tokens, X3 as well, Q has 6. X2 sees X1, X3 sees X2 alone, Q sees X3 alone.
README_MATRIX = [
    [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0],
    [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer("example 1 2 3 . What does the fox say ?")


@pytest.fixture
def leaf():
    x1 = ICLNode("example1.", id="X1")
    x2 = ICLNode("example2.", parents=[x1], id="X2")
    x3 = ICLNode("example3.", parents=[x2], id="X3")
    return ICLNode("What does the fox say?", parents=[x3], id="Q")


def test_print_dag_of_the_readme(leaf, capsys):
    print(print_dag(leaf, output_character_limit=100))
    assert capsys.readouterr().out == "└── Q\n    └── X3\n        └── X2\n            └── X1\n"


def test_upstream_nodes_of_the_readme(leaf):
    nodes = upstream_nodes(leaf)
    assert isinstance(nodes, list)
    assert [node.id for node in nodes] == ["X1", "X2", "X3", "Q"]


def test_build_attention_matrix_of_the_readme(leaf, tokenizer):
    matrix, nodes, start_end_pos, names = build_attention_matrix(leaf, tokenizer)
    assert matrix.tolist() == README_MATRIX
    assert isinstance(matrix, np.ndarray)
    assert np.issubdtype(matrix.dtype, np.integer)
    assert isinstance(nodes, list)
    assert nodes == upstream_nodes(leaf)
    assert start_end_pos == [(0, 3), (3, 6), (6, 9), (9, 15)]
    assert names == ["X1", "X2", "X3", "Q"]


def test_without_the_matrix(leaf, tokenizer):
    matrix, nodes, start_end_pos, names = build_attention_matrix(leaf, tokenizer, materialize_attention_matrix=False)
    assert matrix is None
    assert (len(nodes), start_end_pos[-1], names[0]) == (4, (9, 15), "X1")


def test_prepare_inputs_of_the_readme(leaf, tokenizer):
    _, nodes, _, _ = build_attention_matrix(leaf, tokenizer)
    input_ids, position_ids = prepare_inputs(nodes)
    expected = "example 1 . example 2 . example 3 . What does the fox say ?"
    assert " ".join(tokenizer.convert_ids_to_tokens(input_ids[0])) == expected
    assert position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 5]]
    assert input_ids.dtype == position_ids.dtype == torch.long


def test_mask_mod_of_the_readme(leaf, tokenizer):
    mask_mod = generate_flex_attention_mask_mod(leaf, tokenizer)
    index = torch.arange(15)
    made = mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index)
    assert made.int().tolist() == README_MATRIX


@given(graphs())
def test_all_of_them_on_any_graph(graph):
    leaf = graph.sinks[0]
    own = ICLGraph(leaf).nodes
    matrix, nodes, start_end_pos, names = build_attention_matrix(leaf)
    assert matrix.astype(bool).tolist() == dense(own, relation(own))
    assert tuple(nodes) == own
    assert [end - start for start, end in start_end_pos] == [len(node.content) for node in own]
    assert len(set(names)) == len(names)
    input_ids, position_ids = prepare_inputs(nodes)
    assert input_ids[0].tolist() == [token for node in own for token in node.content]
    assert position_ids[0].tolist() == [i for node in own for i in range(len(node.content))]


def test_pins_set_positions(tokenizer):
    x = ICLNode("example1.", start_pos_id=5)
    q = ICLNode("What?", parents=[x], end_pos_id=30)
    assert prepare_inputs([x, q], tokenizer=tokenizer)[1].tolist() == [[5, 6, 7, 28, 29]]


def test_a_list_in_its_own_order(leaf, tokenizer):
    x1, _, _, q = upstream_nodes(leaf)
    input_ids, position_ids = prepare_inputs([q, x1], tokenizer)
    assert tokenizer.decode(input_ids[0]).replace(" ", "") == "Whatdoesthefoxsay?example1."
    assert position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2]]


# What must not come back


def test_another_tokenizer_gives_other_tokens(leaf, tokenizer):
    other = word_tokenizer("? say fox the does What . 3 2 1 example")
    nodes = build_attention_matrix(leaf, tokenizer)[1]
    first = prepare_inputs(nodes)[0]
    build_attention_matrix(leaf, other)
    second = prepare_inputs(nodes)[0]
    assert tokenizer.decode(first[0]) == other.decode(second[0])
    assert first.tolist() != second.tolist()
    assert prepare_inputs(nodes, tokenizer)[0].tolist() == first.tolist(), "a tokenizer that is given wins"


def test_tokenizers_are_never_mixed(tokenizer):
    shared = ICLNode("example1.", id="shared")
    one, two = ICLNode("What?", [shared], id="one"), ICLNode("fox", [shared], id="two")
    build_attention_matrix(one, tokenizer)
    build_attention_matrix(two, word_tokenizer("fox example 1 ."))
    assert prepare_inputs(upstream_nodes(two))
    with pytest.raises(LeattnError, match="last built with 2 different tokenizers; give tokenizer="):
        prepare_inputs(upstream_nodes(one))
    assert prepare_inputs(upstream_nodes(one), tokenizer)


def test_without_any_tokenizer(leaf):
    with pytest.raises(LeattnError, match="no tokenizer is known for node 'X1', which holds text; call build_attention_matrix"):
        prepare_inputs(upstream_nodes(leaf))
    with pytest.raises(CompileError, match="node 'X1' holds text; give a tokenizer"):
        build_attention_matrix(leaf)
    with pytest.raises(LeattnError, match=r"takes a list of nodes; write prepare_inputs\(\['Q'\]\)"):
        prepare_inputs(leaf)
    with pytest.raises(LeattnError, match="at least one target"):
        prepare_inputs([])


def test_nothing_keeps_nodes_or_tokenizers_alive():
    tokenizer = word_tokenizer("one")
    leaf = ICLNode("one")
    build_attention_matrix(leaf, tokenizer)
    watched = [weakref.ref(leaf), weakref.ref(tokenizer)]
    del leaf, tokenizer
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_two_nodes_with_one_default_id_stay_two(tokenizer):
    one, two = ICLNode("example1."), ICLNode("example1.")
    leaf = ICLNode("What?", parents=[two], id="Q")
    both = ICLNode("fox", parents=[one, leaf], id="Q2")
    assert build_attention_matrix(both, tokenizer)[3] == ["example1.", "example1. #2", "Q", "Q2"]
    mask_mod = generate_flex_attention_mask_mod(both, tokenizer)
    zero = torch.tensor(0)
    sees = [bool(mask_mod(zero, zero, torch.tensor(6), torch.tensor(k))) for k in (0, 3)]
    assert sees == [False, True], "Q sees the second example and not the first"


def test_a_diamond_prints_in_few_lines():
    node = ICLNode("root")
    for i in range(40):
        node = ICLNode(f"join {i}", [ICLNode(f"left {i}", [node]), ICLNode(f"right {i}", [node])])
    assert len(print_dag(node).splitlines()) < 200


def test_names_are_cut():
    assert print_dag(ICLNode("x", id="a very long name")) == "└── a very lon"
    assert print_dag(ICLNode("x", id="a very long name"), output_character_limit=3) == "└── a v"


# The picture


def test_visualize_writes_the_picture_of_the_readme(leaf, tokenizer, tmp_path):
    matrix, _, start_end_pos, names = build_attention_matrix(leaf, tokenizer)
    path = tmp_path / "figures" / "mask.png"
    axes = visualize_attention_matrix(matrix, start_end_pos, names, size_ratio=0.5, save_dir=str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    visualize_attention_matrix(matrix, start_end_pos, names, size_ratio=1.0, save_dir=tmp_path / "larger.png")
    small, large = (imread(file).shape[0] for file in (path, tmp_path / "larger.png"))
    assert large == pytest.approx(2 * small, abs=2)
    shown = {text.get_text() for text in axes.figure.findobj(lambda artist: hasattr(artist, "get_text"))}
    assert {"X1 · 3", "X2 · 3", "X3 · 3", "Q · 6"} <= shown


def test_visualize_writes_nothing_unless_told(leaf, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matrix, _, start_end_pos, names = build_attention_matrix(leaf, tokenizer)
    visualize_attention_matrix(matrix, start_end_pos, names)
    assert list(tmp_path.iterdir()) == []


def test_visualize_has_no_artist_per_cell():
    nodes = [ICLNode(list(range(40)), id="root")]
    for i in range(10):
        nodes.append(ICLNode(list(range(40)), nodes[:], id=f"n{i}"))
    matrix, _, start_end_pos, names = build_attention_matrix(nodes[-1])
    axes = visualize_attention_matrix(matrix, start_end_pos, names)
    assert matrix.size == 440 * 440
    assert len(axes.figure.findobj()) < 1500


def test_visualize_draws_the_matrix_it_is_given():
    a = ICLNode([1, 2], id="a")
    leaf = ICLNode([4, 5, 6, 7], [ICLNode([3], id="b"), a], id="c")
    matrix, _, start_end_pos, names = build_attention_matrix(leaf)
    axes = visualize_attention_matrix(matrix, start_end_pos, names)
    assert axes.get_title(loc="left") == f"attention mask: 7 tokens, 3 nodes, density {matrix.sum() / 28:.2f}"


def test_visualize_says_what_does_not_fit(leaf, tokenizer):
    matrix, _, start_end_pos, names = build_attention_matrix(leaf, tokenizer)
    with pytest.raises(LeattnError, match=r"start_end_pos covers 15 tokens, .* but the matrix is \[14, 14\]"):
        visualize_attention_matrix(matrix[:-1, :-1], start_end_pos, names)
    with pytest.raises(LeattnError, match=r"start_end_pos has \(9, 15.5\); give pairs of whole numbers"):
        visualize_attention_matrix(matrix, [*start_end_pos[:-1], (9, 15.5)], names)
    with pytest.raises(LeattnError, match="start_end_pos covers 15 tokens"):
        visualize_attention_matrix(matrix, [start_end_pos[0], *start_end_pos[2:]], names)
    with pytest.raises(LeattnError, match="3 names for 4 nodes; give one per node"):
        visualize_attention_matrix(matrix, start_end_pos, names[:-1])
    with pytest.raises(LeattnError, match="the matrix is None; build it with materialize_attention_matrix=True"):
        visualize_attention_matrix(None, start_end_pos, names)
    with pytest.raises(LeattnError, match="size_ratio=0 is no size"):
        visualize_attention_matrix(matrix, start_end_pos, names, size_ratio=0)
    changed = matrix.copy()
    changed[10, 7] = 0
    with pytest.raises(LeattnError, match="not one of whole nodes: query token 10 and key token 7"):
        visualize_attention_matrix(changed, start_end_pos, names)
