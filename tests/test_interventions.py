"""Interventions against a Llama run by hand in plain loops (llama_by_hand.py), and what they leave behind: nothing."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from llama_by_hand import run
from models import FAMILIES, make_model, shared_model
from test_attend import fan, traces

import leattn
from leattn import BackendError, LeattnError, compile_prompt
from leattn.interventions import (
    Freeze,
    Inject,
    RandomNoise,
    Shuffle,
    SkipAttention,
    Suppress,
    capture,
    intervene,
)
from leattn.model.record import Model

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
LAYERS = 3


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def logits(model, prompt, operations, backend="eager"):
    with intervene(model, prompt, operations, backend=backend) as attention:
        return model(**attention.inputs, use_cache=False).logits[0]


def default_tokens(prompt):
    """Every token but the last of the one sink."""
    return range(len(prompt) - 1)


def edited_at(chosen_layers, tokens, change):
    """A ``states`` function for llama_by_hand: ``change(layer, token, vector)`` at some tokens of some layers."""

    def states(layer, h):
        if layer not in chosen_layers:
            return h
        rows = [change(layer, token, row) if token in tokens else row for token, row in enumerate(h)]
        return torch.stack(rows)

    return states


# Hidden states


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("source", ["input", "previous"])
@pytest.mark.parametrize("layer", [1, 2])
def test_freeze_holds_a_state_from_a_layer_on(layer, source, backend):
    model, prompt = shared_model("llama"), fan()
    held = {}

    def states(number, h):
        if number == (layer if source == "input" else layer - 1):
            held["h"] = h
        if number < layer:
            return h
        return torch.stack([held["h"][t] if t in default_tokens(prompt) else row for t, row in enumerate(h)])

    expected = run(model, prompt, states=states)
    torch.testing.assert_close(logits(model, prompt, [Freeze(layer, source=source)], backend), expected, **TOLERANCE)
    # Holding the input of the last layer from the last layer on changes nothing, by definition.
    assert torch.allclose(expected, logits(model, prompt, []), atol=1e-3) == (source == "input" and layer == LAYERS - 1)


@pytest.mark.parametrize("tokens", [None, "doc1", [(0, 2), 5, "Q"]])
def test_noise_keeps_the_norm_and_hits_the_chosen_tokens_only(tokens):
    model, prompt = shared_model("llama"), fan()
    where = {None: set(default_tokens(prompt)), "doc1": set(range(*prompt["doc1"].span))}.get(
        tokens if not isinstance(tokens, list) else 0, {0, 1, 5, *range(*prompt["Q"].span)}
    )
    before, after = [], []
    run(model, prompt, hidden_states=before)
    layer = model.model.layers[1]
    with intervene(model, prompt, [RandomNoise(1, tokens, seed=3)]) as attention:
        handle = layer.register_forward_pre_hook(lambda _m, args: after.append(args[0][0]))
        model(**attention.inputs, use_cache=False)
        handle.remove()
    plain, noisy = before[1], after[0]
    torch.testing.assert_close(noisy.norm(dim=-1), plain.norm(dim=-1), **TOLERANCE)
    changed = {t for t in range(len(prompt)) if not torch.allclose(plain[t], noisy[t], atol=1e-4)}
    assert changed == where
    cosines = torch.nn.functional.cosine_similarity(plain, noisy)[sorted(where)]
    assert cosines.abs().max() < 0.75  # a random direction in 48 dimensions


def test_noise_is_seeded():
    model, prompt = shared_model("llama"), fan()
    one, two, other = (logits(model, prompt, [RandomNoise([0, 2], seed=seed)]) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.allclose(one, other)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    drawn = [logits(model, prompt, [RandomNoise(0, seed=generator)]) for generator in generators]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], logits(model, prompt, [RandomNoise(0, seed=generators[0])]))


def test_shuffle_permutes_channels_with_the_published_seeds():
    model, prompt = shared_model("llama"), fan()

    def change(layer, token, vector):
        return vector[torch.randperm(len(vector), generator=torch.Generator().manual_seed(layer * token))]

    expected = run(model, prompt, states=edited_at({2}, default_tokens(prompt), change))
    torch.testing.assert_close(logits(model, prompt, [Shuffle(2, seeding="published")]), expected, **TOLERANCE)
    own = logits(model, prompt, [Shuffle(2, seed=4)])
    assert torch.equal(own, logits(model, prompt, [Shuffle(2, seed=4)]))
    assert not torch.allclose(own, expected, atol=1e-3)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("layers", [[1], [0, 2], range(3)])
def test_skip_attention_adds_nothing_to_the_residual_stream(layers, backend):
    model, prompt = shared_model("llama"), fan()
    expected = run(model, prompt, skipped=set(layers))
    torch.testing.assert_close(logits(model, prompt, [SkipAttention(layers)], backend), expected, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_any_attention_a_token_depends_on_itself_alone(family):
    model, prompt = shared_model(family), fan()
    everything = [SkipAttention(range(LAYERS))]
    whole = logits(model, prompt, everything)
    for node in prompt.graph:
        single = compile_prompt(leattn.ICLNode(prompt[node].input_ids, start_pos_id=int(prompt[node].positions[0])))
        torch.testing.assert_close(whole[slice(*prompt.spans[node])], logits(model, single, everything), **TOLERANCE)


def test_inject_puts_states_of_another_prompt():
    model, prompt, donor = shared_model("llama"), fan(seed=1), fan(seed=2)
    states = capture(model, donor, layer=1)
    taken = []
    run(model, donor, hidden_states=taken)
    torch.testing.assert_close(states["doc1"], taken[1][slice(*donor["doc1"].span)], **TOLERANCE)
    start, _ = prompt["doc1"].span

    def change(layer, token, vector):
        return taken[1][token]

    expected = run(model, prompt, states=edited_at({2}, range(*prompt["doc1"].span), change))
    given = logits(model, prompt, [Inject(2, {"doc1": states["doc1"]})])
    torch.testing.assert_close(given, expected, **TOLERANCE)
    one = run(model, prompt, states=edited_at({2}, {start}, change))
    torch.testing.assert_close(logits(model, prompt, [Inject(2, {start: states[start]})]), one, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_nothing_changes_nothing_to_the_last_bit(family):
    model, prompt = shared_model(family), fan()
    for backend in ("eager", "sdpa"):
        if not leattn.check_model(model)[backend].works:
            continue
        plain = leattn.forward(model, prompt, backend=backend, use_cache=False).logits[0]
        own = capture(model, prompt, layer=1, backend=backend)
        nothing = [
            [],
            [Freeze(LAYERS)],
            [RandomNoise(1, [])],
            [Shuffle(2, [])],
            [SkipAttention([])],
            [Inject(1, own)],
            [Suppress(["doc0", "root"], 1.0)],
            [Suppress(range(len(prompt)), [1.0] * len(prompt), mode="weight", layers=[1])],
            [Suppress("doc1", 0.0, mode="additive")],
            [Suppress("doc1", 0.1, layers=[])],
        ]
        for operations in nothing:
            assert torch.equal(logits(model, prompt, operations, backend), plain), (backend, operations)


# Scores


def suppression(factors, mode, *, layers=range(LAYERS), heads=range(4), queries=None, shift="visible"):
    """A ``scores`` function for llama_by_hand: ``factors`` {key token: factor}."""

    def scores(layer, head, query, row, visible):
        if layer not in layers or head not in heads or (queries is not None and query not in queries):
            return row
        least = min(float(row[j]) for j in range(len(row)) if visible[j] or shift == "all")
        new = row.clone()
        for j, f in factors.items():
            if mode == "multiplicative":
                new[j] = f * row[j] + (1 - f) * least
            elif mode == "additive":
                new[j] = row[j] + f
            else:
                new[j] = row[j] + (torch.tensor(f).log() if f > 0 else -1e9)
        return new

    return scores


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", ["multiplicative", "additive", "weight"])
@pytest.mark.parametrize("factor", [0.1, 2.5])
def test_suppress_by_hand(mode, factor, backend):
    model, prompt = shared_model("llama"), fan()
    tokens = range(*prompt["doc1"].span)
    expected = run(model, prompt, scores=suppression(dict.fromkeys(tokens, factor), mode))
    torch.testing.assert_close(logits(model, prompt, [Suppress("doc1", factor, mode=mode)], backend), expected, **TOLERANCE)
    assert not torch.allclose(expected, logits(model, prompt, []), atol=1e-3)


def test_suppress_chosen_layers_heads_and_queries_with_a_factor_per_token():
    model, prompt = shared_model("llama"), fan()
    start, end = prompt["doc0"].span
    factors = {start: 0.2, start + 1: 3.0, end - 1: 0.0}
    chosen = {"layers": [0, 2], "heads": [1, 3], "queries": set(range(*prompt["Q"].span))}
    expected = run(model, prompt, scores=suppression(factors, "multiplicative", **chosen))
    operation = Suppress(list(factors), list(factors.values()), layers=[0, 2], heads=[1, 3], queries="Q")
    torch.testing.assert_close(logits(model, prompt, [operation]), expected, **TOLERANCE)


@pytest.mark.parametrize("use_cache", [True, False])
def test_suppress_for_generated_tokens_alone(use_cache):
    """What the prompt's own tokens read stays; each new token attends to the document as it is told to."""
    model, prompt = shared_model("llama"), fan()
    factors = dict.fromkeys(range(*prompt["doc1"].span), 4.0)

    def greedy(suppressed):
        written = []
        for _ in range(5):
            longer = prompt.continued(written) if written else prompt
            queries = set(range(len(prompt), len(longer))) if suppressed else set()
            written.append(int(run(model, longer, scores=suppression(factors, "multiplicative", queries=queries))[-1].argmax()))
        return written

    operation = Suppress("doc1", 4.0, queries=[], generated=True)
    with intervene(model, prompt, [operation]) as attention:
        found = model.generate(**attention.inputs, max_new_tokens=5, do_sample=False, use_cache=use_cache)
    assert found[0, len(prompt) :].tolist() == greedy(True) != greedy(False)


