"""The rest of LE-ATTENTION's names, with the values that its code and its demo give; where those are wrong, a test says so."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from oracles import word_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from leattn import ICLNode, LeattnError, build_attention_matrix, prepare_inputs, print_dag, visualize_attention_matrix
from leattn.compat import aggregate_attention_matrix, build_adjacency_matrix, is_in, make_and_viz_dag
from leattn.viz.style import MASKED


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer("example 1 2 3 . What does the fox say ?")


@pytest.fixture(scope="module")
def with_bos():
    """A tokenizer that puts <s> in front of every text, as LLaMA's does."""
    inner = Tokenizer(WordLevel({"<s>": 0, "fox": 1, "say": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="?")


@pytest.fixture
def causal():
    """The first graph of its demo."""
    x1 = ICLNode("example1.", id="X1")
    x2 = ICLNode("example2.", parents=[x1], id="X2")
    x3 = ICLNode("example3.", parents=[x1, x2], id="X3")
    return x1, x2, x3, ICLNode("What does the fox say?", parents=[x3, x2, x1], id="Q")


DEMO = """\
└── Q
    ├── X3
    │   ├── X1
    │   └── X2
    │       └── X1
    ├── X2
    │   └── X1
    └── X1"""


def test_print_dag_of_the_demo_repeats_what_is_shared(causal):
    assert print_dag(causal[-1], output_character_limit=100, repeat_shared=True) == DEMO
    cut = DEMO.replace("X1", "X").replace("X2", "X").replace("X3", "X")
    assert print_dag(causal[-1], 1, True) == cut
    assert len(print_dag(causal[-1]).splitlines()) == len(DEMO.splitlines()) - 1, "by itself it draws X1 above X2 once"


def test_a_diamond_repeated_is_cut_and_not_waited_for():
    """Theirs has a line per path, 2⁴⁰ of them, and does not come back."""
    node = ICLNode("root")
    for i in range(40):
        node = ICLNode(f"join {i}", [ICLNode(f"left {i}", [node]), ICLNode(f"right {i}", [node])])
    assert len(print_dag(node, repeat_shared=True).splitlines()) < 500


def test_a_nodes_name_and_pins_by_position():
    assert str(ICLNode("What does the fox say?")) == f"{ICLNode('What does the fox say?')}" == "What does "
    assert str(ICLNode("text", [], "Q")) == "Q"
    assert ICLNode("text", None, "Q", 3).start_pos_id == 3
    assert ICLNode("text", None, "Q", None, 30).end_pos_id == 30
    with pytest.raises(LeattnError, match="node 'Q' has both start_pos_id=3 and end_pos_id=30"):
        ICLNode("text", None, "Q", 3, 30)


def test_tokenize_without_and_with_the_bos_token(with_bos):
    node = ICLNode("fox say ?")
    assert with_bos.encode(node.content) == [0, 1, 2, 3]
    assert node.tokenize(with_bos).tolist() == node.tokenize(with_bos, True).tolist() == [1, 2, 3]
    assert node.tokenize(with_bos, remove_bos_token=False).tolist() == [0, 1, 2, 3]
    assert ICLNode("<s>").tokenize(with_bos).tolist() == [0], "a node that is the BOS token"
    assert ICLNode([1, 2]).tokenize(with_bos, remove_bos_token=False).tolist() == [1, 2], "token ids are what they are"
    # Theirs keeps the tokens of the first call, whatever is asked for later.
    assert node.tokenize(with_bos).tolist() == [1, 2, 3]


def test_remove_bos_token_where_there_is_none(tokenizer):
    assert ICLNode("fox").tokenize(tokenizer, remove_bos_token=False).tolist() == ICLNode("fox").tokenize(tokenizer).tolist()


def test_token_ids_and_position_ids_of_a_node(tokenizer):
    node, late = ICLNode("What does the fox say?", start_pos_id=7), ICLNode("example1.", end_pos_id=30)
    assert node.token_ids is node.position_ids is None
    ids = node.tokenize(tokenizer)
    late.tokenize(tokenizer)
    assert torch.equal(node.token_ids, ids)
    assert node.position_ids.tolist() == [7, 8, 9, 10, 11, 12]
    assert late.position_ids.tolist() == [27, 28, 29]
    assert ICLNode([5, 6]).position_ids.tolist() == [0, 1]
    assert prepare_inputs([node, late])[0][0].tolist() == [*ids.tolist(), *late.token_ids.tolist()]


def test_token_ids_follow_the_last_tokenizer(tokenizer):
    """Theirs are those of the first."""
    node, other = ICLNode("What does"), word_tokenizer("does What")
    build_attention_matrix(node, tokenizer)
    first = node.token_ids.tolist()
    assert first == tokenizer("What does", add_special_tokens=False)["input_ids"]
    node.tokenize(other)
    assert node.token_ids.tolist() == other.convert_tokens_to_ids(["What", "does"]) != first


def test_parents_input_and_position_ids(tokenizer):
    x1, x2 = ICLNode("example1."), ICLNode("example2.", start_pos_id=3)
    q = ICLNode("What does", [x1, x2], start_pos_id=6)
    with pytest.raises(LeattnError, match=r"node 'example1\.' was not tokenized yet"):
        q.get_parents_input_position_ids()
    for node in (x1, x2, q):
        node.tokenize(tokenizer)
    input_ids, position_ids = q.get_parents_input_position_ids()
    words = ["example", "1", ".", "example", "2", ".", "What", "does"]
    assert input_ids.tolist() == [tokenizer.convert_tokens_to_ids(words)]
    assert position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    # Theirs leaves the node's own positions out, so that its two tensors do not fit each other.
    assert position_ids[:, :6].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert x1.get_parents_input_position_ids() is None


def test_the_adjacency_matrix(causal):
    x1, x2, x3, q = causal
    assert build_adjacency_matrix([x1, x2, x3, q]) == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert build_adjacency_matrix([x2, x1]) == [[1, 1], [0, 1]], "in the order given"
    with pytest.raises(LeattnError, match=r"the parent 'X1' of 'X2' is not among the nodes; give upstream_nodes\(leaf\)"):
        build_adjacency_matrix([x2])


def test_two_nodes_of_one_name_are_two():
    """Theirs goes by name and takes them for one, so that q would see the second and the first see itself through it."""
    one, two = ICLNode("example1."), ICLNode("example1.")
    q = ICLNode("What?", [one])
    assert build_adjacency_matrix([one, two, q]) == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert is_in(one, [two, one])
    assert not is_in(one, [two])


def test_attention_of_all_layers_in_one_array():
    layers = [torch.rand(1, 4, 3, 3) for _ in range(2)]
    array = aggregate_attention_matrix(layers)
    assert array.shape == (2, 4, 3, 3)
    assert np.array_equal(array, np.stack([layer.numpy() for layer in layers], axis=0).squeeze())
    # Theirs drops a single layer and a single head too, and has no bfloat16.
    assert aggregate_attention_matrix([torch.rand(1, 1, 3, 3).bfloat16()]).shape == (1, 1, 3, 3)
    with pytest.raises(LeattnError, match=r"one tensor \[1, H, Q, K\] per layer, not \[\[2, 4, 3, 3\]\]"):
        aggregate_attention_matrix([torch.rand(2, 4, 3, 3)])


def test_make_and_viz_dag_draws_what_it_announces(causal):
    """Theirs raises NotImplementedError."""
    assert make_and_viz_dag(causal[-1]).get_title(loc="left") == "prompt graph: 4 nodes, 6 edges"
    plt.close("all")


def test_the_order_of_the_pictures_arguments(causal, tokenizer, tmp_path):
    matrix, _, start_end_pos, names = build_attention_matrix(causal[-1], tokenizer)
    file = tmp_path / "mask.png"
    ax = visualize_attention_matrix(matrix, start_end_pos, names, 0.1, 0.5, True, str(file))
    assert file.stat().st_size > 1000
    (legend,) = ax.figure.legends
    assert legend.get_title().get_text() == "Binary Values"
    assert [text.get_text() for text in legend.get_texts()] == ["0", "1"]
    colours = [tuple(handle.get_facecolor()[0]) for handle in legend.legend_handles]
    assert colours[0] == plt.matplotlib.colors.to_rgba(MASKED) != colours[1]
    bare = visualize_attention_matrix(matrix, start_end_pos, names, grid_spacing=0)
    assert not bare.figure.legends

    def spaces(axes):
        cell = axes.get_window_extent().height * 72 / axes.figure.dpi / 15
        return {round(float(lines.get_linewidths()[0]) / cell, 3) for lines in axes.collections if lines.get_zorder() == 1.6}

    assert (spaces(ax), spaces(bare)) == ({0.1}, {0.0})
    assert spaces(visualize_attention_matrix(matrix, start_end_pos, names)) == {0.05}
    with pytest.raises(LeattnError, match="grid_spacing=1 leaves no cells"):
        visualize_attention_matrix(matrix, start_end_pos, names, 1)
