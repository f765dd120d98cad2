"""The meaning of a graph, on real models: a node computes what its own ancestors alone would make it compute."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BACKENDS, FAMILIES, SERVED, shared_model
from strategies import SCHEMES, VISIBILITIES, graphs

import leattn
from leattn import ICLNode, causal, compile_prompt

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _uncompiled_flex():
    """torch 2.13 cannot compile flex for many shapes on a CPU; uncompiled it is the same mathematics."""
    with torch.compiler.set_stance("force_eager"):
        yield


def logits(model, prompt, backend):
    with torch.no_grad():
        return leattn.forward(model, prompt, backend=backend, use_cache=False).logits[0]


def alone(prompt, node, visibility):
    """The node and its ancestors, compiled by themselves at the positions they had."""

    def starts(graph, _):
        return {other: int(prompt[other].positions[0]) for other in graph.nodes}

    return compile_prompt(node, positions=starts, visibility=visibility)


@pytest.mark.parametrize(("family", "backend"), SERVED)
@settings(max_examples=6)
@given(graph=graphs(max_nodes=6), scheme=SCHEMES, visibility=VISIBILITIES, data=st.data())
def test_a_node_computes_what_its_ancestors_alone_make_it_compute(family, backend, graph, scheme, visibility, data):
    model = shared_model(family)
    prompt = compile_prompt(graph, positions=scheme, visibility=visibility)
    node = data.draw(st.sampled_from(graph.nodes))
    whole = logits(model, prompt, backend)[slice(*prompt.spans[node])]
    own = alone(prompt, node, visibility)
    torch.testing.assert_close(whole, logits(model, own, backend)[slice(*own.spans[node])], **TOLERANCE)


@pytest.mark.parametrize(("family", "backend"), SERVED)
def test_a_graph_in_which_everyone_sees_everything_equals_the_plain_model(family, backend):
    model = shared_model(family)
    ids = torch.randint(2, 100, (23,), generator=torch.Generator().manual_seed(1))
    prompt = compile_prompt(causal(ids.split([5, 1, 9, 8])))
    with torch.no_grad():
        plain = model(ids[None], use_cache=False).logits[0]
    torch.testing.assert_close(logits(model, prompt, backend), plain, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_backends_agree_on_a_graph_with_siblings(family):
    model = shared_model(family)
    root = ICLNode([1, 5, 6], id="root")
    siblings = [ICLNode([10 + i, 20 + i, 30 + i, 40 + i][: 2 + i], [root]) for i in range(3)]
    prompt = compile_prompt(ICLNode([7, 8, 9], [root, *siblings]))
    served = [backend for backend in BACKENDS if (family, backend) in SERVED]
    reference = logits(model, prompt, "eager")
    for backend in served[1:]:
        torch.testing.assert_close(logits(model, prompt, backend), reference, **TOLERANCE)


@pytest.mark.parametrize(("family", "backend"), SERVED)
@settings(max_examples=4)
@given(graph=graphs(max_nodes=6), data=st.data())
def test_changing_a_node_changes_nothing_where_it_is_not_reached(family, backend, graph, data):
    """The negative control counts too: where it is reached, something changes."""
    model = shared_model(family)
    changed = data.draw(st.sampled_from(graph.nodes))
    prompt = compile_prompt(graph)
    # The same layout with other tokens in one node.
    start, end = prompt.spans[changed]
    ids = prompt.input_ids.clone()
    ids[0, start:end] = (ids[0, start:end] + 17) % 100
    other = (
        leattn.prompt.compile._with_ids(prompt, ids) if hasattr(leattn.prompt.compile, "_with_ids") else _replace(prompt, ids)
    )
    before, after = logits(model, prompt, backend), logits(model, other, backend)
    for node in graph.nodes:
        span = slice(*prompt.spans[node])
        if node is changed:
            assert not torch.equal(before[span], after[span])
        elif changed not in graph.ancestors(node):
            torch.testing.assert_close(before[span], after[span], **TOLERANCE)


def _replace(prompt, ids):
    import dataclasses

    return dataclasses.replace(prompt, input_ids=ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_an_edge_equals_a_graph_without_it(family):
    model = shared_model(family)
    a, b = ICLNode([5, 6, 7], id="a"), ICLNode([8, 9], id="b")
    question = ICLNode([10, 11], [a, b], id="Q")
    cut = compile_prompt(question).without_edge("Q", "b")
    only_a = compile_prompt([ICLNode([10, 11], [a], id="Q", start_pos_id=3), b])
    torch.testing.assert_close(logits(model, cut, "eager")[-2:], logits(model, only_a, "eager")[-2:], **TOLERANCE)
