"""``generate``: transformers' own, on a graph. The oracle decodes without a cache, from the compiled mask, token by token."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from models import FAMILIES, SERVED, make_model, shared_model
from strategies import graphs
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

import leattn
from leattn import GraphError, ICLNode, LeattnError, causal, compile_prompt, generate
from leattn.model.record import Model

NEW = 6


@pytest.fixture(autouse=True)
def _uncompiled_flex():
    with torch.compiler.set_stance("force_eager"):
        yield


def with_one_sink(graph):
    """The graph and a last node that sees all its sinks."""
    return compile_prompt(ICLNode([3, 4], graph.sinks))


def fan(seed=0, siblings=3):
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(2, 100, (count,), generator=generator).tolist()

    root = ICLNode(ids(2), id="root")
    documents = [ICLNode(ids(3 + i), [root], id=f"doc{i}") for i in range(siblings)]
    return compile_prompt(ICLNode(ids(3), [root, *documents], id="Q"))


def oracle(model, prompt, count):
    """Greedy ids and the margin between the two best logits at each step: a full forward per token, eager, the mask by hand."""
    size = len(prompt)
    mask = prompt.dense_mask()
    ids, positions = prompt.input_ids, prompt.position_ids
    chosen, margins = [], []
    window_of = Model.of(model).facts.windows
    for _ in range(count):
        total = ids.shape[1]
        grown = torch.zeros(total, total, dtype=torch.bool)
        grown[:size, :size] = mask
        for row in range(size, total):  # a new token sees what the last one of the prompt sees, and the new ones so far
            grown[row, :size] = mask[size - 1]
            grown[row, size : row + 1] = True
        distance = positions[0][:, None] - positions[0]
        forms = {}
        for kind, window in window_of.items():
            allowed = grown if window is None else grown & (distance < window)
            forms[kind] = torch.zeros(1, 1, total, total).masked_fill(~allowed, torch.finfo(torch.float32).min)
        given_mask = forms[""] if list(forms) == [""] else forms
        with torch.no_grad():
            logits = model(ids, position_ids=positions, attention_mask=given_mask, use_cache=False).logits[0, -1]
        best = logits.topk(2).values
        margins.append(float(best[0] - best[1]))
        chosen.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[chosen[-1]]])], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    return chosen, margins


def assert_equal_up_to_ties(tokens, expected, margins):
    """Token by token while the oracle's best two logits differ by more than 1e-3."""
    for token, right, margin in zip(tokens, expected, margins, strict=False):
        if margin <= 1e-3:
            return
        assert token == right


@pytest.mark.parametrize(("family", "backend"), [pair for pair in SERVED if pair[1] != "flex"])
@settings(max_examples=3)
@given(graph=graphs(max_nodes=5))
def test_greedy_with_and_without_a_cache_equals_full_forwards(family, backend, graph):
    check_greedy(family, backend, with_one_sink(graph))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_greedy_through_flex(family):
    """Uncompiled flex takes most of a second a step here; test_semantics covers its masks for every family."""
    check_greedy(family, "flex", fan())


