"""Reuse of keys and values: whatever subset of nodes the store has, the results are those of the cold run."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import shared_model
from strategies import VISIBILITIES, node_lists
from test_generation import assert_equal_up_to_ties, fan, oracle
from test_programs import ids, two_rounds

import leattn
from leattn import GenNode, ICLGraph, ICLNode, KVStore, LeattnError, compile_prompt, generate

FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt_neox", "gpt2", "phi3"]


def store(**options):
    return KVStore(max_bytes=2**26, **options)


def sink_logits(model, prompt):
    """The cold run: one eager forward over all of the prompt, the sinks' rows."""
    with torch.no_grad():
        logits = leattn.forward(model, prompt, backend="eager").logits[0]
    return torch.cat([logits[slice(*prompt.spans[sink])] for sink in prompt.graph.sinks])


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6)
@given(nodes=node_lists(max_nodes=6), visibility=VISIBILITIES, data=st.data())
def test_logits_with_any_subset_of_nodes_cached_equal_the_cold_run(family, backend, nodes, visibility, data):
    model, graph, kept = shared_model(family), ICLGraph(*nodes), store()
    prompt = compile_prompt(graph, visibility=visibility)
    subset = data.draw(st.lists(st.sampled_from(graph.nodes), unique=True))
    for node in subset:
        leattn.forward(model, compile_prompt(node, visibility=visibility), kv_store=kept, backend=backend)
    logits = leattn.forward(model, prompt, kv_store=kept, backend=backend).logits[0]
    torch.testing.assert_close(logits, sink_logits(model, prompt), atol=1e-4, rtol=1e-4)
    again = leattn.forward(model, prompt, kv_store=kept, backend=backend).logits[0]
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_are_reused_in_other_orders_combinations_and_offsets(family):
    model, kept = shared_model(family), store()
    root = ICLNode(ids(2, 0), id="root")
    contents = [ids(5 + i, 1 + i) for i in range(4)]

    def prompt(order, question, before=0):
        top = [root]
        if before:
            top = [ICLNode(ids(before, 50), [], id="before"), ICLNode(ids(2, 0), [], id="root", start_pos_id=before)]
        documents = [ICLNode(contents[i], top[-1:], id=f"doc{i}") for i in order]
        return compile_prompt(ICLNode(question, [*top, *documents], id="Q"))

    first = prompt([0, 1, 2, 3], ids(4, 20))
    leattn.forward(model, first, kv_store=kept)
    for order in itertools.permutations(range(4), 3):
        other = prompt(order, ids(3, 21 + sum(order)))
        before = kept.stats
        logits = leattn.forward(model, other, kv_store=kept).logits[0]
        torch.testing.assert_close(logits, sink_logits(model, other), atol=1e-4, rtol=1e-4)
        assert kept.stats.hits - before.hits == 4
        assert kept.stats.misses == before.misses
    shifts = leattn.check_model(model)["shifted reuse"].works
    moved, before = prompt([2, 0], ids(4, 30), before=9), kept.stats
    logits = leattn.forward(model, moved, kv_store=kept).logits[0]
    torch.testing.assert_close(logits, sink_logits(model, moved), atol=1e-4, rtol=1e-4)
    assert kept.stats.hits - before.hits == (3 if shifts else 0)


@pytest.mark.parametrize("edit", ["token", "edge", "position"])
def test_an_edited_ancestor_misses(edit):
    model, kept = shared_model("llama"), store()

    def prompt(token=7, edge=True, start=None):
        root = ICLNode([5, token], id="root")
        middle = ICLNode([8, 9], [root] if edge else [], id="middle", start_pos_id=start or 2)
        leaf = ICLNode([10, 11, 12], [root, middle], id="leaf", start_pos_id=10)
        return compile_prompt(ICLNode([13], [leaf], id="Q"))

    leattn.forward(model, prompt(), kv_store=kept)
    edited = prompt(**{"token": {"token": 6}, "edge": {"edge": False}, "position": {"start": 3}}[edit])
    before = kept.stats
    logits = leattn.forward(model, edited, kv_store=kept).logits[0]
    torch.testing.assert_close(logits, sink_logits(model, edited), atol=1e-4, rtol=1e-4)
    middle_or_root = kept.stats.hits - before.hits
    # The leaf, which the question sees, is never found; above it, only what the edit left alone.
    assert middle_or_root == {"token": 0, "edge": 1, "position": 1}[edit]