def test_the_published_shift_takes_the_minimum_over_masked_keys_too():
    model, prompt = shared_model("llama"), fan()
    factors = dict.fromkeys(range(*prompt["doc1"].span), 0.3)
    expected = run(model, prompt, scores=suppression(factors, "multiplicative", shift="all"))
    given = logits(model, prompt, [Suppress("doc1", 0.3, shift="all")])
    torch.testing.assert_close(given, expected, **TOLERANCE)
    assert not torch.allclose(given, logits(model, prompt, [Suppress("doc1", 0.3)]), atol=1e-4)
    words = "shift='all' lets later tokens change earlier rows"
    with intervene(model, prompt, [Suppress("doc1", 0.3, shift="all")]), pytest.raises(BackendError, match=words):
        model.generate(prompt.input_ids, max_new_tokens=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_of_zero_equals_cutting_the_edges(family):
    """Soft-cap, windows, several heads per key: whatever the family does, an edge without weight is no edge."""
    model, prompt = shared_model(family), fan()
    for backend in ("eager", "sdpa"):
        if not leattn.check_model(model)[backend].works:
            continue
        others = [node for node in prompt.graph if node.id != "doc1"]
        given = logits(model, prompt, [Suppress("doc1", 0.0, mode="weight", queries=others)], backend)
        cut = leattn.forward(model, prompt.without_node("doc1"), backend=backend, use_cache=False).logits[0]
        torch.testing.assert_close(given, cut, **TOLERANCE)


def test_operations_compose_in_order_and_blocks_nest():
    model, prompt = shared_model("llama"), fan()
    noise, shuffle = RandomNoise(1, "doc0", seed=1), Shuffle(1, "doc0", seeding="published")
    suppress, skip = Suppress("doc1", 0.2, layers=[0]), SkipAttention([2])
    together = logits(model, prompt, [noise, shuffle, suppress, skip])
    assert not torch.allclose(together, logits(model, prompt, [suppress, skip]), atol=1e-4)
    with intervene(model, prompt, [noise], backend="eager"):
        with intervene(model, prompt, [shuffle, suppress, skip]) as attention:
            nested = model(**attention.inputs, use_cache=False).logits[0]
        alone = model(prompt.input_ids, use_cache=False).logits[0]
    assert torch.equal(nested, together)
    assert torch.equal(alone, logits(model, prompt, [noise]))


def test_generate_and_forward_inside_the_block_are_intervened_on_too():
    model, prompt = shared_model("llama"), fan()
    operations = [RandomNoise(1, "doc0", seed=1), SkipAttention([2]), Suppress("doc1", 0.2)]
    expected = logits(model, prompt, operations)
    with intervene(model, prompt, operations, backend="eager") as attention:
        inner = leattn.forward(model, prompt, use_cache=False).logits[0]
        continued = leattn.generate(model, prompt, max_new_tokens=4).token_ids
        own = model.generate(**attention.inputs, max_new_tokens=4)[0, len(prompt) :]
        other = fan(seed=5)
        with leattn.attend(model, other):
            elsewhere = model(other.input_ids, use_cache=False).logits[0]
        with pytest.raises(LeattnError, match="no node is called 'doc1'"):
            leattn.forward(model, compile_prompt(leattn.ICLNode([5, 6], id="doc0")))
    assert torch.equal(inner, expected)
    assert continued.tolist() == own.tolist()
    assert torch.equal(elsewhere, logits(model, other, operations))


# Generation, batches, states of the model


OPERATIONS = [
    [Freeze(1)],
    [Freeze(1, generated=True), SkipAttention([2])],
    [RandomNoise(1, seed=2)],
    [RandomNoise([0, 2], "doc1", seed=2, generated=True)],
    [Shuffle(2, generated=True)],
    [SkipAttention([0, 1])],
    [Suppress("doc1", 0.1)],
    [Suppress("doc0", 3.0, mode="weight", heads=0), Suppress("doc2", -2.0, mode="additive", layers=[1])],
]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("operations", OPERATIONS)
def test_generation_with_a_cache_equals_a_full_forward_per_step(family, operations):
    model, prompt = shared_model(family), fan()
    with intervene(model, prompt, operations, backend="eager"):
        cached = model.generate(prompt.input_ids, max_new_tokens=5, do_sample=False, use_cache=True)
        stepwise = model.generate(prompt.input_ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert cached.tolist() == stepwise.tolist()


@pytest.mark.parametrize("operations", [*OPERATIONS, [Suppress("doc1", 0.1, rows=[1])], [RandomNoise(0, rows=[0])]])
def test_a_batch_equals_one_by_one(operations):
    model, prompts = shared_model("llama"), [fan(seed=1, siblings=3), fan(seed=2, siblings=5)]
    with intervene(model, prompts, operations, backend="sdpa") as attention:
        rows = model(**attention.inputs, use_cache=False).logits
    for number, prompt in enumerate(prompts):
        mine = [op for op in operations if getattr(op, "rows", None) is None or number in op.rows]
        single = [copy.copy(op) for op in mine]
        for op in single:
            if getattr(op, "rows", None) is not None:
                object.__setattr__(op, "rows", None)
        torch.testing.assert_close(rows[number, -len(prompt) :], logits(model, prompt, single, "sdpa"), **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exception", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_of_ours_is_left(family, exception):
    model, prompt = shared_model(family), fan()
    ids = torch.arange(2, 14)[None]
    plain, state = model(ids, use_cache=False).logits, copy.deepcopy(traces(model))
    operations = [Freeze(1), RandomNoise(0), SkipAttention([1]), Suppress("doc0", 0.5)]
    if exception is None:
        logits(model, prompt, operations)
    else:
        deep = Model.of(model).layers[2]
        handle = deep.register_forward_hook(lambda *_: (_ for _ in ()).throw(exception()))
        with pytest.raises(exception):
            logits(model, prompt, operations)
        handle.remove()
    assert traces(model) == state
    assert torch.equal(model(ids, use_cache=False).logits, plain)


def test_other_peoples_hooks_survive_and_other_threads_are_left_alone():
    model, prompt = make_model("llama"), fan()
    plain = leattn.forward(model, prompt, backend="eager", use_cache=False).logits
    calls, seen = [], {}
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def work():
        with torch.no_grad():
            seen["plain"] = leattn.forward(model, prompt, backend="eager", use_cache=False).logits

    with intervene(model, prompt, [Freeze(0), SkipAttention([1])], backend="eager") as attention:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        model(**attention.inputs, use_cache=False)
    assert torch.equal(seen["plain"], plain)
    assert len(calls) == 2
    handle.remove()


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (Suppress("nowhere", 0.1), "no node is called 'nowhere'"),
        (Suppress([0, 1], [0.1]), "1 factors for 2 tokens; give one number, or one per token"),
        (Suppress(99, 0.1), "token 99 is outside of the prompt, which has 17 tokens, 0 to 16"),
        (Suppress("doc0", -0.5, mode="weight"), "multiplied by -0.5; weights stay positive"),
        (Suppress("doc0", 0.5, mode="scale"), "unknown mode 'scale'; choose one of 'multiplicative', 'additive', 'weight'"),
        (Suppress("doc0", 0.5, layers=[3]), "Suppress names layer 3; this model has layers 0 to 2"),
        (Suppress("doc0", 0.5, heads=4), "Suppress names head 4; this model has heads 0 to 3"),
        (Suppress("doc0", 0.5, rows=[1]), "row 1 is not in this batch of 1 prompts"),
        (RandomNoise(7), "RandomNoise names layer 7"),
        (SkipAttention([-1]), "SkipAttention names layer -1"),
        (Freeze(0, source="previous"), "has no layer before"),
        (
            Inject(1, {"doc0": torch.zeros(2, 48)}),
            r"Inject at 'doc0' has states \[2, 48\] for 3 tokens; give \[3, hidden size\]",
        ),
        ("freeze", "an operation is Suppress, Freeze, .* not 'freeze'"),
        (RandomNoise(1, (4, 4)), r"the span \(4, 4\) is empty"),
    ],
)
def test_bad_operations_are_refused_before_anything_runs(operation, words):
    model, prompt = shared_model("llama"), fan()
    with pytest.raises(LeattnError, match=words), intervene(model, prompt, [operation]):
        pytest.fail("the block was entered")
    assert not model.model._forward_pre_hooks


def test_backends_and_models_that_cannot_carry_an_operation_are_refused():
    with pytest.raises(BackendError, match="which backend 'flex' cannot carry; use backend='eager' or 'sdpa'"):
        logits(shared_model("llama"), fan(), [Suppress("doc0", 0.1)], "flex")
    with pytest.raises(BackendError, match="attention interface, which gptj does not use"):
        logits(shared_model("gptj"), fan(), [Suppress("doc0", 0.1)])
    model = make_model("llama").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(BackendError, match=r"call model.gradient_checkpointing_disable\(\) first"):
        logits(model, fan(), [Freeze(1)])
