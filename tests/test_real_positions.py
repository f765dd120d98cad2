"""Positions between whole numbers, against models whose queries and keys are turned by hand (reading_by_hand.py)."""

from __future__ import annotations

from itertools import chain

import pytest
import reading_by_hand as by_hand
import torch
from models import make_model, shared_model
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import leattn
from leattn import BackendError, GenNode, ICLNode, KVStore, compile_prompt, forward, generate, read
from leattn.prompt.positions import Scheme

HAND = ["llama", "qwen3", "gemma3_text"]
BACKENDS = ["eager", "sdpa", "sparse", "flex"]


@pytest.fixture(autouse=True)
def _quiet():
    # Torch does not compile flex for every shape on a CPU.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def fork(shift=0.0, last=(6, 7, 8)):
    header = ICLNode([5, 6, 7], id="header")
    docs = [ICLNode(ids, [header], f"doc{i}") for i, ids in enumerate(([10, 11, 12, 13, 14, 15, 16], [20, 21], [30, 31, 32]))]
    rest = read(docs[:2], temperature=0.8, shift=shift) if shift else None
    return [header, *docs, ICLNode(list(last), [header, docs[2], rest] if rest else [header, *docs], "Q")]


def scattered(graph, lengths):
    """Every token somewhere of its own, further apart than the windows of Gemma's layers reach."""
    return [[0.4 * i * i + 0.3 * t * (i + 1) for t in range(n)] for i, n in enumerate(lengths.values())]


def hand(model, nodes, prompt):
    return by_hand.logits(model, nodes, where=prompt.position_ids[0].tolist(), turns=True)


@pytest.mark.parametrize("positions", ["equilibrium", scattered], ids=["equilibrium", "scattered"])
@pytest.mark.parametrize("family", HAND)
def test_a_forward(family, positions):
    nodes, model = fork(), shared_model(family)
    prompt = compile_prompt(nodes[-1], positions=positions)
    assert prompt.position_ids.is_floating_point()
    expected = hand(model, nodes, prompt)
    rounded = forward(
        model, compile_prompt(nodes[-1], positions=lambda g, n: [prompt[node].positions.round() for node in g.nodes])
    ).logits[0]
    assert (rounded[-1] - expected[-1]).abs().max() > 1e-3, "rounding changes nothing here, so nothing was tested"
    for backend in BACKENDS:
        found = forward(model, prompt, backend=backend).logits[0]
        assert (found - expected).abs().max() < 1e-4, backend


def test_a_reading_at_another_place():
    for family in HAND:
        nodes, model = fork(shift=1.625), shared_model(family)
        for positions in ("after_parents", "equilibrium"):
            prompt = compile_prompt(nodes[-1], positions=positions)
            expected = hand(model, nodes, prompt)
            for backend in BACKENDS:
                assert (forward(model, prompt, backend=backend).logits[0] - expected).abs().max() < 1e-4, (family, backend)