def test_two_equal_siblings_count_twice():
    model, kept = shared_model("llama"), store()

    def prompt(copies):
        root = ICLNode(ids(2, 0))
        siblings = [ICLNode(ids(4, 1), [root]) for _ in range(copies)]
        middle = ICLNode(ids(3, 2), siblings, start_pos_id=10)
        return compile_prompt(ICLNode(ids(2, 3), [middle], start_pos_id=20))

    results = []
    for copies in (1, 2, 3, 2):
        logits = leattn.forward(model, prompt(copies), kv_store=kept).logits[0]
        torch.testing.assert_close(logits, sink_logits(model, prompt(copies)), atol=1e-4, rtol=1e-4)
        results.append(logits)
    assert (results[0] - results[1]).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_store_equals_the_cold_one(family, backend):
    model, kept = shared_model(family), store()
    for seed in (0, 0, 1):  # the third prompt shares nothing
        prompt = fan(seed)
        expected, margins = oracle(model, prompt, 6)
        result = generate(model, prompt, kv_store=kept, backend=backend, max_new_tokens=6)
        assert_equal_up_to_ties(result.token_ids.tolist(), expected, margins)
    warm = generate(model, fan(0), kv_store=kept, backend=backend, max_new_tokens=6)
    prompt = fan(0)
    assert warm.stats.reused == len(prompt) - len(prompt["Q"].input_ids)
    assert warm.stats.computed == len(prompt["Q"].input_ids) + 5
    assert warm.stats.steps == 6


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_beams_and_return_sequences_with_a_store(options):
    model, kept, prompt = shared_model("llama"), store(), fan(4)
    cold = generate(model, prompt, max_new_tokens=6, seed=1, **options)
    for _ in range(2):
        warm = generate(model, prompt, max_new_tokens=6, seed=1, kv_store=kept, **options)
        assert [s.token_ids.tolist() for s in warm.sequences] == [s.token_ids.tolist() for s in cold.sequences]


def test_a_chain_needs_only_its_last_link():
    """The last node sees one node; what that one saw is neither computed nor loaded again."""
    model, kept = shared_model("llama"), store()

    def prompt(question):
        node = ICLNode(ids(3, 0))
        for i in range(5):
            node = ICLNode(ids(3, i), [node])
        return compile_prompt(ICLNode(question, [node]))

    generate(model, prompt(ids(2, 8)), kv_store=kept, max_new_tokens=2)
    result = generate(model, prompt(ids(2, 9)), kv_store=kept, max_new_tokens=4)
    assert (result.stats.reused, result.stats.computed) == (3, 2 + 3)
    expected, margins = oracle(model, prompt(ids(2, 9)), 4)
    assert_equal_up_to_ties(result.token_ids.tolist(), expected, margins)


def test_edits_of_a_prompt_are_seen():
    model, kept, prompt = shared_model("llama"), store(), fan(2)
    leattn.forward(model, prompt, kv_store=kept)
    for edited in (prompt.without_edge("doc1", "root"), prompt.without_node("doc0"), prompt.without_edge("Q", "doc2")):
        logits = leattn.forward(model, edited, kv_store=kept).logits[0]
        torch.testing.assert_close(logits, sink_logits(model, edited), atol=1e-4, rtol=1e-4)
        result = generate(model, edited, kv_store=kept, max_new_tokens=4)
        expected, margins = oracle(model, edited, 4)
        assert_equal_up_to_ties(result.token_ids.tolist(), expected, margins)


def test_a_second_program_reuses_the_first():
    model, kept = shared_model("llama"), store()
    first = generate(model, two_rounds(), kv_store=kept)
    assert first.stats.reused == 0
    realised = first.realised

    def extended(graph):
        return ICLGraph(GenNode(ids(3, 40), [graph["context"], graph["draft0"], graph["middle"]], "next", max_new_tokens=4))

    cold, warm = generate(model, extended(realised)), generate(model, extended(realised), kv_store=kept)
    assert warm.texts == cold.texts
    assert warm.stats.computed == 3 + 3
    assert warm.stats.reused == sum(len(compile_prompt(realised)[name].input_ids) for name in ("context", "draft0", "middle"))


def test_a_batch_of_prompts_with_a_store_runs_together():
    model, kept = shared_model("llama"), store()
    prompts = [fan(0), fan(1), fan(0)]
    cold = [generate(model, prompt, max_new_tokens=5).text for prompt in prompts]
    for _ in range(2):
        assert [result.text for result in generate(model, prompts, kv_store=kept, max_new_tokens=5)] == cold


def test_several_sinks_with_a_store():
    model, kept = shared_model("llama"), store()
    context = ICLNode(ids(9, 0), id="context")
    graph = ICLGraph(*(ICLNode(ids(3, i + 1), [context], id=f"q{i}") for i in range(3)))
    cold = generate(model, graph, max_new_tokens=4).texts
    assert generate(model, graph, max_new_tokens=4, kv_store=kept).texts == cold
    again = generate(model, graph, max_new_tokens=4, kv_store=kept)
    assert again.texts == cold
    assert again.stats.reused == 9