def check_greedy(family, backend, prompt):
    model = shared_model(family)
    expected, margins = oracle(model, prompt, NEW)
    for use_cache in (True, False):
        result = generate(model, prompt, backend=backend, max_new_tokens=NEW, do_sample=False, use_cache=use_cache)
        assert result.backend == backend
        assert len(result.token_ids) == NEW
        assert_equal_up_to_ties(result.token_ids.tolist(), expected, margins)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_sampling_equal_transformers_on_the_equivalent_plain_prompt(family):
    model = shared_model(family)
    ids = torch.randint(2, 100, (14,), generator=torch.Generator().manual_seed(2))
    prompt = compile_prompt(causal(ids.split([4, 7, 3])))
    options = {"max_new_tokens": NEW, "pad_token_id": 0}
    kinds = {
        "greedy": {},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "sampling": {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
    }
    for kind in kinds.values():
        torch.manual_seed(7)
        plain = model.generate(ids[None], attention_mask=torch.ones(1, 14), **options, **kind)[:, 14:]
        torch.manual_seed(7)
        result = generate(model, prompt, backend="eager", **options, **kind)
        assert [sequence.token_ids.tolist() for sequence in result.sequences] == plain.tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_of_graphs_equals_one_by_one(family, beams):
    model, prompts = shared_model(family), [fan(1, 1), fan(2, 4), fan(3, 2)]
    together = generate(model, prompts, backend="eager", max_new_tokens=NEW, num_beams=beams)
    for prompt, result in zip(prompts, together, strict=True):
        alone = generate(model, prompt, backend="eager", max_new_tokens=NEW, num_beams=beams)
        assert result.token_ids.tolist() == alone.token_ids.tolist()
        assert result.prompt is prompt


def test_a_seed_is_honoured_and_leaves_the_global_state_alone():
    model, prompt = shared_model("llama"), fan()
    options = {"max_new_tokens": 12, "do_sample": True}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two, three = (generate(model, prompt, seed=seed, **options).token_ids.tolist() for seed in (5, 5, 6))
    assert one == two != three
    assert torch.equal(torch.get_rng_state(), before)


def test_streamers_stopping_processors_and_static_caches(words):
    model = shared_model("llama")
    document = ICLNode("one two three", id="doc")
    prompt = compile_prompt(ICLNode("What ?", [document], id="Q"), words)
    expected = generate(model, prompt, max_new_tokens=NEW, backend="eager").token_ids.tolist()

    # A streamer is read while generate runs in a thread of its own, as notebooks do.
    streamer = TextIteratorStreamer(words, skip_prompt=True)
    thread = threading.Thread(target=generate, args=(model, prompt), kwargs={"max_new_tokens": NEW, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed.split() == words.decode(expected).split()

    class Third(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= len(prompt) + 3)

    stopped = generate(model, prompt, max_new_tokens=NEW, stopping_criteria=StoppingCriteriaList([Third()]))
    assert stopped.token_ids.tolist() == expected[:3]

    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.masked_fill(torch.arange(scores.shape[1]) != 9, float("-inf"))

    forced = generate(model, prompt, max_new_tokens=2, logits_processor=LogitsProcessorList([Only()]))
    assert forced.token_ids.tolist() == [9, 9]

    cache = StaticCache(config=model.config, max_cache_len=32)
    assert generate(model, prompt, max_new_tokens=NEW, past_key_values=cache).token_ids.tolist() == expected
    assisted = generate(model, prompt, max_new_tokens=NEW, assistant_model=make_model("llama", seed=3), backend="eager")
    assert assisted.token_ids.tolist() == expected
    chunked = generate(model, prompt, max_new_tokens=NEW, prefill_chunk_size=2)
    assert chunked.token_ids.tolist() == expected


def test_the_models_own_generate_inside_attend(words):
    model = shared_model("mistral")
    prompt = fan()
    expected = generate(model, prompt, max_new_tokens=NEW, backend="eager").token_ids.tolist()
    with leattn.attend(model, prompt, backend="eager"):
        ids = model.generate(prompt.input_ids, max_new_tokens=NEW)
    assert ids[0, len(prompt) :].tolist() == expected


def test_a_trailing_eos_is_dropped_and_a_model_that_never_stops_is_cut(words):
    model, prompt = shared_model("llama"), fan()
    free = generate(model, prompt, max_new_tokens=NEW).token_ids.tolist()
    end = free[2]
    result = generate(model, prompt, max_new_tokens=NEW, eos_token_id=end)
    assert result.token_ids.tolist() == free[: free.index(end)]
    batch = generate(model, [prompt, fan(5)], max_new_tokens=NEW, eos_token_id=end)
    assert batch[0].token_ids.tolist() == free[: free.index(end)]


def test_stats_count_what_ran():
    model, prompt = shared_model("llama"), fan()
    cached = generate(model, prompt, max_new_tokens=NEW, use_cache=True).stats
    assert (cached.steps, cached.computed, cached.generated, cached.reused) == (NEW, len(prompt) + NEW - 1, NEW, 0)
    uncached = generate(model, prompt, max_new_tokens=NEW, use_cache=False).stats
    assert uncached.computed == sum(len(prompt) + step for step in range(NEW))


def test_the_realised_graph_holds_the_continuation_where_it_was_generated():
    model = shared_model("llama")
    for scheme in ("after_parents", "sequential", "restart"):
        prompt = compile_prompt(fan().graph, positions=scheme)
        result = generate(model, prompt, max_new_tokens=NEW)
        again = compile_prompt(result.realised, positions=scheme)
        node = again["Q (continued)"]
        assert node.input_ids.tolist() == result.token_ids.tolist()
        assert node.positions.tolist() == list(
            range(int(prompt.position_ids[0, -1]) + 1, int(prompt.position_ids[0, -1]) + 1 + NEW)
        )
        # Going on from there equals having generated more at once.
        longer = generate(model, prompt, max_new_tokens=NEW + 2).token_ids.tolist()
        with torch.no_grad():
            following = leattn.forward(model, again).logits[0, -1].argmax()
        assert int(following) == longer[NEW]


def test_a_result_reads_well(words):
    model = shared_model("llama")
    result = generate(model, ICLNode("What does the fox say ?", id="Q"), words, max_new_tokens=4)
    assert result.text == result["Q"] == result.texts["Q"] == str(result) == words.decode(result.token_ids)
    assert result.sequences[0].text == result.text
    assert "4 new tokens" in result._repr_html_()
    with pytest.raises(GraphError, match="no node is called 'X'"):
        result["X"]


def test_what_generate_refuses(words):
    model = shared_model("llama")
    a, b = ICLNode([5], id="a"), ICLNode([6], id="b")
    with pytest.raises(LeattnError, match="input_ids comes from the prompt"):
        generate(model, a, input_ids=torch.ones(1, 1))
    with pytest.raises(LeattnError, match="the list of prompts is empty"):
        generate(model, [])
    with pytest.raises(LeattnError, match="node 'q' holds text; give a tokenizer"):
        generate(model, ICLNode("What ?", id="q"))
    refused = pytest.raises(LeattnError, match=r"several sinks \('a', 'b'\) has no single continuation")
    with leattn.attend(model, compile_prompt([a, b])), refused:
        model.generate(compile_prompt([a, b]).input_ids, max_new_tokens=2)
