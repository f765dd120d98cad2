"""What a program takes: sampling per node, stops, streamers, callbacks, interrupts; and what it refuses, by name."""

from __future__ import annotations

import pytest
import torch
from models import shared_model
from test_programs import ids, two_rounds
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, TextStreamer

import leattn
from leattn import GenNode, ICLGraph, ICLNode, LeattnError, compile_prompt, generate


@pytest.fixture(scope="module")
def tiny():
    return leattn.tiny.load()


def branches(count=3, **options):
    context = ICLNode(ids(6, 1), id="context")
    options = {"max_new_tokens": 12, **options}
    return ICLGraph(*(GenNode(ids(4, 20 + i), [context], f"b{i}", **options) for i in range(count)))


def alone(graph, name):
    return ICLGraph(graph[name])


# Sampling.


def test_a_draw_depends_on_the_seed_and_not_on_the_neighbours():
    model, graph = shared_model("llama"), branches(do_sample=True, temperature=2.0)
    first, again, other = (generate(model, graph, seed=seed).texts for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first.values())) == 3
    for name in first:
        assert generate(model, alone(graph, name), seed=1)[name] == first[name]
    state = torch.get_rng_state()
    generate(model, graph, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_branches_draw_apart():
    context = ICLNode(ids(6, 1), id="context")
    same = [GenNode(ids(4, 20), [context], f"b{i}", max_new_tokens=12, do_sample=True, temperature=2.0) for i in range(4)]
    assert len(set(generate(shared_model("llama"), ICLGraph(*same), seed=1).texts.values())) == 4


def test_without_a_seed_the_global_one_counts():
    model, graph = shared_model("llama"), branches(do_sample=True)
    torch.manual_seed(3)
    first = generate(model, graph).texts
    second = generate(model, graph).texts
    torch.manual_seed(3)
    assert generate(model, graph).texts == first != second


def test_a_node_has_its_own_options():
    model, context = shared_model("llama"), ICLNode(ids(6, 1), id="context")
    hot = GenNode(ids(4, 2), [context], "hot", max_new_tokens=10, do_sample=True, temperature=3.0)
    cold = GenNode(ids(4, 2), [context], "cold", max_new_tokens=10)
    one = generate(model, ICLGraph(hot, cold), seed=1)
    two = generate(model, ICLGraph(hot, cold), seed=2)
    assert one["cold"] == two["cold"]
    assert len({one["hot"], two["hot"], one["cold"]}) == 3
    greedy = generate(model, ICLNode(ids(4, 2), [context]), max_new_tokens=10, do_sample=False)
    assert one["cold"] == greedy.text


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 8, "eos_token_id": 31},
        {"eos_token_id": 31},
        {"bad_words_ids": [[31], [7]]},
    ],
)
def test_processors_do_what_transformers_does_for_the_branch_alone(options):
    model = shared_model("llama")
    context, aside = ICLNode(ids(6, 1), id="context"), ICLNode(ids(3, 9), id="aside")
    questions = [ICLNode(ids(4, 30 + i), [context], id=f"q{i}") for i in range(4)]
    together = generate(model, ICLGraph(*questions, aside), max_new_tokens=12, **options)
    for question in questions:
        plain = generate(model, question, max_new_tokens=12, **options)
        assert together.branches[question.id][0].token_ids.tolist() == plain.token_ids.tolist()
    written = ICLGraph(*(GenNode(q.content, q.parents, q.id, max_new_tokens=12, **options) for q in questions))
    as_nodes = generate(model, written)
    assert {name: together[name] for name in as_nodes.texts} == as_nodes.texts


def test_the_callers_processors_and_criteria_see_the_branch_in_layout_order():
    model, seen = shared_model("llama"), []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids[0].tolist())
            return scores

    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 6 + 4 + 3])

    graph = branches(2)
    result = generate(model, graph, logits_processor=[Watch()], stopping_criteria=[AfterThree()])
    assert [len(new) for new in result.token_ids.values()] == [3, 3]
    for name in ("b0", "b1"):
        prefix = [*graph["context"].content, *graph[name].content]
        new = result.token_ids[name].tolist()
        for count in range(3):
            assert prefix + new[:count] in seen