def test_changed_weights_miss():
    model, kept, prompt = leattn.tiny.load()[0], store(), fan(0)
    leattn.forward(model, prompt, kv_store=kept)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    logits = leattn.forward(model, prompt, kv_store=kept).logits[0]
    assert kept.stats.hits == 0
    torch.testing.assert_close(logits, sink_logits(model, prompt), atol=1e-4, rtol=1e-4)


def test_under_intervene_the_store_is_neither_read_nor_written():
    model, kept, prompt = shared_model("llama"), store(), fan(0)
    operation = leattn.interventions.RandomNoise(0, "doc0", seed=1)
    with leattn.interventions.intervene(model, prompt, [operation]):
        expected = leattn.forward(model, prompt).logits[0, slice(*prompt.spans[prompt.graph["Q"]])]
        logits = leattn.forward(model, prompt, kv_store=kept).logits[0]
        generate(model, prompt, kv_store=kept, max_new_tokens=2)
    torch.testing.assert_close(logits, expected)
    assert len(kept) == 0
    assert kept.stats.misses == 0


def test_warming(capsys):
    model, kept, prompt = shared_model("llama"), store(), fan(0)
    leattn.warm(model, prompt.graph.nodes[:-1], kv_store=kept)
    assert "4/4" in capsys.readouterr().err
    logits = leattn.forward(model, prompt, kv_store=kept).logits[0]
    torch.testing.assert_close(logits, sink_logits(model, prompt), atol=1e-4, rtol=1e-4)
    assert kept.stats.hits == 4
    leattn.warm(model, prompt, kv_store=kept, progress=False)
    assert len(kept) == 5


def test_a_small_store_only_computes_more():
    model, prompt = shared_model("llama"), fan(0)
    for size in (1, 3000, 9000):
        kept = KVStore(max_bytes=size)
        for _ in range(3):
            logits = leattn.forward(model, prompt, kv_store=kept).logits[0]
            torch.testing.assert_close(logits, sink_logits(model, prompt), atol=1e-4, rtol=1e-4)
            assert kept.nbytes <= size


def test_eight_threads_on_one_store():
    model, kept = shared_model("llama"), store()
    prompts = [fan(seed % 3) for seed in range(8)]
    expected = [sink_logits(model, prompt) for prompt in prompts]
    wrong = []

    def work(i):
        for _ in range(3):
            logits = leattn.forward(model, prompts[i], kv_store=kept, backend="sdpa").logits[0]
            if not torch.allclose(logits, expected[i], atol=1e-4, rtol=1e-4):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_restart_finds_what_was_stored(tmp_path):
    model, prompt = shared_model("llama"), fan(0)
    leattn.forward(model, prompt, kv_store=store(directory=tmp_path))
    fresh = store(directory=tmp_path)
    logits = leattn.forward(model, prompt, kv_store=fresh).logits[0]
    assert fresh.stats.hits == 4
    torch.testing.assert_close(logits, sink_logits(model, prompt), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"past_key_values": object()}, "past_key_values and kv_store"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation and kv_store"),
    ],
)
def test_what_does_not_go_together_with_a_store(options, words):
    with pytest.raises(LeattnError, match=words):
        generate(shared_model("llama"), fan(0), kv_store=store(), max_new_tokens=2, **options)


def test_forward_with_a_store_says_what_it_does_not_take():
    model, prompt = shared_model("llama"), fan(0)
    for prompts, options, words in [
        ([prompt], {}, "takes one prompt"),
        (prompt, {"mask": torch.ones(1, 1, 99, 99, dtype=torch.bool)}, "give mask or kv_store"),
        (prompt, {"use_cache": True}, "use_cache does not go together"),
        (prompt, {"output_hidden_states": True}, "output_hidden_states does not go together"),
    ]:
        with pytest.raises(LeattnError, match=words):
            leattn.forward(model, prompts, kv_store=store(), **options)


def test_something_else_than_a_store_is_refused():
    for run in (leattn.forward, generate):
        with pytest.raises(LeattnError, match=r"kv_store is a leattn.KVStore, not \{\}"):
            run(shared_model("llama"), fan(0), kv_store={})


def test_a_model_without_a_head_gives_hidden_states():
    base, prompt, kept = shared_model("llama").model, fan(0), store()
    with torch.no_grad():
        expected = leattn.forward(base, prompt, backend="eager").last_hidden_state[0, slice(*prompt.spans[prompt.graph["Q"]])]
    for _ in range(2):
        states = leattn.forward(base, prompt, kv_store=kept).last_hidden_state[0]
        torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
    assert kept.stats.hits == 4