@pytest.mark.parametrize("family", HAND)
def test_what_is_generated_counts_on_by_one(family):
    nodes, model = fork(), shared_model(family)
    prompt = compile_prompt(nodes[-1], positions="equilibrium")
    where, written = prompt.position_ids[0].tolist(), []
    for _ in range(3):
        grown = ICLNode([*nodes[-1].content, *written], nodes[-1].parents, "grown")
        at = [*where, *(where[-1] + 1 + i for i in range(len(written)))]
        written.append(int(by_hand.logits(model, [*nodes[:-1], grown], where=at, turns=True)[-1].argmax()))
    for backend in BACKENDS[:3]:
        store = KVStore()
        for options in ({}, {"use_cache": False}, {"kv_store": store}, {"kv_store": store}):
            result = generate(model, prompt, max_new_tokens=3, backend=backend, **options)
            assert result.token_ids.tolist() == written, (backend, options)
        assert store.stats.hits > 0
    with leattn.attend(model, prompt) as attention:
        theirs = model.generate(**attention.inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert theirs[0, len(prompt) :].tolist() == written


def test_prompts_of_both_kinds_are_a_batch():
    nodes, model = fork(), shared_model("qwen3")
    prompts = [compile_prompt(nodes[-1], positions="equilibrium"), compile_prompt(nodes[2])]
    together = generate(model, prompts, max_new_tokens=3)
    assert [one.token_ids.tolist() for one in together] == [
        generate(model, prompt, max_new_tokens=3).token_ids.tolist() for prompt in prompts
    ]
    batch = forward(model, prompts).logits
    assert (batch[0] - hand(model, nodes, prompts[0])).abs().max() < 1e-4
    assert (batch[1, -len(prompts[1]) :] - forward(model, prompts[1]).logits[0]).abs().max() < 1e-4


@pytest.mark.parametrize("family", HAND)
@pytest.mark.parametrize("further", [3, 2.375])
def test_what_is_stored_is_found_at_other_places(family, further, tmp_path):
    nodes, model = fork(), shared_model(family)
    prompt = compile_prompt(nodes[-1], positions="equilibrium")
    generate(model, prompt, max_new_tokens=1, kv_store=KVStore(directory=tmp_path))
    moved = compile_prompt(nodes[-1], positions=lambda g, n: [prompt[node].positions + further for node in g.nodes])
    store = KVStore(directory=tmp_path)
    result = generate(model, moved, max_new_tokens=3, kv_store=store)
    assert store.stats.hits == 4
    assert result.stats.computed == len(nodes[-1].content) + 2
    grown = ICLNode([*nodes[-1].content, *result.token_ids.tolist()[:-1]], nodes[-1].parents, "grown")
    where = moved.position_ids[0].tolist()
    expected = by_hand.logits(model, [*nodes[:-1], grown], where=[*where, where[-1] + 1, where[-1] + 2], turns=True)
    assert result.token_ids.tolist() == expected[-3:].argmax(-1).tolist()
    stretched = compile_prompt(nodes[-1], positions=lambda g, n: [prompt[node].positions * 1.5 for node in g.nodes])
    assert generate(model, stretched, max_new_tokens=1, kv_store=store).stats.reused == 0


def test_programs():
    header, *docs, _ = fork()
    model = shared_model("llama")
    notes = [GenNode([40, 41], [header, doc], f"note{i}", max_new_tokens=2) for i, doc in enumerate(docs[:2])]
    last = GenNode([50], [header, *notes], "last", max_new_tokens=2)
    places = [0, [3, 3.5, 4, 4.5, 5, 5.5, 6], 3.25, [7.5, 9.25], 7.75, 14.5]
    scheme = Scheme(lambda g, n: places, known_before_writing=True)
    at = {"header": [0, 1, 2], "doc0": places[1], "doc1": [3.25, 4.25], "note0": [7.5, 9.25], "note1": [7.75, 8.75]}
    nodes, where = [header, *docs[:2]], [at["header"], at["doc0"], at["doc1"]]

    def written(node, parents, start):
        """Greedily, every token from a run of everything so far."""
        ids, placed = list(node.content), list(start)
        for _ in range(2):
            grown = ICLNode(ids, parents, node.id)
            logits = by_hand.logits(model, [*nodes, grown], where=[*chain(*where), *placed], turns=True)
            ids.append(int(logits[-1].argmax()))
            placed.append(placed[-1] + 1)
        nodes.append(ICLNode(ids, parents, node.id))
        where.append(placed)
        return ids[len(node.content) :]

    expected = {f"note{i}": written(note, [header, docs[i]], at[f"note{i}"]) for i, note in enumerate(notes)}
    expected["last"] = written(last, [header, *nodes[3:5]], [14.5])
    store = KVStore()
    for options in ({}, {"kv_store": store}, {"kv_store": store}, {"backend": "sparse"}):
        result = generate(model, last, positions=scheme, eos_token_id=99, **options)
        assert {name: result.branches[name][0].token_ids.tolist() for name in expected} == expected, options
    assert store.stats.hits > 0


def test_where_it_cannot_be():
    prompt = compile_prompt(fork()[-1], positions="equilibrium")
    for family, why in (
        (
            "gpt2",
            "gpt2 cannot take positions that are not whole numbers: its positions are in a table, which has none",
        ),
        ("gptj", "gptj cannot take positions that are not whole numbers: its positions are in a table"),
    ):
        model = make_model(family)
        for run in (
            lambda: forward(model, prompt),  # noqa: B023
            lambda: generate(model, prompt, max_new_tokens=1),  # noqa: B023
            lambda: leattn.model_inputs(model, prompt),  # noqa: B023
            lambda: generate(model, [prompt], max_new_tokens=1, kv_store=KVStore()),  # noqa: B023
        ):
            with pytest.raises(BackendError, match=why):
                run()
        assert not leattn.check_model(model)["real positions"].works
        whole = compile_prompt(fork()[-1], positions=lambda g, n: [[2 * t for t in range(n)] for n in n.values()])
        assert forward(model, whole).logits.isfinite().all()


def test_a_model_that_cuts_positions_off(monkeypatch):
    """As a rotary embedding with ``position_ids.long()`` in it would: nothing fails there, and everything is wrong."""
    model, own = make_model("llama"), LlamaRotaryEmbedding.forward
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", lambda self, x, position_ids: own(self, x, position_ids.long()))
    with pytest.raises(BackendError, match=r"no rotation of its family gives the keys of layer 0 0\.375 positions"):
        forward(model, compile_prompt(fork()[-1], positions="equilibrium"))
    assert leattn.check_model(model)["shifted readings"].works


def test_plain_calls():
    nodes, model = fork(), shared_model("qwen3")
    prompt = compile_prompt(nodes[-1], positions="equilibrium")
    inputs = leattn.model_inputs(model, prompt)
    assert inputs["position_ids"].dtype == torch.float32
    assert (model(**inputs).logits[0] - hand(model, nodes, prompt)).abs().max() < 1e-4
