"""``trace`` against eager's own weights, hidden states and cache, folded with plain loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from models import SERVED, make_model, shared_model
from strategies import graphs
from test_attend import fan, traces
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import leattn
from leattn import BackendError, GraphError, ICLNode, LeattnError, compile_prompt
from leattn.analysis import Trace, trace
from leattn.interventions import Freeze, SkipAttention, Suppress, intervene
from leattn.model.record import Model


@pytest.fixture(autouse=True)
def _uncompiled_flex():
    with torch.compiler.set_stance("force_eager"):
        yield


def eager(model, prompt, **options):
    """Eager's own weights ``[L, H, S, S]``, hidden states ``[L, S, d]`` and the cache."""
    cache = DynamicCache()
    with torch.no_grad():
        out = leattn.forward(
            model, prompt, backend="eager", output_attentions=True, output_hidden_states=True, past_key_values=cache, **options
        )
    return torch.stack(out.attentions)[:, 0], torch.stack(out.hidden_states[:-1])[:, 0], cache


def mass_by_loops(weights, prompt):
    spans = list(prompt.spans.values())
    mass = torch.zeros(*weights.shape[:2], len(spans), len(spans))
    for i, (a, b) in enumerate(spans):
        for j, (c, d) in enumerate(spans):
            for query in range(a, b):
                mass[:, :, i, j] += weights[:, :, query, c:d].sum(-1) / (b - a)
    return mass


def first_by_loops(weights, prompt):
    """A weight of exactly zero is a masked pair: no visible one of these models is so unlikely."""
    given = torch.full((*weights.shape[:2], len(prompt.spans)), math.nan)
    for j, (first, _) in enumerate(prompt.spans.values()):
        for layer, layer_weights in enumerate(weights):
            seen = [q for q in range(len(prompt)) if q != first and bool(layer_weights[:, q, first].any())]
            if seen:
                given[layer, :, j] = layer_weights[:, seen, first].mean(-1)
    return given


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


def check_all(ours, model, prompt):
    weights, hidden, cache = eager(model, prompt)
    close(ours.mass, mass_by_loops(weights, prompt))
    close(ours.first_tokens, first_by_loops(weights, prompt))
    close(ours.hidden_norms, hidden.pow(2).sum(-1).sqrt())
    close(ours.key_norms, torch.stack([layer.keys[0].pow(2).sum(-1).sqrt() for layer in cache.layers]))
    close(ours.value_norms, torch.stack([layer.values[0].pow(2).sum(-1).sqrt() for layer in cache.layers]))


@pytest.mark.parametrize(("family", "backend"), [*SERVED, ("gpt_oss", "eager"), ("opt", "sdpa")])
def test_it_is_what_eager_itself_reports(family, backend):
    model, prompt = shared_model(family), fan(length=4)
    found = trace(model, prompt, backend=backend)
    check_all(found, model, prompt)
    assert found.backend == backend
    rows = found.mass.sum(-1)
    if family == "gpt_oss":  # its learned sinks take the rest
        assert rows.max() < 1
        assert rows.min() < 0.9
    else:
        close(rows, torch.ones_like(rows))
    # Far apart in positions, windows cut: a family with windows is another thing here than above.
    far = compile_prompt(prompt.graph, positions="sequential")
    check_all(trace(model, far, backend=backend, tile_bytes=1), model, far)


def test_a_soft_cap_that_bites():
    model = make_model("gemma2", attn_logit_softcapping=0.2)
    check_all(trace(model, fan(), backend="eager"), model, fan())
    assert not torch.allclose(trace(model, fan()).mass, trace(shared_model("gemma2"), fan()).mass, atol=1e-2)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@settings(max_examples=12)
@given(graph=graphs())
def test_any_graph(backend, graph):
    model, prompt = shared_model("llama"), compile_prompt(graph)
    check_all(trace(model, prompt, backend=backend, tile_bytes=200), model, prompt)


@pytest.mark.parametrize("tile_bytes", [1, 300, 1000, 5000])
def test_tiles_do_not_show(tile_bytes):
    model, prompt = shared_model("gemma3_text"), fan(length=7)
    whole = trace(model, prompt, tokens=[("Q", "doc1"), ("doc2", "doc2")])
    tiled = trace(model, prompt, tokens=[("Q", "doc1"), ("doc2", "doc2")], tile_bytes=tile_bytes)
    for name in ("mass", "first_tokens", "hidden_norms", "key_norms", "value_norms"):
        close(getattr(tiled, name), getattr(whole, name))
    for pair, kept in whole.tokens.items():
        close(tiled.tokens[pair].weights, kept.weights)


