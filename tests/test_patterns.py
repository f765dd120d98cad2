"""Patterns against the same thing done by hand: branches one by one, plain forwards of plain ids, averages in a loop."""

from __future__ import annotations

import math
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import shared_model
from oracles import dense, positions, relation
from strategies import graphs
from test_generation import assert_equal_up_to_ties
from test_programs import check_against_cold_runs
from transformers import LogitsProcessor

import leattn
from leattn import CompileError, GenNode, ICLGraph, ICLNode, KVStore, LeattnError, compile_prompt, generate
from leattn.dag.gennode import copied
from leattn.patterns import best_of_n, drafts, map_reduce, paraphrase_ensemble, self_consistency

FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt_neox", "gpt2"]


def ids(count, seed):
    return torch.randint(2, 100, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def tiny():
    return leattn.tiny.load()


@pytest.fixture(scope="module")
def disagreeing(tiny):
    """A root and three documents that contradict each other."""
    root = leattn.bos(tiny[1])
    texts = ["Zarvia is governed from Madan.", "In Zarvia, the capital is Lumo.", "Zarvia's capital is Pardan."]
    return [root, *(ICLNode("\n" + text, [root], f"doc{i}") for i, text in enumerate(texts))]


def small_draft(**sampling):
    context = ICLNode(ids(7, 0), id="context")
    return GenNode(ids(3, 1), [context], "try", max_new_tokens=4, **sampling)


def plain_logits(model, tokens):
    """Of a plain text ``[S, V]``: leattn has no part in it."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


# Self-consistency.


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_votes_are_those_of_drafts_written_one_by_one(family):
    model = shared_model(family)
    draft = small_draft(temperature=1.5)

    def parity(text):
        return sum(map(int, text.strip("[]").split(","))) % 2

    vote = self_consistency(model, draft, n=7, extract=parity, seed=5)
    texts = {}
    for i in range(1, 8):
        node = GenNode(draft.content, draft.parents, f"try {i}", max_new_tokens=4, do_sample=True, temperature=1.5)
        texts[f"try {i}"] = generate(model, node, seed=5).text
    assert vote.generation.texts == texts
    assert vote.answers == {name: parity(text) for name, text in texts.items()}
    counted = Counter(vote.answers.values())
    assert vote.votes == counted
    assert counted[vote.answer] == max(counted.values())
    assert len(set(texts.values())) > 1


def test_the_shared_context_is_computed_once():
    stats = self_consistency(shared_model("llama"), small_draft(), n=6, seed=0).generation.stats
    assert (stats.computed, stats.steps) == (7 + 6 * (3 + 3), 4)


@pytest.mark.parametrize(
    ("said", "answer", "votes"),
    [
        ("baab", "b", {"b": 2, "a": 2}),  # a tie goes to the answer that came first
        ("abb", "b", {"b": 2, "a": 1}),
        ("-a-", "a", {"a": 1}),
        ("--", None, {}),
    ],
)
def test_ties_and_abstentions(said, answer, votes):
    letters = iter(said)
    vote = self_consistency(
        shared_model("llama"), small_draft(), n=len(said), seed=0, extract=lambda _: {"-": None}.get(s := next(letters), s)
    )
    assert vote.answer == answer
    assert list(vote.votes.items()) == list(votes.items())
    assert list(vote.answers) == [f"try {i + 1}" for i in range(len(said))]
    assert str(vote) == "\n".join(f"{name}: {count} of {len(said)}" for name, count in votes.items())
    assert f"{len(said)} drafts" in vote._repr_html_()
    assert ("without an answer" in vote._repr_html_()) == ("-" in said)


def test_a_seed_is_a_run_and_options_reach_generate():
    model, seen = shared_model("llama"), []
    runs = [self_consistency(model, small_draft(), n=4, seed=seed).generation.texts for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    self_consistency(model, small_draft(), n=2, seed=1, backend="eager", on_finished=lambda name, _: seen.append(name))
    assert sorted(seen) == ["try 1", "try 2"]


def test_a_draft_is_described_by_its_node():
    model, context = shared_model("llama"), ICLNode(ids(5, 0))
    draft = GenNode("one<two>", [context], max_new_tokens=2, start_pos_id=9, special_tokens="text", stop="x", top_k=7)
    for node in (drafts.sampled(draft, 2, {})[1], copied(draft, [], "other")):
        assert (node.content, node.max_new_tokens, node.stop) == ("one<two>", 2, ("x",))
        assert (node.start_pos_id, node.special_tokens, node.sampling["top_k"]) == (9, "text", 7)
    pinned = GenNode(ids(2, 1), [context], max_new_tokens=2, start_pos_id=9)
    positions_of = compile_prompt(self_consistency(model, pinned, n=2).generation.realised)["draft 2"].positions
    assert positions_of.tolist() == [9, 10, 11, 12]


def test_what_is_written_before_the_drafts_does_not_vote():
    model = shared_model("llama")
    note = GenNode(ids(3, 8), id="note", max_new_tokens=2)
    draft = GenNode(ids(2, 9), [note], max_new_tokens=2)
    vote = self_consistency(model, draft, n=3, seed=0)
    assert set(vote.generation.texts) == {"note", "draft 1", "draft 2", "draft 3"}
    assert set(vote.answers) == {"draft 1", "draft 2", "draft 3"}
    assert set(best_of_n(model, draft, n=3, seed=0).scores) == set(vote.answers)


def test_a_second_program_takes_the_context_from_the_store():
    model, store = shared_model("llama"), KVStore(max_bytes=2**24)
    draft = small_draft()
    first = self_consistency(model, draft, n=2, seed=0, kv_store=store)
    second = best_of_n(model, draft, n=2, seed=0, kv_store=store)
    assert second.generation.stats.reused == 7
    assert second.generation.texts == first.generation.texts
    assert second.scores == pytest.approx(best_of_n(model, draft, n=2, seed=0).scores, abs=1e-5)


@pytest.mark.parametrize("pattern", [self_consistency, best_of_n])
def test_drafts_that_make_no_sense_are_refused(pattern):
    model = shared_model("llama")
    with pytest.raises(LeattnError, match=r"the draft is written by the model: give a GenNode.* not a ICLNode"):
        pattern(model, ICLNode([1, 2]), n=3)
    for n in (0, True, 2.0):
        with pytest.raises(LeattnError, match=rf"n={n} drafts; give a whole number from 1 up"):
            pattern(model, small_draft(), n=n)
    for draft, options in ((small_draft(do_sample=False), {}), (small_draft(), {"do_sample": False})):
        with pytest.raises(LeattnError, match="do_sample=False would write the same draft 3 times; leave it out"):
            pattern(model, draft, n=3, **options)
    greedy = pattern(model, small_draft(), n=1, do_sample=False).generation
    assert greedy["try 1"] == generate(model, small_draft()).text


# Best of n.


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_the_plain_text(family):
    """The draft sees everything before it, so that the graph is a plain text."""
    model = shared_model(family)
    best = best_of_n(model, small_draft(temperature=2.0), n=5, seed=3)
    before = ids(7, 0) + ids(3, 1)
    for name, (sequence,) in best.generation.branches.items():
        new = sequence.token_ids
        logprobs = plain_logits(model, before + new.tolist()).log_softmax(-1)
        expected = sum(float(logprobs[len(before) - 1 + k, new[k]]) for k in range(4)) / 4
        assert best.scores[name] == pytest.approx(expected, abs=1e-4)
    assert best.scores[best.name] == max(best.scores.values())
    assert best.text == best.generation[best.name] == str(best)
    assert len(set(best.scores.values())) > 1


def test_logprobs_follow_the_graph(tiny, disagreeing):
    """Parallel documents: the mask and the positions by hand."""
    model, tokenizer = tiny
    draft = GenNode("\nQ: What is the capital of Zarvia?\nA:", disagreeing, max_new_tokens=2, temperature=3.0)
    best = best_of_n(model, draft, tokenizer, n=4, seed=0)
    for name, (sequence,) in best.generation.branches.items():
        new = sequence.token_ids.tolist()
        logprobs = cold_logits(model, draft, new, tokenizer).log_softmax(-1)
        expected = sum(float(logprobs[k - len(new) - 1, token]) for k, token in enumerate(new)) / len(new)
        assert best.scores[name] == pytest.approx(expected, abs=1e-4)


def test_logprobs_follow_the_options_of_the_run():
    """Seeing ancestors makes a plain text of a chain; seeing parents alone does not."""
    model = shared_model("llama")
    first = ICLNode(ids(6, 0))
    draft = GenNode(ids(2, 2), [ICLNode(ids(4, 1), [first])], max_new_tokens=3)
    before = ids(6, 0) + ids(4, 1) + ids(2, 2)
    plain = {}
    for visibility in ("ancestors", "parents"):
        best = best_of_n(model, draft, n=3, seed=0, visibility=visibility, backend="eager")
        for name, (sequence,) in best.generation.branches.items():
            new = sequence.token_ids
            logprobs = plain_logits(model, before + new.tolist()).log_softmax(-1)
            plain[name] = float(logprobs[len(before) - 1 : -1].gather(1, new[:, None]).mean())
        assert (best.scores == pytest.approx(plain, abs=1e-4)) == (visibility == "ancestors")


def test_a_scorer_of_ones_own_and_the_first_of_equals():
    model = shared_model("llama")
    best = best_of_n(model, small_draft(), n=4, seed=0, scorer=len)
    assert best.scores == {name: len(text) for name, text in best.generation.texts.items()}
    assert best_of_n(model, small_draft(), n=4, seed=0, scorer=lambda _: 1).name == "try 1"
    assert "the best is try" in best._repr_html_()
    realised = best.generation.realised
    assert compile_prompt(realised)[best.name].input_ids.tolist()[3:] == best.generation.token_ids[best.name].tolist()


def test_a_draft_without_tokens_is_never_the_best():
    model = shared_model("llama")
    first = {name: ids[0].item() for name, ids in best_of_n(model, small_draft(), n=4, seed=0).generation.token_ids.items()}
    ends = first["try 1"]
    assert set(first.values()) != {ends}
    best = best_of_n(model, small_draft(), n=4, seed=0, eos_token_id=ends)
    assert {name for name, score in best.scores.items() if score == -math.inf} == {n for n, i in first.items() if i == ends}
    assert best.name != "try 1"


def test_scorers_that_cannot_be_used():
    model = shared_model("llama")
    with pytest.raises(LeattnError, match=r"unknown scorer 'perplexity'; choose one of 'logprob', or give a function"):
        best_of_n(model, small_draft(), n=2, scorer="perplexity")
    with pytest.raises(LeattnError, match=r"the score of 'try 1', '\[.*\]', is NaN; give numbers that can be compared"):
        best_of_n(model, small_draft(), n=2, seed=0, scorer=lambda _: math.nan)

    def interrupt(name, text):
        raise KeyboardInterrupt

    late = GenNode([1], [GenNode([2], max_new_tokens=1)], max_new_tokens=1)
    with pytest.raises(LeattnError, match="interrupted before any draft had begun"):
        best_of_n(model, late, n=2, on_finished=interrupt, on_interrupt="return")


# Map and reduce.


def map_and_reduce(family="llama", count=5, changed=None, **options):
    rules = ICLNode(ids(4, 100), id="rules")
    documents = [ICLNode(ids(5 + i % 2, 200 + i + 50 * (i == changed)), [rules], f"doc{i}") for i in range(count)]
    write = GenNode(ids(2, 300), [rules], max_new_tokens=3)
    conclude = GenNode(ids(3, 301), [rules], max_new_tokens=5)
    return map_reduce(shared_model(family), documents, map=write, reduce=conclude, **options)


@pytest.mark.parametrize("options", [{}, {"reduce_sees": "outputs and documents"}, {"fan_in": 2}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_equals_itself_run_alone(family, options):
    result = map_and_reduce(family, **options)
    check_against_cold_runs(shared_model(family), result.generation.graph, result.generation)


def test_a_map_sees_its_document_and_nothing_of_the_others():
    before, after = map_and_reduce(), map_and_reduce(changed=2)
    same = [a == b for a, b in zip(before.outputs, after.outputs, strict=True)]
    assert same == [True, True, False, True, True]
    assert before.text != after.text
    graph = before.generation.graph
    for i in range(5):
        assert {graph.name(node) for node in graph[f"map {i + 1}"].parents} == {"rules", f"doc{i}"}


@pytest.mark.parametrize(("reduce_sees", "more"), [("outputs", set()), ("outputs and documents", {"doc0", "doc1"})])
def test_what_a_reducer_sees(reduce_sees, more):
    result = map_and_reduce(count=2, reduce_sees=reduce_sees)
    graph = result.generation.graph
    assert {graph.name(node) for node in graph["reduce"].parents} == {"rules", "map 1", "map 2"} | more
    assert result.text == result.generation["reduce"] == str(result)
    assert result.outputs == (result.generation["map 1"], result.generation["map 2"])
    assert "2 documents" in result._repr_html_()


@pytest.mark.parametrize(("count", "fan_in"), [(1, 2), (2, 2), (3, 2), (5, 2), (9, 4), (10, 3)])
def test_a_tree_of_reducers(count, fan_in):
    graph = map_and_reduce(count=count, fan_in=fan_in).generation.graph
    reducers = [node for node in graph.nodes if isinstance(node, GenNode) and node.id.startswith("reduce")]
    seen = Counter(parent for node in reducers for parent in node.parents if parent.id != "rules")
    below = [node for node in graph.nodes if isinstance(node, GenNode) and node.id != "reduce"]
    assert set(seen) == set(below)
    assert set(seen.values()) == {1}
    sizes = [len(node.parents) - 1 for node in reducers]
    assert max(sizes) <= fan_in
    assert min(sizes[:-1], default=2) >= 2
    assert [node.id for node in graph.sinks] == ["reduce"]


def test_texts_become_documents_that_see_what_the_map_sees(tiny):
    model, tokenizer = tiny
    ask = GenNode("\nQ: What is the capital of Zarvia?\nA:", [leattn.bos(tokenizer)], "ask", max_new_tokens=2)
    given = ["\nZarvia is governed from Madan.", ICLNode("\nZarvia's capital is Lumo.", ask.parents, "second")]
    result = map_reduce(model, given, tokenizer, map=ask, reduce=ask, seed=0)
    graph = result.generation.graph
    assert graph["document 1"].parents == ask.parents
    assert graph["ask 2"].parents == (*ask.parents, graph["second"])
    assert result.outputs == (" Madan.", " Lumo.")
    assert set(result.generation.texts) == {"ask 1", "ask 2", "ask"}


def test_maps_and_reducers_that_make_no_sense_are_refused():
    model, write = shared_model("llama"), GenNode([1], max_new_tokens=1)
    for name in ("map", "reduce"):
        with pytest.raises(LeattnError, match=f"{name} is written by the model: give a GenNode"):
            map_reduce(model, [ICLNode([1])], **{"map": write, "reduce": write, name: "summarize"})
    for documents in ([], "a text"):
        with pytest.raises(LeattnError, match="give a list of texts or nodes, at least one"):
            map_reduce(model, documents, map=write, reduce=write)
    with pytest.raises(LeattnError, match="fan_in=1 would put nothing together; give 2 or more"):
        map_reduce(model, [ICLNode([1])], map=write, reduce=write, fan_in=1)
    with pytest.raises(LeattnError, match="unknown reduce_sees 'documents'; choose one of 'outputs', 'outputs and documents'"):
        map_reduce(model, [ICLNode([1])], map=write, reduce=write, reduce_sees="documents")


# The ensemble.


def averaged(rows, mean):
    """The mean distribution of next-token logits, one row per phrasing."""
    probabilities = [row.double().softmax(-1) for row in rows]
    if mean == "arithmetic":
        return sum(probabilities) / len(probabilities)
    product = math.prod(p ** (1 / len(probabilities)) for p in probabilities)
    return product / product.sum()


def check_ensemble(result, next_logits, mean, steps):
    """Against a loop: every phrasing by itself, cold, one full forward per token, averaged by hand."""
    written, expected, margins = [], [], []
    for step in range(steps):
        together = averaged([logits(written) for logits in next_logits], mean)
        best = together.topk(2).values
        expected.append(int(together.argmax()))
        margins.append(float(best[0].log() - best[1].log()))
        if margins[-1] <= 1e-3:
            break
        k = result.candidates.shape[1]
        torch.testing.assert_close(result.probabilities[step], together.topk(k).values.float(), atol=1e-4, rtol=1e-3)
        written.append(expected[-1])
    assert_equal_up_to_ties(result.token_ids.tolist(), expected, margins)
    for own, logits in zip(result.first_step, next_logits, strict=True):
        torch.testing.assert_close(own, logits([]).softmax(-1), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ensemble_equals_plain_forwards_averaged_by_hand(family, mean):
    """Context and phrasing are a plain text, so that leattn has no part in the oracle."""
    model = shared_model(family)
    context, asks = ids(6, 0), [ids(3 + i, 40 + i) for i in range(3)]
    shared = ICLNode(context, id="context")
    phrasings = [ICLNode(ask, [shared], f"ask{i}") for i, ask in enumerate(asks)]
    result = paraphrase_ensemble(model, phrasings, mean=mean, max_new_tokens=5)
    assert len(result.token_ids) == len(result.probabilities) == 5
    alone = [lambda new, ask=ask: plain_logits(model, context + ask + new)[-1] for ask in asks]
    check_ensemble(result, alone, mean, 5)
    assert (result.generation.stats.computed, result.generation.stats.steps) == (6 + 12 + 3 * 4, 5)


def cold_logits(model, node, new=(), tokenizer=None):
    """Logits ``[S, V]`` of a node run alone, with what goes on after it: ids, mask and positions by hand."""
    made = {}
    for one in ICLGraph(node).nodes:
        content = one.content if tokenizer is None else one.tokenize(tokenizer).tolist()
        made[one] = ICLNode([*content, *(new if one is node else ())], [made[parent] for parent in one.parents])
    nodes = list(made.values())
    sees = relation(nodes)
    tokens = torch.tensor([[token for one in nodes for token in one.content]])
    hidden = ~torch.tensor(dense(nodes, sees))
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]
    at = torch.tensor([positions(nodes, sees)])
    with torch.no_grad():
        return model(tokens, position_ids=at, attention_mask=mask, use_cache=False).logits[0].float()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@settings(max_examples=10)
@given(graph=graphs(max_nodes=6, max_tokens=3), mean=st.sampled_from(["arithmetic", "geometric"]))
def test_the_sinks_of_any_graph_are_an_ensemble(family, graph, mean):
    model = shared_model(family)
    result = paraphrase_ensemble(model, graph, mean=mean, max_new_tokens=3)
    check_ensemble(result, [lambda new, sink=sink: cold_logits(model, sink, new)[-1] for sink in graph.sinks], mean, 3)


def test_phrasings_that_disagree_over_parallel_documents(tiny, disagreeing):
    model, tokenizer = tiny
    asks = ["What is the capital of Zarvia?", "From which city is Zarvia governed?", "Name the capital of Zarvia."]
    phrasings = [ICLNode(f"\nQ: {ask}\nA:", disagreeing, ask) for ask in asks]
    result = paraphrase_ensemble(model, phrasings, tokenizer, max_new_tokens=2)
    alone = [lambda new, node=node: cold_logits(model, node, new, tokenizer)[-1] for node in phrasings]
    check_ensemble(result, alone, "arithmetic", 2)
    assert len({int(own.argmax()) for own in result.first_step}) == 2, "they disagree"
    assert (result.text, str(result)) == (" Lumo.", " Lumo.")
    assert list(result.generation.branches) == asks
    assert all(f"<td style='text-align:left;white-space:pre-wrap'>{ask}" in result._repr_html_() for ask in asks)


def test_an_ensemble_of_one_is_greedy_decoding():
    model, node = shared_model("llama"), ICLNode(ids(8, 3))
    assert paraphrase_ensemble(model, node, max_new_tokens=6).token_ids.tolist() == (
        generate(model, node, max_new_tokens=6, do_sample=False).token_ids.tolist()
    )


def two_phrasings():
    shared = ICLNode(ids(6, 0), id="context")
    return [ICLNode(ids(3, 40 + i), [shared], f"ask{i}") for i in range(2)]


def test_the_realised_graph_has_the_text_after_every_phrasing():
    model, store = shared_model("llama"), KVStore(max_bytes=2**24)
    result = paraphrase_ensemble(model, two_phrasings(), max_new_tokens=3)
    realised = compile_prompt(result.generation.realised)
    for i in range(2):
        after = realised[f"ask{i} (continued)"]
        assert after.input_ids.tolist() == result.token_ids.tolist()
        assert after.positions.tolist() == [9, 10, 11]
        assert [node.id for node in realised.sees(f"ask{i} (continued)")] == ["context", f"ask{i}"]
    phrasings = two_phrasings()
    first, second = (paraphrase_ensemble(model, phrasings, max_new_tokens=3, kv_store=store) for _ in range(2))
    assert (first.generation.stats.reused, second.generation.stats.reused) == (0, 6)
    assert first.token_ids.tolist() == second.token_ids.tolist() == result.token_ids.tolist()


def test_what_was_fed_to_the_end_is_in_the_store(tiny, disagreeing):
    model, tokenizer = tiny
    store = KVStore(max_bytes=2**26)
    question = ICLNode("\nQ: Name the capital of Zarvia.\nA:", disagreeing, "Q")
    result = paraphrase_ensemble(model, question, tokenizer, max_new_tokens=9, kv_store=store)  # EOS: all of it was fed
    said = result.generation.realised["Q (continued)"]
    stats = generate(model, GenNode("\n", [said], max_new_tokens=1), tokenizer, kv_store=store).stats
    assert (stats.reused, stats.computed) == (len(result.token_ids), 1)


class Recorder(LogitsProcessor):
    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids[0].tolist(), scores[0].clone()))
        return scores


def test_processors_work_on_the_log_of_the_mean():
    model, recorder = shared_model("llama"), Recorder()
    result = paraphrase_ensemble(model, two_phrasings(), max_new_tokens=3, logits_processor=[recorder])
    before = ids(6, 0) + ids(3, 40) + ids(3, 41)
    assert [given for given, _ in recorder.calls] == [before + result.token_ids.tolist()[:k] for k in range(3)]
    for (_, scores), kept in zip(recorder.calls, result.probabilities, strict=True):
        torch.testing.assert_close(scores.exp().topk(len(kept)).values, kept)
        assert float(scores.exp().sum()) == pytest.approx(1, abs=1e-5)


def test_draws_of_an_ensemble_have_a_seed():
    model, phrasings = shared_model("llama"), two_phrasings()
    state = torch.random.get_rng_state()
    draws = [
        paraphrase_ensemble(model, phrasings, max_new_tokens=6, do_sample=True, temperature=2.0, seed=seed).token_ids.tolist()
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_ensemble_ends_where_a_text_ends(tiny, disagreeing):
    model, tokenizer = tiny
    phrasings = [
        ICLNode(f"\nQ: {ask}\nA:", disagreeing) for ask in ("Name the capital of Zarvia.", "What is Zarvia's capital?")
    ]
    whole = paraphrase_ensemble(model, phrasings, tokenizer)  # 20 tokens at most, as in transformers
    assert (whole.text, len(whole.token_ids), len(whole.candidates)) == (" Lumo.", 2, 3)  # EOS is a step
    assert paraphrase_ensemble(model, phrasings, tokenizer, max_new_tokens=9, stop_strings=".").text == " Lumo"
    nothing = paraphrase_ensemble(model, phrasings, tokenizer, max_new_tokens=9, eos_token_id=int(whole.token_ids[0]))
    assert (nothing.text, nothing.token_ids.tolist(), nothing.generation.stats.steps) == ("", [], 1)
    assert nothing.generation.realised.sinks == nothing.generation.graph.sinks
    criteria = [lambda ids, scores: ids[0, -1] == whole.token_ids[0]]
    stopped = paraphrase_ensemble(model, phrasings, tokenizer, max_new_tokens=9, stopping_criteria=criteria)
    assert stopped.text == " Lumo"


def test_edits_of_a_compiled_prompt_hold():
    model, phrasings = shared_model("llama"), two_phrasings()
    prompt = compile_prompt(phrasings)
    whole, cut = (paraphrase_ensemble(model, p, max_new_tokens=2) for p in (prompt, prompt.without_edge("ask1", "context")))
    torch.testing.assert_close(whole.first_step[0], cut.first_step[0])
    assert not torch.allclose(whole.first_step[1], cut.first_step[1], atol=1e-3)


def test_ensembles_that_make_no_sense_are_refused():
    model, phrasings = shared_model("llama"), two_phrasings()
    with pytest.raises(LeattnError, match="unknown mean 'median'; choose one of 'arithmetic', 'geometric', 'max'"):
        paraphrase_ensemble(model, phrasings, mean="median")
    with pytest.raises(LeattnError, match="the 2 phrasings would go on at each other's positions"):
        paraphrase_ensemble(model, phrasings, positions="sequential")
    with pytest.raises(LeattnError, match="there is no tokenizer to decode with"):
        paraphrase_ensemble(model, phrasings, stop_strings=".")
    with pytest.raises(LeattnError, match="num_beams=2 is for one branch"):
        paraphrase_ensemble(model, phrasings, num_beams=2)
    with pytest.raises(LeattnError, match="max_length leaves no token to write after a graph of 12 tokens"):
        paraphrase_ensemble(model, phrasings, max_length=12)
    with pytest.raises(LeattnError, match=r"token_budget is for leattn\.generate"):
        paraphrase_ensemble(model, phrasings, token_budget=5)
    with pytest.raises(CompileError, match="is written by the model"):
        paraphrase_ensemble(model, GenNode([1], max_new_tokens=2))
    with pytest.raises(LeattnError, match="the last position may be 600, but gpt2 has a table of 512 positions"):
        paraphrase_ensemble(shared_model("gpt2"), ICLNode([1, 2]), max_new_tokens=599)


def test_of_equal_drafts_the_earliest_is_best_whatever_the_rounding(monkeypatch):
    scores = {f"draft {i}": -1.0 + 1e-7 * i for i in range(1, 5)}
    monkeypatch.setattr(sys.modules["leattn.patterns.best_of_n"], "_mean_logprobs", lambda *_, **__: scores)
    draft = GenNode(ids(3, 1), max_new_tokens=2, do_sample=True, top_k=1)  # sampling that leaves one choice
    assert best_of_n(shared_model("llama"), draft, n=4, seed=0).name == "draft 1"
