"""Nodes: frozen, compared by identity, and strict about what they are given."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from forks import in_another_process
from oracles import word_tokenizer

import leattn
from leattn import CompileError, GraphError, ICLGraph, ICLNode, LeattnError, compile_prompt
from leattn.dag.node import Prefix


def test_nodes_are_frozen():
    node = ICLNode("text", id="a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        node.content = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        node.parents = ()
    with pytest.raises(TypeError):
        node.parents[0] = node


def test_changing_the_list_of_parents_changes_no_node():
    parents = [ICLNode("a")]
    node = ICLNode("b", parents)
    parents.append(ICLNode("c"))
    assert len(node.parents) == 1


def test_nodes_compare_by_identity():
    one, two = ICLNode("same"), ICLNode("same")
    assert one != two
    assert len({one, two}) == 2
    assert len(ICLGraph(ICLNode("leaf", [one, two]))) == 3


@pytest.mark.parametrize(
    "content", [[1, 2], (1, 2), torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32), np.array([1, 2]), range(1, 3)]
)
def test_token_ids_may_come_in_any_sequence(content):
    node = ICLNode(content)
    assert node.content == (1, 2)
    ids = node.tokenize()
    assert ids.dtype == torch.long
    assert ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"content": ""}, "has no content; give it text or token ids, or remove it"),
        ({"content": []}, "has no content; give it text or token ids, or remove it"),
        ({"content": [1, -3]}, "token ids are not negative, but -3 is among them"),
        ({"content": 3}, "text or token ids, not 3"),
        ({"content": None}, "text or token ids, not None"),
        ({"content": ["a"]}, r"text or token ids, not \['a'\]"),
        ({"content": [5, 1.7]}, r"text or token ids, not \[5, 1.7\]"),
        ({"content": [True, 5]}, r"text or token ids, not \[True, 5\]"),
        ({"content": torch.tensor([[1, 2]])}, r"1-D integer tensor, not torch.int64 of shape \[1, 2\]"),
        ({"content": torch.tensor([1.0])}, "1-D integer tensor, not torch.float32"),
        ({"content": torch.tensor([True])}, "1-D integer tensor, not torch.bool"),
        ({"content": "x", "start_pos_id": 3, "end_pos_id": 9}, "both start_pos_id=3 and end_pos_id=9; give one of them"),
        ({"content": "x", "start_pos_id": -1}, "start_pos_id=-1; positions start at 0"),
        ({"content": "x", "end_pos_id": -2}, "end_pos_id=-2; positions start at 0"),
        ({"content": "x", "start_pos_id": True}, "start_pos_id=True; give a number"),
    ],
)
def test_bad_content_and_pins(arguments, words):
    with pytest.raises(CompileError, match=words):
        ICLNode(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"parents": ["a"]}, "a parent is an ICLNode that exists already, not 'a'"),
        ({"parents": ICLNode("p", id="p")}, r"parents is a list of nodes; write parents=\['p'\]"),
        ({"id": 3}, "the id of a node is a string, not 3"),
        ({"id": ""}, "the id of a node is empty; leave it out"),
    ],
)
def test_bad_parents_and_ids(arguments, words):
    with pytest.raises(GraphError, match=words):
        ICLNode("x", **arguments)


def test_a_parent_given_twice():
    parent = ICLNode("x", id="P")
    with pytest.raises(GraphError, match="parent 'P' is given twice"):
        ICLNode("y", [parent, ICLNode("z"), parent])


def test_unknown_treatment_of_special_tokens_lists_the_known():
    with pytest.raises(LeattnError, match="unknown special_tokens 'keep'; choose one of 'parse', 'text'"):
        ICLNode("x", special_tokens="keep")


def test_errors_are_one_family_and_value_errors():
    for error in (GraphError, CompileError, leattn.BackendError):
        assert issubclass(error, LeattnError)
    assert issubclass(LeattnError, ValueError)


def test_text_is_tokenized_alone_and_nothing_is_added(words):
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer("one two <bos>")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    assert tokenizer("one")["input_ids"] == [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("one")]  # would add it
    assert ICLNode("one").tokenize(tokenizer).tolist() == [tokenizer.convert_tokens_to_ids("one")]
    assert leattn.bos(tokenizer).tokenize().tolist() == [tokenizer.bos_token_id]
    with pytest.raises(CompileError, match="has no BOS token"):
        leattn.bos(words)


def test_the_bos_node_is_named_by_its_token():
    tokenizer = word_tokenizer("one")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = leattn.bos(tokenizer)
    assert bos.id is None
    assert bos.parents == ()
    assert ICLGraph(bos).name(bos) == "<bos>"


def test_special_tokens_in_text_are_parsed_or_stay_text():
    tokenizer = word_tokenizer("one < | eot >")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    control = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert ICLNode("one <|eot|>").tokenize(tokenizer).tolist()[-1:] == [control]
    as_text = ICLNode("one <|eot|>", special_tokens="text").tokenize(tokenizer).tolist()
    assert control not in as_text
    assert len(as_text) > 2
    # The treatments are kept apart also within one prompt.
    first = ICLNode("<|eot|>", special_tokens="text")
    prompt = compile_prompt(ICLNode("<|eot|>", [first]), tokenizer)
    assert control not in prompt[first].input_ids
    assert prompt.input_ids[0, -1] == control


def test_a_node_that_tokenizes_to_nothing(words):
    with pytest.raises(CompileError, match="node 'blank' tokenizes to 0 tokens; give it text or remove it"):
        compile_prompt(ICLNode("   ", id="blank"), words)


def test_text_without_a_tokenizer():
    with pytest.raises(CompileError, match="node 'Q' holds text; give a tokenizer, or token ids as content"):
        ICLNode("text", id="Q").tokenize()


def test_repr_is_short_and_str_is_the_name():
    parents = [ICLNode(f"parent {i}", id=f"p{i}") for i in range(6)]
    node = ICLNode("x" * 500, parents, id="n")
    assert len(repr(node)) < 150
    assert "'p0', 'p1', 'p2', 'p3', ..." in repr(node)
    assert str(node) == "n"
    assert str(ICLNode("A simple fact")) == ICLNode("A simple fact").default_name == "A simple f", "without a graph"


def test_prefix_is_the_start_of_a_growing_list():
    base = [ICLNode("a"), ICLNode("b")]
    prefix = Prefix(base, 2)
    base.append(ICLNode("c"))
    assert len(prefix) == 2
    assert list(prefix) == base[:2]
    assert prefix[-1] is base[1]
    assert prefix[:5] == tuple(base[:2])
    with pytest.raises(IndexError):
        prefix[2]


def test_nodes_survive_pickling_with_their_graph():
    root = ICLNode("a", id="a")
    leaf = pickle.loads(pickle.dumps(ICLNode("b", [root], id="b", start_pos_id=4)))
    assert [node.id for node in ICLGraph(leaf)] == ["a", "b"]
    assert leaf.start_pos_id == 4


def root_after(earlier, name):
    for _ in range(earlier):
        ICLNode("earlier")
    return ICLNode("root", id=name)


def test_children_of_nodes_from_other_processes_come_after_them():
    """A node's creation number means nothing in another process: parents come first there all the same."""
    late, again = in_another_process(root_after, 100_000, "late"), in_another_process(root_after, 0, "again")
    here = ICLNode("here", [late, again], id="here")
    assert [node.id for node in ICLGraph(here)] == ["again", "late", "here"]