def test_weights_of_a_pair_token_by_token():
    model, prompt = shared_model("qwen2"), fan(length=5)
    weights, *_ = eager(model, prompt)
    kept = trace(model, prompt, tokens=[("Q", "doc1"), (prompt.graph["doc2"], "doc2")]).tokens
    assert list(kept) == [("Q", "doc1"), ("doc2", "doc2")]
    for (query, key), pair in kept.items():
        assert pair.pool == (1, 1)
        close(pair.weights, weights[:, :, slice(*prompt[query].span), slice(*prompt[key].span)])


def test_long_pairs_are_pooled():
    model, generator = make_model("llama", num_hidden_layers=1, max_position_embeddings=2048), torch.Generator().manual_seed(0)
    a = ICLNode(torch.randint(2, 100, (520,), generator=generator), id="a")
    prompt = compile_prompt(ICLNode(torch.randint(2, 100, (1030,), generator=generator), [a], id="b"))
    pair = trace(model, prompt, tokens=("b", "a"), tile_bytes=1 << 20).tokens["b", "a"]
    assert pair.pool == (3, 2)
    weights, *_ = eager(model, prompt)
    whole = weights[:, :, 520:, :520]
    expected = torch.stack(
        [
            torch.stack([whole[0, :, i : i + 3, j : j + 2].amax((1, 2)) for j in range(0, 520, 2)], -1)
            for i in range(0, 1030, 3)
        ],
        1,
    )[None]
    close(pair.weights, expected)


def test_layers_are_a_subset():
    model, prompt = shared_model("gemma2"), fan()
    whole, some = trace(model, prompt), trace(model, prompt, layers=[2, 0])
    assert (whole.layers, some.layers, trace(model, prompt, layers=1).layers) == ((0, 1, 2), (0, 2), (1,))
    for name in ("mass", "first_tokens", "hidden_norms", "key_norms", "value_norms"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[[0, 2]])


def test_roots_are_what_sees_nothing():
    prompt = fan()
    found = trace(shared_model("llama"), prompt)
    assert found.roots == ("root",)
    assert torch.equal(found.sinks[..., 0], found.first_tokens[..., 0])
    cut = trace(shared_model("llama"), prompt.without_edge("doc1", "root"))
    assert cut.roots == ("root", "doc1")
    assert cut.sinks.shape == (3, 4, 2)
    assert repr(cut) == "Trace(3 layers, 4 heads, 5 nodes, 17 tokens, backend 'sparse')"


def test_a_first_token_nobody_else_sees_has_no_number():
    found = trace(shared_model("llama"), compile_prompt([ICLNode([5], id="alone"), ICLNode([6, 7], id="pair")]))
    assert found.first_tokens[..., 0].isnan().all()
    assert not found.first_tokens[..., 1].isnan().any()


def test_generated_tokens_are_traced_as_a_node():
    """The weights that generation itself reports, step by step."""
    model, prompt = shared_model("llama"), fan(length=5)
    with torch.no_grad(), leattn.attend(model, prompt, backend="eager") as attention:
        out = model.generate(
            **{name: attention.inputs[name] for name in ("input_ids", "attention_mask")},
            max_new_tokens=5, do_sample=False, output_attentions=True, return_dict_in_generate=True, eos_token_id=None,
        )  # fmt: skip
    result = leattn.generate(model, prompt, max_new_tokens=5, backend="eager")
    assert torch.equal(out.sequences[0, len(prompt) :], result.token_ids)
    found = trace(model, result.prompt.continued(result.token_ids, "answer"), tokens=("answer", "doc1"))
    kept = found.tokens["answer", "doc1"].weights
    for step in range(1, 5):
        steps_own = torch.stack(out.attentions[step])[:, 0, :, 0]  # [L, H, K] of the token that the step feeds
        close(kept[:, :, step - 1], steps_own[..., slice(*prompt["doc1"].span)])


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_knocked_out_node_gets_nothing(backend):
    model, prompt = shared_model("llama"), fan()
    knocked = trace(model, prompt, operations=[Suppress("doc1", 0.0, mode="weight", queries="Q")], backend=backend)
    cut = trace(model, prompt.without_edge("Q", "doc1"), backend=backend)
    for name in ("mass", "hidden_norms", "key_norms", "value_norms"):
        close(getattr(knocked, name), getattr(cut, name))


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
def test_operations_are_seen_at_work(backend):
    model, prompt = shared_model("llama"), fan()
    suppress, freeze = Suppress("doc1", 0.3, layers=[1]), Freeze(layer=1, tokens="doc0")
    plain = trace(model, prompt, backend="sdpa")
    found = trace(model, prompt, operations=[suppress, freeze], backend=backend)
    own = slice(*prompt["doc0"].span)
    close(found.hidden_norms[2, own], found.hidden_norms[1, own])
    assert not torch.allclose(plain.hidden_norms[2, own], plain.hidden_norms[1, own], rtol=1e-2)
    close(found.mass[0], plain.mass[0])
    assert not torch.allclose(found.mass[1], plain.mass[1], atol=1e-2)
    # What eager attention reports under the same operations.
    with torch.no_grad(), intervene(model, prompt, [suppress, freeze], backend="eager") as attention:
        weights = []
        handles = [
            layer.self_attn.register_forward_hook(lambda _m, _a, output: weights.append(output[1][0]))
            for layer in model.model.layers
        ]
        model(**attention.inputs)
        for handle in handles:
            handle.remove()
    close(found.mass, mass_by_loops(torch.stack(weights), prompt))


