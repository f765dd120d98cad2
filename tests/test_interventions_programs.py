"""Interventions inside programs: what a program does under them is what its realised prompt does, by hand in plain loops."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_by_hand import run
from models import shared_model
from test_attend import traces
from test_interventions import TOLERANCE, suppression
from test_programs import ids, programs, two_rounds

import leattn
from leattn import BackendError, GenNode, ICLGraph, ICLNode, KVStore, LeattnError, compile_prompt, generate
from leattn.generation.branch import Branch
from leattn.interventions import (
    Average,
    Freeze,
    Inject,
    RandomNoise,
    Recorded,
    Selection,
    Shuffle,
    SkipAttention,
    Suppress,
    capture,
    intervene,
)
from leattn.patterns import paraphrase_ensemble

HIDDEN = 48


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def logits_of(monkeypatch):
    """Runs a program under operations: the result, and the logits of each step of each branch, ``[steps, V]`` by name."""
    seen = {}
    choose = Branch.choose

    def watched(self, logits, likeliest=None):
        seen.setdefault(self.name, []).append(logits.clone())
        choose(self, logits, likeliest)

    monkeypatch.setattr(Branch, "choose", watched)

    def program(model, graph, operations, **options):
        seen.clear()
        with intervene(model, None, operations):
            result = generate(model, graph, **options)
        return result, {name: torch.stack(steps) for name, steps in seen.items()}

    return program


def places(result, prompt):
    """For each branch the tokens of the realised prompt from which its tokens were chosen."""
    found = {}
    for name, (sequence,) in result.branches.items():
        count = len(sequence.token_ids)
        if result.prompt is None:
            stop = prompt.spans[prompt.graph[name]][1]
            found[name] = list(range(stop - count - 1, stop - 1))
        else:
            start, _ = prompt.spans[prompt.graph[f"{name} (continued)"]]
            found[name] = [prompt.spans[prompt.graph[name]][1] - 1, *range(start, start + count - 1)]
    return found


def check(result, steps, prompt, expected):
    """Every step's logits are those at its token of the realised prompt, and what was written is their argmax."""
    assert set(steps) == set(result.branches)
    for name, at in places(result, prompt).items():
        torch.testing.assert_close(steps[name], expected[at], **TOLERANCE)
        assert steps[name].argmax(-1).tolist() == result.branches[name][0].token_ids.tolist()


def realised_logits(model, prompt, operations):
    with intervene(model, prompt, operations, backend="eager") as attention:
        return model(**attention.inputs, use_cache=False).logits[0]


def sinks():
    """Three questions over a document, each of which goes on."""
    root = ICLNode(ids(2, 0), id="root")
    doc = ICLNode(ids(6, 1), [root], id="doc")
    return ICLGraph(*(ICLNode(ids(3 + i, 2 + i), [root, doc], id=f"q{i}") for i in range(3)))


class Nudge:
    """An operation on states as one writes it in a notebook: the tokens of some nodes are pushed, written ones further."""

    def __init__(self, layer, nodes):
        self.layer, self.nodes = layer, nodes

    def bind(self, subject):
        selection = Selection.build(subject, self.nodes)

        def edit(state, hidden):
            if state.layer != self.layer:
                return hidden
            chosen = selection.at(state.queries)
            return torch.where(chosen[..., None], hidden * (2 + state.queries.indices[..., None] % 2), hidden)

        return SimpleNamespace(edit=edit)


class Prefer:
    """An operation on scores as one writes it in a notebook: some queries look more at what they see of a node."""

    def __init__(self, queries, key, by):
        self.queries, self.key, self.by = queries, key, by

    def bind(self, subject):
        queries, keys = Selection.build(subject, self.queries), Selection.build(subject, self.key)

        def scores(state, scores, visible):
            pairs = queries.at(state.queries)[:, None, :, None] & keys.at(state.keys)[:, None, None] & visible
            return torch.where(pairs, scores + self.by * (state.layer + 1), scores)

        return SimpleNamespace(scores=scores)


class Half:
    """An operation on what attention adds, for chosen queries."""

    def __init__(self, node):
        self.node = node

    def bind(self, subject):
        chosen = Selection.build(subject, self.node)
        return SimpleNamespace(
            attended=lambda state, output: torch.where(chosen.at(state.queries)[..., None], output / 2, output)
        )