def test_a_generation_config_counts_and_arguments_win():
    model, graph = shared_model("llama"), ICLGraph(*(ICLNode(ids(3, i), id=f"q{i}") for i in range(2)))
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    assert {len(new) for new in generate(model, graph, generation_config=config).token_ids.values()} == {3}
    more = generate(model, graph, generation_config=config, max_new_tokens=5)
    assert {len(new) for new in more.token_ids.values()} == {5}


def test_without_a_limit_branches_get_as_many_tokens_as_transformers_gives(tiny):
    model, graph = shared_model("llama"), ICLGraph(*(ICLNode(ids(25 + i, i), id=f"q{i}") for i in range(2)))
    together = generate(model, graph)
    for sink in graph.sinks:
        alone_ids = generate(model, sink).token_ids.tolist()
        assert together.token_ids[sink.id].tolist() == alone_ids
        assert len(alone_ids) == 20
    for name, ids_ in generate(model, graph, max_length=30).token_ids.items():
        assert len(ids_) == 30 - len(graph[name].content)


# Stops.


def test_stop_strings_are_dropped_and_ids_end_before_them(tiny):
    model, tokenizer = tiny
    fact = ICLNode("The capital of Quorin is Kumund.", id="fact")
    header = "\nQ: What is the capital of Quorin?\nA:"
    free = generate(model, GenNode(header, [fact], "free", max_new_tokens=6), tokenizer)
    assert "." in free.text
    stopped = generate(model, GenNode(header, [fact], "stopped", max_new_tokens=6, stop="."), tokenizer)
    assert stopped.text == free.text[: free.text.index(".")]
    (sequence,) = stopped.sequences
    assert tokenizer.decode(sequence.token_ids) == stopped.text
    by_argument = generate(model, ICLNode(header, [fact]), tokenizer, max_new_tokens=6, stop_strings=["."])
    assert by_argument.text == stopped.text
    assert by_argument.token_ids.tolist() == sequence.token_ids.tolist()


@pytest.mark.parametrize("backend", ["eager", "sdpa", "sparse"])
def test_a_stop_string_across_tokens_reaches_no_child(tiny, backend):
    """The first token was fed before the second one completed the stop string; nobody may see it."""
    model, tokenizer = tiny
    fact = ICLNode("The capital of Quorin is Kumund.", id="fact")
    header = "\nQ: What is the capital of Quorin?\nA:"
    free = generate(model, GenNode(header, [fact], "free", max_new_tokens=6), tokenizer)
    assert (free.text, len(free.token_ids)) == (" Kumund.", 2)
    draft = GenNode(header, [fact], "draft", max_new_tokens=6, stop="und.")
    child = GenNode(header, [fact, draft], "child", max_new_tokens=4)
    logits_seen = []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids, scores):
            logits_seen.append(scores.clone())
            return scores

    result = generate(model, child, tokenizer, backend=backend, logits_processor=[Watch()])
    assert (result["draft"], result.token_ids["draft"].tolist()) == (" Kum", [])
    cold = generate(model, ICLNode(header, [fact, ICLNode(header, [fact])]), tokenizer, max_new_tokens=4)
    assert result.token_ids["child"].tolist() == cold.token_ids.tolist()
    prompt = compile_prompt(result.realised, tokenizer)
    logits = leattn.forward(model, prompt, backend="eager").logits[0]
    new = len(result.token_ids["child"])
    assert logits[-new - 1 : -1].argmax(-1).tolist() == result.token_ids["child"].tolist()
    # Two tokens of the draft were looked at, then the child's first: a token that leaked would move its logits.
    torch.testing.assert_close(logits_seen[2][0], logits[-new - 1], atol=1e-4, rtol=1e-4)


def test_stop_strings_want_a_tokenizer():
    with pytest.raises(LeattnError, match="stop strings are text"):
        generate(shared_model("llama"), GenNode([1, 2], max_new_tokens=2, stop="x"))


# What is told while it runs.


def test_a_streamer_is_given_every_piece_of_every_branch(tiny):
    model, tokenizer = tiny
    facts = [ICLNode(f"The capital of {name} is Kumund.", id=name) for name in ("Quorin", "Zarvia")]
    graph = ICLGraph(
        *(
            GenNode(f"\nQ: What is the capital of {fact.id}?\nA:", [fact], f"{fact.id}?", max_new_tokens=5, stop=stop)
            for fact, stop in zip(facts, ((), (".",)), strict=True)
        )
    )
    pieces, finished = {}, []
    result = generate(
        model,
        graph,
        tokenizer,
        streamer=lambda node, piece: pieces.setdefault(node, []).append(piece),
        on_finished=lambda node, text: finished.append((node, text)),
    )
    assert {node: "".join(parts) for node, parts in pieces.items()} == result.texts
    assert dict(finished) == result.texts
    assert all(parts and all(parts) for parts in pieces.values())


