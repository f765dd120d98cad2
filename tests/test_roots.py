"""One warning per model where a node sees no first token, or several, and the model has a sink there."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import make_model
from strategies import VISIBILITIES, node_lists

import leattn
from leattn import GenNode, ICLGraph, ICLNode, KVStore, LeattnWarning, causal, chain, compile_prompt, parallel
from leattn.attention import roots
from leattn.interventions import SkipAttention, intervene
from leattn.model.record import Model


def with_a_sink(implementation="eager", family="gpt2"):
    """A GPT-2 whose last layer looks for position 0: one coordinate of the state says so, and every query asks for it."""
    model = make_model(family, implementation)
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] = 100
        attention, size = model.transformer.h[-1].attn, model.config.n_embd
        for head in range(model.config.n_head):
            at = head * (size // model.config.n_head)
            attention.c_attn.weight[0, size + at] = 1.5
            attention.c_attn.bias[at] = 3
    return model


def siblings(*, root=None):
    """Two documents and a question, of which the first two see nothing, or the root."""
    documents = parallel([[5, 6, 7], [8, 9]], root=root, ids=["a", "b"])
    return compile_prompt(ICLNode([11, 12], [*documents[0].parents, *documents], id="Q"))


def told(call):
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if issubclass(one.category, LeattnWarning)]


@pytest.fixture(autouse=True)
def _as_it_comes(monkeypatch, tmp_path):
    monkeypatch.setenv("LEATTN_CACHE", str(tmp_path))
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield


def test_the_model_of_these_tests_has_a_sink_and_a_random_one_has_none():
    """By the weights that the plain model returns for a text of our own."""
    ids = torch.tensor([random.Random(1).choices(range(3, 100), k=24)])
    for model, has in ((with_a_sink(), True), (make_model("gpt2"), False), (make_model("llama"), False)):
        layers = model(ids, output_attentions=True).attentions
        most = max(float(layer[0, :, 12:, 0].mean()) for layer in layers)
        assert (most > 0.5) is has
        assert most < 0.995, "or nothing else would matter"
        found = roots._measured(model, Model.of(model))
        assert abs(found - most) < 0.1


CALLS = {
    "forward": lambda model, prompt: leattn.forward(model, prompt),
    "batch": lambda model, prompt: leattn.forward(model, [compile_prompt(ICLNode([5])), prompt]),
    "store": lambda model, prompt: leattn.forward(model, prompt, kv_store=KVStore()),
    "generate": lambda model, prompt: leattn.generate(model, prompt, max_new_tokens=2),
    "model_inputs": lambda model, prompt: leattn.model_inputs(model, prompt),
    "warm": lambda model, prompt: leattn.warm(model, prompt, kv_store=KVStore(), progress=False),
    "trace": lambda model, prompt: leattn.analysis.trace(model, prompt),
    "program": lambda model, prompt: leattn.generate(model, GenNode([5], [prompt.graph["Q"]], "w", max_new_tokens=2)),
}


@pytest.mark.parametrize("name", CALLS)
def test_whatever_is_called_warns_once(name):
    model = with_a_sink("sdpa")
    found = told(lambda: CALLS[name](model, siblings()))
    assert len(found) == 1
    assert found[0].startswith("node 'Q' sees 2 nodes that see nothing ('a', 'b'). In one of its layers this model puts ")
    assert "root= in the builders, 'root' in a prompt file, or parents=[root, …] with root = leattn.bos(tokenizer)" in found[0]
    assert told(lambda: CALLS[name](model, siblings())) == []
    assert told(lambda: leattn.forward(model, compile_prompt(chain([[5], [6], [7]])))) == []


@pytest.mark.parametrize("name", CALLS)
def test_no_sink_no_warning(name):
    assert told(lambda: CALLS[name](make_model("gpt2", "sdpa"), siblings())) == []


def test_a_chain_loses_sight_of_the_first_token():
    prompt = compile_prompt(chain([[5, 6], [7], [8]], ids=["a", "b", "c"]))
    (found,) = told(lambda: leattn.forward(with_a_sink(), prompt))
    assert found.startswith("node 'c' does not see 'a', with which what it sees begins.")
    assert "a node without it in sight often goes wrong" in found
    assert told(lambda: leattn.forward(with_a_sink(), compile_prompt(prompt.graph, visibility="ancestors"))) == []


GOOD = {
    "one node": compile_prompt(ICLNode([5, 6])),
    "plain text": compile_prompt(causal([[5, 6], [7], [8]])),
    "behind a root": siblings(root=[3]),
    "a chain behind a root": compile_prompt(chain([[5], [6], [7]], root=[3])),
    "apart": compile_prompt(parallel([[5, 6], [7]])),
    "two texts": compile_prompt([causal([[5], [6]])[-1], causal([[7], [8]])[-1]]),
    "paraphrases": compile_prompt(leattn.paraphrase_group([5], [[6], [7]], pattern="isolated", answer=[8], root=[3])),
    "a cut edge": siblings(root=[3]).without_edge("a", "root"),
    "a root that nobody sees": siblings(root=[3]).without_node("root"),
    "cut before the question": siblings(root=[3]).without_edge("Q", "root"),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_prompt_with_one_root_is_not_measured(name, monkeypatch):
    monkeypatch.setattr(roots, "_measured", lambda *_: pytest.fail("measured"))
    assert told(lambda: leattn.forward(with_a_sink(), GOOD[name])) == []


def test_programs_with_one_root_are_not_measured(monkeypatch):
    monkeypatch.setattr(roots, "_measured", lambda *_: pytest.fail("measured"))
    root = ICLNode([3], id="root")
    written = parallel([[5], [6]], [root])
    nodes = [GenNode([7, i], [root, *written], f"w{i}", max_new_tokens=2) for i in (1, 2)]
    last = GenNode([8], [root, *nodes], "last", max_new_tokens=2)
    model = with_a_sink()
    assert told(lambda: leattn.generate(model, last, eos_token_id=None)) == []
    assert told(lambda: leattn.generate(model, compile_prompt([*written]), max_new_tokens=2)) == []
    alone = [GenNode([i], (), f"g{i}", max_new_tokens=2) for i in (1, 2)]
    assert told(lambda: leattn.generate(model, alone, eos_token_id=None)) == []


def test_a_mask_that_replaces_the_graph_decides():
    prompt = siblings()
    mask = torch.ones(1, 1, len(prompt), len(prompt), dtype=torch.bool).tril()
    model = with_a_sink()
    assert told(lambda: leattn.forward(model, prompt, mask=mask, mask_mode="replace")) == []
    assert len(told(lambda: leattn.forward(model, prompt, mask=mask))) == 1


def test_it_is_measured_once_for_all_models_of_these_weights(monkeypatch):
    assert len(told(lambda: leattn.forward(with_a_sink(), siblings()))) == 1
    assert told(lambda: leattn.forward(make_model("gpt2"), siblings())) == []
    monkeypatch.setattr(roots, "_measured", lambda *_: pytest.fail("measured"))
    assert len(told(lambda: leattn.forward(with_a_sink(), siblings()))) == 1
    assert told(lambda: leattn.forward(make_model("gpt2"), siblings())) == []


def test_a_model_that_cannot_be_looked_at_is_let_alone(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(roots, "refusal", lambda *_: "no eager")
        assert told(lambda: leattn.forward(with_a_sink(), siblings())) == []
    model = with_a_sink()
    leattn.check_model(model)
    with monkeypatch.context() as patched:
        patched.setattr(roots, "LENGTH", 10**4)  # past the model's table of positions
        assert told(lambda: leattn.forward(model, siblings())) == []


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_nothing_is_left_of_the_measurement(implementation):
    model = with_a_sink(implementation).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    state = torch.get_rng_state()
    with torch.enable_grad():
        (found,) = told(lambda: leattn.model_inputs(model, siblings()))
        assert torch.is_grad_enabled()
    assert "of its attention on the first token" in found
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any([*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules())
    assert Model.of(model).blocks == []


def test_inside_an_intervention_the_model_itself_is_measured():
    """Without its last layer's attention, the sink of the block would be gone."""
    model, other = with_a_sink(), with_a_sink()
    expected = roots._measured(other, Model.of(other))
    with intervene(model, siblings(root=[3]), [SkipAttention([2])]):
        (found,) = told(lambda: leattn.forward(model, siblings()))
    assert f"{expected:.0%} of its attention" in found


@given(node_lists(max_nodes=8), VISIBILITIES, st.data())
def test_who_is_astray_against_sets(nodes, visibility, data):
    graph = ICLGraph(*nodes)
    prompt = compile_prompt(graph, visibility=visibility)
    for _ in range(data.draw(st.integers(0, 2))):
        edges = [(node, seen) for node in graph for seen in prompt.sees(node)]
        if edges:
            prompt = prompt.without_edge(*data.draw(st.sampled_from(edges)))
    wanted = None
    for i, node in enumerate(graph.nodes):
        seen = set(prompt.sees(node))
        if node.parents and len(seen) >= len(node.parents) and sum(not one.parents for one in seen) != 1:
            wanted = i
            break
    parents = torch.tensor([len(node.parents) for node in graph.nodes]).numpy()
    assert roots._astray(prompt.visible, parents) == wanted