STATES = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(0))
ALIKE = {
    "suppress written keys": [Suppress("draft0", 0.1)],
    "suppress by weight": [Suppress(["context", "draft1"], 0.3, mode="weight", queries=["middle", "last"], layers=[0, 2])],
    "amplify in one head": [Suppress("middle", 3.0, mode="additive", heads=1, queries="last")],
    "factors by token": [Suppress(["context", "note"], [0.1 * i for i in range(9)])],
    "skip": [SkipAttention([1])],
    "freeze": [Freeze(1, ["draft0", "last"])],
    "freeze as published": [Freeze(2, ["context", "draft2"], source="previous")],
    "noise": [RandomNoise([0, 1], ["draft1", "context"], seed=3)],
    "noise at an angle": [RandomNoise(1, "note", angle=40)],
    "shuffle": [Shuffle(2, ["draft0", "middle"], seed=1)],
    "inject": [Inject(1, {"context": STATES, "note": STATES[:3]})],
    "by index": [RandomNoise(1, [0, (2, 5)]), Inject(2, {7: STATES[0]})],
    "states of one's own": [Nudge(1, ["draft0", "note", "last"])],
    "scores of one's own": [Prefer(["middle", "last"], "draft0", 1.5)],
    "attention of one's own": [Half("draft1")],
    "several": [Suppress("draft1", 0.2), Freeze(2, "context"), Nudge(0, "middle"), SkipAttention([0])],
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_program_does_what_its_realised_prompt_does(name, logits_of):
    model, graph = shared_model("llama"), two_rounds()
    result, steps = logits_of(model, graph, ALIKE[name])
    prompt = compile_prompt(result.realised)
    check(result, steps, prompt, realised_logits(model, prompt, ALIKE[name]))
    plain = logits_of(model, graph, [])[1]
    assert any(not torch.allclose(plain[branch][0], steps[branch][0], atol=1e-3) for branch in steps)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
@pytest.mark.parametrize("name", ["several", "noise", "suppress by weight"])
def test_in_other_families(family, name, logits_of):
    model = shared_model(family)
    result, steps = logits_of(model, two_rounds(), ALIKE[name])
    prompt = compile_prompt(result.realised)
    check(result, steps, prompt, realised_logits(model, prompt, ALIKE[name]))


@settings(max_examples=8)
@given(graph=programs(), data=st.data())
def test_any_program_under_any_budget(graph, data):
    model = shared_model("llama")
    names = st.lists(st.sampled_from([node.id for node in graph]), min_size=1, unique=True)
    operations = [
        Suppress(data.draw(names), 0.2, mode="weight", queries=data.draw(names)),
        RandomNoise(1, data.draw(names)),
        Freeze(2, data.draw(names), source="previous"),
    ]
    with intervene(model, None, operations):
        result = generate(model, graph, token_budget=data.draw(st.integers(1, 12)))
    prompt = compile_prompt(result.realised)
    logits = realised_logits(model, prompt, operations)
    for name, at in places(result, prompt).items():
        new = result.branches[name][0].token_ids
        assert (logits[at].max(-1).values - logits[at, new]).max() < 1e-3


# By hand


def spans(prompt, *names):
    return {token for name in names for token in range(*prompt[name].span)}


def test_suppression_of_what_is_written_by_hand(logits_of):
    """All that sees a draft sees it less, while the drafts are still being written side by side."""
    model = shared_model("llama")
    result, steps = logits_of(model, two_rounds(), [Suppress("draft0", 0.1, queries=["draft0", "last"])])
    prompt = compile_prompt(result.realised)
    factors = dict.fromkeys(spans(prompt, "draft0"), 0.1)
    hand = suppression(factors, "multiplicative", queries=spans(prompt, "draft0", "last"))
    check(result, steps, prompt, run(model, prompt, scores=hand))


@pytest.mark.parametrize("mode", ["multiplicative", "additive"])
def test_suppression_for_generated_tokens_alone_by_hand(mode, logits_of):
    model, graph = shared_model("llama"), two_rounds()
    result, steps = logits_of(model, graph, [Suppress("context", 4.0, mode=mode, queries=[], generated=True)])
    prompt = compile_prompt(result.realised)
    headers = {name: len(graph[name].content) for name in result.branches}
    new = {token for name, n in headers.items() for token in range(prompt[name].span[0] + n, prompt[name].span[1])}
    hand = suppression(dict.fromkeys(spans(prompt, "context"), 4.0), mode, queries=new)
    check(result, steps, prompt, run(model, prompt, scores=hand))


def test_default_tokens_and_generated_ones_by_hand(logits_of):
    """All that is known beforehand but the header's last token of the sink; what is written only where it is asked for."""
    model, graph = shared_model("llama"), two_rounds()
    for generated in (False, True):
        result, steps = logits_of(model, graph, [Freeze(1, generated=generated)])
        prompt = compile_prompt(result.realised)
        chosen = set(range(len(prompt))) - {prompt["last"].span[0] + 1}
        if not generated:
            for name in result.branches:
                start, stop = prompt[name].span
                chosen -= set(range(start + len(graph[name].content), stop))
        held = {}

        def states(layer, h, held=held, chosen=chosen):
            if layer == 1:
                held["h"] = h
            return h if layer < 1 else torch.stack([held["h"][t] if t in chosen else row for t, row in enumerate(h)])

        check(result, steps, prompt, run(model, prompt, states=states))


def test_states_for_a_header_and_means_of_headers_by_hand(logits_of):
    model = shared_model("llama")
    result, steps = logits_of(model, two_rounds(), [Inject(1, {"last": STATES[:2]}), Average(2, ["draft0", "draft1"])])
    prompt = compile_prompt(result.realised)
    last, first, second = (prompt[name].span[0] for name in ("last", "draft0", "draft1"))

    def states(layer, h):
        h = h.clone()
        if layer == 1:
            h[last : last + 2] = STATES[:2]
        if layer == 2:
            for i in range(4):
                h[[first + i, second + i]] = (h[first + i] + h[second + i]) / 2
        return h

    check(result, steps, prompt, run(model, prompt, states=states))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_weight_of_zero_is_a_graph_without_the_edge(family, logits_of):
    model, graph = shared_model(family), two_rounds()
    without, steps = logits_of(model, graph, [Suppress("draft0", 0.0, mode="weight", queries="last")])
    old = graph["last"]
    cut = GenNode(old.content, [p for p in old.parents if p.id != "draft0"], "last", max_new_tokens=old.max_new_tokens)
    expected, cut_steps = logits_of(model, ICLGraph(cut), [])
    assert without.texts == expected.texts
    assert without["draft0"] == generate(model, graph)["draft0"]
    for name, logits in steps.items():
        torch.testing.assert_close(logits, cut_steps[name], **TOLERANCE)
    assert not torch.allclose(steps["last"][0], logits_of(model, graph, [])[1]["last"][0], atol=1e-3)


def test_own_operations_are_told_what_they_are_given():
    """Names, places in their nodes, and what was written, of queries and keys; against what the realised prompt says."""
    told, visibles = {}, {}

    def edit(state, hidden):
        queries = state.queries
        for i, (name, index) in enumerate(zip(queries.names[0], queries.indices[0].tolist(), strict=True)):
            told[name, index] = bool(queries.generated[0, i])
        assert hidden.shape[:2] == queries.indices.shape
        return hidden

    def scores(state, scores, visible):
        names = [list(zip(tokens.names[0], tokens.indices[0].tolist(), strict=True)) for tokens in (state.queries, state.keys)]
        for query, row in zip(names[0], visible.expand_as(scores)[0, 0], strict=True):
            visibles[query] = {key for key, sees in zip(names[1], row, strict=True) if sees}
        return scores

    own = SimpleNamespace(bind=lambda subject: SimpleNamespace(edit=edit, scores=scores))
    model, graph = shared_model("llama"), two_rounds()
    with intervene(model, None, [own]):
        result = generate(model, graph, token_budget=5)
    prompt = compile_prompt(result.realised)
    tokens = [(prompt.graph.names[node], i) for node in prompt.graph for i in range(len(prompt[node].input_ids))]
    mask = prompt.dense_mask()
    fed = tokens[:-1]  # nobody sees the last token, so it is not computed
    assert set(told) == set(visibles) == set(fed)
    for token, seen in zip(fed, mask, strict=False):
        node = graph[token[0]]
        assert told[token] == (isinstance(node, GenNode) and token[1] >= len(node.content))
        assert visibles[token] == {key for key, sees in zip(tokens, seen, strict=True) if sees}


def test_edits_are_recorded_by_node():
    model, graph = shared_model("llama"), two_rounds()
    noise = Recorded(RandomNoise(1, ["draft1", "context"]))
    with intervene(model, None, [noise]):
        generate(model, graph)
    assert {(edit.node, edit.place) for edit in noise.edits} == {
        *(("context", i) for i in range(6)),
        *(("draft1", i) for i in range(4 + 5)),
    }
    assert {edit.token for edit in noise.edits} == {None}


# Several sinks, ensembles, lists, stores


@pytest.mark.parametrize(
    "operations",
    [
        [Suppress("doc", 0.2), Freeze(1, ["q0", "root"])],
        [Suppress("q1 (continued)", 0.1), RandomNoise(1, ["q0 (continued)", "q2"])],
        [Average(1, ["q0"]), Nudge(1, ["q2 (continued)", 3])],
    ],
)
def test_branches_that_continue_sinks(operations, logits_of):
    model = shared_model("llama")
    result, steps = logits_of(model, sinks(), operations, max_new_tokens=4)
    prompt = compile_prompt(result.realised)
    check(result, steps, prompt, realised_logits(model, prompt, operations))


def test_one_sink_is_continued_under_the_same_names():
    model = shared_model("llama")
    sink = compile_prompt(sinks()["q1"])
    operations = [Suppress("q1 (continued)", 5.0), RandomNoise(1, "q1 (continued)")]
    with intervene(model, None, operations):
        result = generate(model, sink, max_new_tokens=5)
    prompt = compile_prompt(result.realised)
    at = places(result, prompt)["q1"]
    assert realised_logits(model, prompt, operations)[at].argmax(-1).tolist() == result.token_ids.tolist()
    assert result.text != generate(model, sink, max_new_tokens=5).text


def test_an_ensemble_of_phrasings_with_averaged_states_by_hand():
    model = shared_model("llama")
    prompt = compile_prompt(sinks())
    lasts = [prompt.spans[sink][1] - 1 for sink in prompt.graph.sinks]

    def states(layer, h):
        return torch.cat([h[lasts].mean(0)[None] if t in lasts else h[t : t + 1] for t in range(len(h))]) if layer == 1 else h

    expected = run(model, prompt, states=states)[lasts].softmax(-1)
    with intervene(model, None, [Average(1)]):
        together = paraphrase_ensemble(model, prompt, max_new_tokens=3)
    torch.testing.assert_close(together.first_step, expected, **TOLERANCE)
    assert int(together.token_ids[0]) == int(expected.mean(0).argmax())
    assert not torch.allclose(expected, paraphrase_ensemble(model, prompt, max_new_tokens=1).first_step, atol=1e-4)


def test_programs_in_a_list_are_each_what_they_are_alone():
    model, context = shared_model("llama"), ICLNode(ids(20, 0), id="context")

    def program(seed):
        draft = GenNode(ids(3, seed), [context], "draft", max_new_tokens=4)
        return ICLGraph(GenNode(ids(2, seed + 1), [draft, context], "final", max_new_tokens=3))

    graphs = [program(1), program(3)]
    everywhere = [Suppress("draft", 0.1, queries="final"), RandomNoise(1, "context"), Freeze(1)]
    with intervene(model, None, everywhere):
        together = generate(model, graphs)
        alone = [generate(model, graph).texts for graph in graphs]
    assert [result.texts for result in together] == alone
    with intervene(model, None, [RandomNoise(1, "draft", rows=[1])]):
        first, second = generate(model, graphs)
    with intervene(model, None, [RandomNoise(1, "draft")]):
        assert second.texts == generate(model, graphs[1]).texts
    assert first.texts == generate(model, graphs[0]).texts
    words = "RandomNoise: node 'context' stands in the sequence once, for targets 0 and 1, which do not ask the same of it"
    with intervene(model, None, [RandomNoise(1, "context", rows=[1])]), pytest.raises(LeattnError, match=words):
        generate(model, graphs)


def test_a_store_is_neither_read_nor_written():
    model, graph, store = shared_model("llama"), two_rounds(), KVStore()
    operations = [RandomNoise(1, "context")]
    generate(model, graph, kv_store=store)
    entries = len(store)
    with intervene(model, None, operations):
        plain, stored = generate(model, graph), generate(model, graph, kv_store=store)
        with pytest.raises(BackendError, match="so none can be warmed; leave the block first"):
            leattn.warm(model, ICLNode(ids(3, 0)), kv_store=store, progress=False)
    assert stored.texts == plain.texts
    assert (stored.stats.reused, len(store)) == (0, entries)


def test_forgetting_what_nobody_sees_changes_nothing(monkeypatch):
    model = shared_model("gemma3_text")

    def chain():
        node = ICLNode(ids(3, 0), id="start")
        for i in range(12):
            node = GenNode(ids(2, i), [node], f"g{i}", max_new_tokens=2)
        return ICLGraph(node)

    operations = [Suppress("g7", 0.2, queries="g8"), RandomNoise(1, ["g3", "g9"]), Freeze(1, "g10")]
    with intervene(model, None, operations):
        kept = generate(model, chain())
        monkeypatch.setattr(leattn.generation.schedule, "COMPACT", 8)
        assert generate(model, chain()).texts == kept.texts != generate(shared_model("llama"), chain()).texts


# Blocks


def test_blocks_nest_and_a_block_with_a_prompt_holds_for_programs_too():
    model, graph = shared_model("llama"), two_rounds()
    noise, shuffle = RandomNoise(1, "context"), Shuffle(1, "context")
    with intervene(model, None, [noise, shuffle]):
        together = generate(model, graph).texts
    with intervene(model, None, [noise]):
        with intervene(model, None, [shuffle]):
            nested = generate(model, graph).texts
        alone = generate(model, graph).texts
    assert nested == together != alone
    prompt = compile_prompt(graph["context"])
    with intervene(model, prompt, [noise]) as attention:
        assert generate(model, graph).texts == alone
        inside = model(**attention.inputs, use_cache=False).logits
    with intervene(model, None, [noise]):
        assert torch.equal(leattn.forward(model, prompt, use_cache=False).logits, inside)
        states = capture(model, prompt, layer=1)
    assert not torch.allclose(states.hidden, capture(model, prompt, layer=1).hidden, atol=1e-3)


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_nothing_of_ours_is_left(exception):
    model, tokens = shared_model("llama"), torch.arange(2, 14)[None]
    plain, state = model(tokens, use_cache=False).logits, copy.deepcopy(traces(model))

    def stop(*_):
        raise exception

    operations = [Freeze(1), SkipAttention([2]), Suppress("context", 0.3)]
    with pytest.raises(exception), intervene(model, None, operations):
        generate(model, two_rounds(), streamer=stop)
    assert traces(model) == state
    with intervene(model, None, operations):
        result = generate(model, two_rounds(), streamer=stop if exception is KeyboardInterrupt else None, on_interrupt="return")
    assert result.complete == (exception is RuntimeError)
    assert traces(model) == state
    assert torch.equal(model(tokens, use_cache=False).logits, plain)


def test_a_block_without_a_prompt_has_nothing_to_call_the_model_with():
    model, words = shared_model("llama"), "has no prompt of its own to call the model with"
    with intervene(model, None, [Freeze(1, "whoever")]) as attention:
        with pytest.raises(BackendError, match=words):
            _ = attention.inputs
        with pytest.raises(BackendError, match=words):
            model(torch.arange(2, 9)[None])
        with pytest.raises(BackendError, match=words):
            model.generate(torch.arange(2, 9)[None], max_new_tokens=2)
        with pytest.raises(LeattnError, match="no node is called 'whoever'"):
            generate(model, two_rounds())
    with pytest.raises(LeattnError, match="are about prompts, and here are none"):
        intervene(model, None, [], backend="eager").__enter__()


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (Suppress("nowhere", 0.1), "no node is called 'nowhere'"),
        (Suppress(12, 0.1), "token 12 has no index yet: what stands before it is still to be written; .* below 10"),
        (Suppress(["context", "draft0"], [0.1] * 10), "how many tokens will be written is not known; give one number"),
        (Suppress("context", 0.1, shift="all"), "use_cache=False, and no program"),
        (RandomNoise(1, seeding="published"), "run result.realised as a prompt"),
        (Shuffle(1, "context", seeding="published"), "run result.realised as a prompt"),
        (Inject(1, {"last": STATES}), r"Inject at 'last' has states \[6, 48\] for 2 tokens"),
        (Average(1, ["draft0", "context"]), "the places in prompt 0 name 4, 6 tokens"),
    ],
)
def test_what_a_program_cannot_know_is_refused_before_anything_runs(operation, words):
    model, forwards = shared_model("llama"), []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with intervene(model, None, [operation]), pytest.raises(LeattnError, match=words):
        generate(model, two_rounds())
    handle.remove()
    assert not forwards


def test_means_over_several_forwards_are_refused():
    model = shared_model("llama")
    words = "a token of 'middle' goes through the model in another forward"
    with intervene(model, None, [Average(1, ["middle", "last"])]), pytest.raises(BackendError, match=words):
        generate(model, two_rounds())
    with intervene(model, None, [Average(1)]), pytest.raises(BackendError, match="a token_budget"):
        generate(model, sinks(), max_new_tokens=2, token_budget=12)