def test_progress_counts_nodes(capsys):
    generate(shared_model("llama"), branches(3), progress=True)
    assert "3/3" in capsys.readouterr().err


# Interrupts.


def test_an_interrupt_leaves_the_model_clean_and_returns_what_there_is_on_request():
    model, graph = shared_model("llama"), two_rounds()
    whole = generate(model, graph)
    modules = [*model.modules()]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    implementation = model.config._attn_implementation

    def interrupted(**options):
        calls = []

        class Interrupt(LogitsProcessor):
            def __call__(self, input_ids, scores):
                calls.append(1)
                if len(calls) == 9:
                    raise KeyboardInterrupt
                return scores

        return generate(model, graph, logits_processor=[Interrupt()], **options)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    result = interrupted(on_interrupt="return")
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    assert model.config._attn_implementation == implementation
    assert not result.complete
    assert "interrupted" in result._repr_html_()
    assert set(result.branches) <= set(whole.branches)
    for name, (sequence,) in result.branches.items():
        expected = whole.branches[name][0].token_ids.tolist()
        assert sequence.token_ids.tolist() == expected[: len(sequence.token_ids)]
        assert sequence.text == str(sequence.token_ids.tolist())  # there is no tokenizer
    assert isinstance(result.realised["last"], GenNode)  # never begun, so it is still to be written
    assert not isinstance(result.realised["draft2"], GenNode)
    rest = generate(model, result.realised)
    assert rest["last"]


# Refusals.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "num_beams=2 is for one branch"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 is for one branch"),
        ({"use_cache": False}, "use_cache=False is for one branch"),
        ({"temprature": 2}, "'temprature': no such option"),
        ({"token_budget": 0}, "token_budget=0"),
        ({"on_interrupt": "stop"}, "'raise', 'return'"),
        ({"positions": "sequential"}, "needs the length of every node"),
        ({"positions": lambda graph, lengths: [0]}, "needs the length of every node"),
        ({"input_ids": torch.ones(1, 3)}, "input_ids comes from the prompt"),
    ],
)
def test_what_a_program_does_not_take_is_refused_by_name(options, words):
    with pytest.raises(LeattnError, match=words):
        generate(shared_model("llama"), branches(), **options)


def test_several_sinks_refuse_sequential_positions():
    graph = ICLGraph(ICLNode([1, 2], id="a"), ICLNode([3], id="b"))
    with pytest.raises(LeattnError, match="sequential"):
        generate(shared_model("llama"), graph, positions="sequential", max_new_tokens=2)


def test_a_misspelt_option_of_a_node_is_refused_before_anything_runs():
    with pytest.raises(LeattnError, match="'temprature'"):
        generate(shared_model("llama"), GenNode([1, 2], max_new_tokens=2, temprature=1.0))


def test_transformers_streamers_are_for_one_sink(tiny):
    model, tokenizer = tiny
    with pytest.raises(LeattnError, match="streamer is a function"):
        generate(model, branches(), tokenizer, streamer=TextStreamer(tokenizer))


def test_options_of_programs_are_refused_for_one_sink():
    model = shared_model("llama")
    for name, value in {"token_budget": 4, "progress": True, "on_finished": print, "on_interrupt": "return"}.items():
        with pytest.raises(LeattnError, match=f"^{name} is for programs"):
            generate(model, ICLNode([1, 2, 3]), max_new_tokens=2, **{name: value})


def test_positions_that_a_program_may_reach_are_checked_first():
    model = shared_model("gpt2")
    limit = model.config.max_position_embeddings
    draft = GenNode([1, 2], id="draft", max_new_tokens=limit - 10)
    with pytest.raises(LeattnError, match=f"the last position may be {limit + 1}"):
        generate(model, GenNode([3, 4], [draft], max_new_tokens=8 + 0), max_new_tokens=3)


def test_token_ids_without_an_embedding_are_refused():
    with pytest.raises(LeattnError, match="node 'big' holds token id 5000"):
        generate(shared_model("llama"), GenNode([5000], id="big", max_new_tokens=2))