def test_a_trace_inside_a_block_is_under_its_operations():
    model, prompt = shared_model("llama"), fan()
    alone = trace(model, prompt, operations=[SkipAttention(layers=[0])])
    with intervene(model, prompt, [SkipAttention(layers=[0])]):
        inside = trace(model, prompt)
    close(inside.mass, alone.mass)
    assert not torch.allclose(inside.mass, trace(model, prompt).mass, atol=1e-2)


class Boom(Exception):
    pass


@pytest.mark.parametrize(
    ("family", "backend", "operations"),
    [
        ("llama", "sdpa", []),
        ("llama", "eager", [Freeze(layer=1)]),
        ("gemma2", "flex", []),  # operations need scores, which flex does not show
        ("gpt2", "sdpa", [Freeze(layer=1)]),
    ],
)
def test_nothing_is_left(family, backend, operations):
    model, prompt = make_model(family), fan()
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        before = model(ids).logits
    state = copy.deepcopy(traces(model))
    trace(model, prompt, backend=backend, operations=operations)
    assert traces(model) == state
    layer = Model.of(model).layers[1]
    for exception in (Boom, KeyboardInterrupt):
        handle = layer.register_forward_hook(lambda *_, e=exception: (_ for _ in ()).throw(e()))
        with pytest.raises(exception):
            trace(model, prompt, backend=backend, operations=operations)
        handle.remove()
        assert traces(model) == state
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return out


def test_nothing_is_as_large_as_heads_times_tokens_squared():
    model, prompt = make_model("llama", num_hidden_layers=1), fan(length=150)
    size, heads = len(prompt), 4
    assert size > 450
    # Both probed beforehand.
    for backend in ("sdpa", "eager"):
        trace(model, fan(), backend=backend)
    with Largest() as sdpa:
        trace(model, prompt, backend="sdpa", tokens=("Q", "doc1"), tile_bytes=4 * heads * size * 10)
    assert sdpa.elements <= size * size  # the mask that sdpa itself wants
    with Largest() as eager_itself:
        trace(model, prompt, backend="eager")
    assert eager_itself.elements >= heads * size * size


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layers": 3}, LeattnError, "trace names layer 3; this model has layers 0 to 2"),
        ({"layers": []}, LeattnError, r"layers=\[\] keeps nothing; leave it out for all layers"),
        ({"tokens": ("Q", "nothing")}, GraphError, "nothing"),
        ({"tokens": ("doc0", "Q")}, LeattnError, "'doc0' does not see 'Q', so there is no attention between them"),
        ({"tokens": ["Q"]}, LeattnError, r"tokens is a pair of nodes \(query, key\) or a list of pairs, not \['Q'\]"),
        ({"tile_bytes": 0}, LeattnError, "tile_bytes is a number of bytes of at least 1, not 0"),
        ({"backend": "fast"}, BackendError, "unknown backend 'fast'"),
        ({"operations": ["suppress"]}, LeattnError, "an operation is"),
        ({"operations": [Suppress("nobody", 0.1)]}, LeattnError, "nobody"),
    ],
)
def test_bad_input(options, error, words):
    model = shared_model("llama")
    state = copy.deepcopy(traces(model))
    with pytest.raises(error, match=words):
        trace(model, fan(), **options)
    assert traces(model) == state


def test_several_prompts_and_other_models_are_refused():
    with pytest.raises(LeattnError, match="trace looks at one compiled prompt, not at list; call it for each prompt"):
        trace(shared_model("llama"), [fan(), fan()])
    with pytest.raises(BackendError, match="trace goes through transformers' attention interface, which gptj does not use"):
        trace(shared_model("gptj"), fan(), backend="eager")


def test_half_precision():
    model = make_model("llama").to(torch.bfloat16)
    found = trace(model, fan(), backend="sdpa")
    assert found.dtype == "bfloat16"
    assert found.mass.dtype == found.key_norms.dtype == torch.float32
    close(found.mass.sum(-1), torch.ones(3, 4, 5))
    assert isinstance(found, Trace)
