"""Programs: every written node equals that node run alone, cold, on the compiled graph of what it sees and so on upwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import shared_model
from oracles import seen_by
from strategies import VISIBILITIES, node_lists
from test_generation import assert_equal_up_to_ties, oracle

import leattn
from leattn import GenNode, ICLGraph, ICLNode, LeattnError, compile_prompt, generate

PROGRAM_FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt_neox", "gpt2"]


@st.composite
def programs(draw, max_nodes=6):
    """Random graphs in which some nodes, at least one, are written by the model."""
    plain = draw(node_lists(max_nodes, max_tokens=3))
    is_written = draw(st.lists(st.booleans(), min_size=len(plain), max_size=len(plain)).filter(any))
    new = {}
    for i, (node, written) in enumerate(zip(plain, is_written, strict=True)):
        parents = [new[parent] for parent in node.parents]
        if written:
            new[node] = GenNode(node.content, parents, f"g{i}", max_new_tokens=draw(st.integers(1, 3)))
        else:
            new[node] = ICLNode(node.content, parents, f"n{i}")
    return ICLGraph(*new.values())


def alone(node, written, made):
    """The node and its ancestors as plain nodes, the written ancestors with what the program wrote for them."""
    if node not in made:
        parents = [alone(parent, written, made) for parent in node.parents]
        ids = [*node.content, *written.get(node.id, [])]
        made[node] = ICLNode(ids, parents, node.id, start_pos_id=node.start_pos_id)
    return made[node]


def check_against_cold_runs(model, graph, result, visibility="parents"):
    """Each written node by itself: its header on a compiled graph, decoded greedily with one full forward per token."""
    written = {name: sequences[0].token_ids.tolist() for name, sequences in result.branches.items()}
    assert set(written) == {node.id for node in graph.nodes if isinstance(node, GenNode)}
    for node in graph.nodes:
        if isinstance(node, GenNode):
            finished = {name: ids for name, ids in written.items() if name != node.id}
            prompt = compile_prompt(alone(node, finished, {}), visibility=visibility)
            assert len(written[node.id]) == node.max_new_tokens
            expected, margins = oracle(model, prompt, node.max_new_tokens)
            assert_equal_up_to_ties(written[node.id], expected, margins)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("family", PROGRAM_FAMILIES)
@settings(max_examples=6)
@given(graph=programs(), visibility=VISIBILITIES)
def test_every_written_node_equals_its_cold_run(family, backend, graph, visibility):
    model = shared_model(family)
    result = generate(model, graph, backend=backend, visibility=visibility)
    check_against_cold_runs(model, graph, result, visibility)


@pytest.mark.parametrize("family", PROGRAM_FAMILIES)
@settings(max_examples=5)
@given(nodes=node_lists(max_nodes=6))
def test_several_sinks_equal_each_sink_alone(family, nodes):
    model, graph = shared_model(family), ICLGraph(*nodes)
    result = generate(model, graph, max_new_tokens=4)
    assert list(result.branches) == [graph.names[sink] for sink in graph.sinks]
    for sink in graph.sinks:
        expected, margins = oracle(model, compile_prompt(sink), 4)
        assert_equal_up_to_ties(result.branches[graph.names[sink]][0].token_ids.tolist(), expected, margins)


def test_through_flex():
    with torch.compiler.set_stance("force_eager"):
        for family in ("llama", "gemma3_text"):
            model, graph = shared_model(family), two_rounds()
            check_against_cold_runs(model, graph, generate(model, graph, backend="flex"))


def ids(count, seed):
    return torch.randint(2, 100, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


FIRST = ids(4, 3)


def two_rounds(first=FIRST, limits=(3, 5, 2)):
    """Three drafts over a shared context, a node that waits for two of them, and a last one that waits for all."""
    context = ICLNode(ids(6, 1), id="context")
    drafts = [
        GenNode(first if i == 0 else ids(4, 10 + i), [context], f"draft{i}", max_new_tokens=limit)
        for i, limit in enumerate(limits)
    ]
    note = ICLNode(ids(3, 5), [drafts[1]], id="note")
    middle = GenNode(ids(2, 6), [drafts[0], note], "middle", max_new_tokens=3)
    return ICLGraph(GenNode(ids(2, 7), [context, *drafts, middle], "last", max_new_tokens=4))


# Cost: the schedule's optimum, counted by hand.


def optimum(graph):
    """Steps and tokens if every node starts as soon as what it depends on is complete, and nothing is computed twice."""
    finished, seen = {}, set()
    for node in graph.nodes:
        before = max((finished[parent] for parent in node.parents), default=0)
        finished[node] = before + node.max_new_tokens if isinstance(node, GenNode) else before
    stack = [node for node in graph.nodes if isinstance(node, GenNode)]
    needed = set(stack)
    while stack:
        for parent in seen_by(stack.pop()):
            seen.add(parent)
            if parent not in needed:
                needed.add(parent)
                stack.append(parent)
    tokens = sum(len(node.content) for node in needed)
    # The last token of a written node is fed only if somebody sees it.
    tokens += sum(node.max_new_tokens - (node not in seen) for node in needed if isinstance(node, GenNode))
    return max(finished[node] for node in needed), tokens


@settings(max_examples=30)
@given(graph=programs(max_nodes=8))
def test_steps_and_tokens_are_the_schedules_optimum(graph):
    stats = generate(shared_model("llama"), graph).stats
    assert (stats.steps, stats.computed) == optimum(graph)
    assert stats.reused == 0


def test_branches_take_as_many_steps_as_the_longest():
    context = ICLNode(ids(9, 0), id="context")
    questions = [ICLNode(ids(3 + i, i), [context], id=f"q{i}") for i in range(4)]
    stats = generate(shared_model("llama"), ICLGraph(*questions), max_new_tokens=5).stats
    assert (stats.steps, stats.computed, stats.generated) == (5, 9 + 3 + 4 + 5 + 6 + 4 * 4, 4 * 5)


def test_a_node_that_no_written_node_needs_is_not_computed():
    used, unused = ICLNode(ids(4, 0), id="used"), ICLNode(ids(50, 1), id="unused")
    written = GenNode(ids(2, 2), [used], "written", max_new_tokens=1)
    result = generate(shared_model("llama"), ICLGraph(written, unused))
    assert result.stats.computed == 6


# Independence.


@pytest.mark.parametrize("backend", ["sdpa", "auto"])
def test_a_branch_never_depends_on_another(backend):
    model = shared_model("llama")
    base = generate(model, two_rounds(), backend=backend)
    other = generate(model, two_rounds(first=ids(7, 99)), backend=backend)
    longer = generate(model, two_rounds(limits=(9, 5, 2)), backend=backend)
    assert other["draft0"] != base["draft0"]  # the control: the branch itself does change
    for result in (other, longer):
        assert result["draft1"] == base["draft1"]
        assert result["draft2"] == base["draft2"]


def test_what_continues_a_sink_reaches_no_other_branch():
    model, context = shared_model("llama"), ICLNode(ids(5, 0), id="context")
    left, right = (ICLNode(ids(4, i), [context], id=name) for i, name in enumerate(("left", "right")))
    together = generate(model, ICLGraph(left, right), max_new_tokens=8)
    for name, sink in (("left", left), ("right", right)):
        assert together[name] == generate(model, sink, max_new_tokens=8).text


# Budgets, batches, compaction: the same results.


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 1000])
def test_a_token_budget_bounds_every_step_and_changes_nothing(budget, monkeypatch):
    fed = []
    feed = leattn.generation.session.Session.step

    def counted(self, feeds, rows, **kwargs):
        fed.append(sum(len(one.ids) for one in feeds))
        return feed(self, feeds, rows, **kwargs)

    monkeypatch.setattr(leattn.generation.session.Session, "step", counted)
    model = shared_model("llama")
    free = generate(model, two_rounds())
    fed.clear()
    bounded = generate(model, two_rounds(), token_budget=budget)
    assert bounded.texts == free.texts
    assert max(fed) <= budget
    assert sum(fed) == free.stats.computed


def test_forgetting_what_nobody_sees_changes_nothing(monkeypatch):
    model = shared_model("gemma3_text")

    def chain():
        node = ICLNode(ids(3, 0), id="start")
        for i in range(12):
            node = GenNode(ids(2, i), [node], f"g{i}", max_new_tokens=2)
        return ICLGraph(node)

    kept = generate(model, chain())
    lengths = []
    forget = leattn.generation.session.Session.forget_all_but

    def watched(self, units):
        forget(self, units)
        lengths.append(self.row.length)

    monkeypatch.setattr(leattn.generation.schedule, "COMPACT", 8)
    monkeypatch.setattr(leattn.generation.session.Session, "forget_all_but", watched)
    assert generate(model, chain()).texts == kept.texts
    assert lengths
    assert max(lengths) < 20 < kept.stats.computed


def test_programs_in_a_list_run_in_one_sequence_and_share_nodes():
    model, context = shared_model("llama"), ICLNode(ids(20, 0), id="context")

    def program(seed):
        draft = GenNode(ids(3, seed), [context], "draft", max_new_tokens=4)
        return ICLGraph(GenNode(ids(2, seed + 1), [draft], "final", max_new_tokens=3))

    graphs = [program(1), program(3), program(5)]
    together = generate(model, graphs)
    for graph, result in zip(graphs, together, strict=True):
        assert result.texts == generate(model, graph).texts
    stats = together[0].stats
    assert stats.computed == 20 + 3 * (3 + 4 + 2 + 2)
    assert stats.steps == 7


def test_plain_prompts_and_programs_mix_in_a_list():
    model, context = shared_model("llama"), ICLNode(ids(20, 0), id="context")
    question = ICLNode(ids(3, 1), [context], id="Q")
    written = GenNode(ids(3, 2), [context], "W", max_new_tokens=4)
    plain, program = generate(model, [question, written], max_new_tokens=4)
    assert plain.text == generate(model, question, max_new_tokens=4).text
    assert program.text == generate(model, written).text
    assert plain.stats.computed == 20 + 3 + 3 + 3 + 3


# Realised graphs.


def test_a_realised_graph_compiles_to_what_ran():
    model, graph = shared_model("llama"), two_rounds()
    result = generate(model, graph)
    realised = result.realised
    assert [realised.names[node] for node in realised.nodes] == [graph.names[node] for node in graph.nodes]
    assert realised["context"] is graph["context"]
    prompt = compile_prompt(realised)
    with torch.no_grad():
        logits = leattn.forward(model, prompt, backend="eager").logits[0]
    for name, sequences in result.branches.items():
        new = sequences[0].token_ids
        start, stop = prompt.spans[realised[name]]
        assert prompt[name].input_ids[-len(new) :].tolist() == new.tolist()
        assert logits[stop - len(new) - 1 : stop - 1].argmax(-1).tolist() == new.tolist()
        assert stop - start == len(graph[name].content) + len(new)


def test_continuations_of_several_sinks_become_nodes():
    model, context = shared_model("gpt2"), ICLNode(ids(5, 0), id="context")
    sinks = [ICLNode(ids(3 + i, i), [context], id=f"q{i}") for i in range(3)]
    result = generate(model, ICLGraph(*sinks), max_new_tokens=4)
    prompt = compile_prompt(result.realised)
    with torch.no_grad():
        logits = leattn.forward(model, prompt, backend="eager").logits[0]
    for sink in sinks:
        view = prompt[f"{sink.id} (continued)"]
        assert view.positions[0] == prompt[sink].positions[-1] + 1
        assert set(prompt.sees(view.node)) == {context, sink}
        chosen = [int(logits[prompt.spans[sink][1] - 1].argmax()), *logits[slice(*view.span)].argmax(-1).tolist()[:-1]]
        assert chosen == view.input_ids.tolist()


def test_results_know_their_branches():
    result = generate(shared_model("llama"), two_rounds())
    assert list(result.texts) == ["draft0", "draft1", "draft2", "middle", "last"]
    assert result.prompt is None
    assert result.complete
    with pytest.raises(LeattnError, match="there are 5 branches"):
        _ = result.text
    with pytest.raises(LeattnError, match="'note' was not continued"):
        _ = result["note"]
    assert result._repr_html_().count("<tr>") == 5


def test_edits_of_a_compiled_prompt_hold_for_its_branches():
    model = shared_model("llama")
    root, document = ICLNode(ids(3, 0), id="root"), ICLNode(ids(6, 1), id="document")
    sinks = [ICLNode(ids(4, 2 + i), [root, document], id=f"q{i}") for i in range(2)]
    prompt = compile_prompt(sinks).without_edge("q0", "document")
    result = generate(model, prompt, max_new_tokens=5)
    expected, margins = oracle(model, compile_prompt(sinks[0]).without_edge("q0", "document"), 5)
    assert_equal_up_to_ties(result.branches["q0"][0].token_ids.tolist(), expected, margins)
    assert result["q1"] == generate(model, sinks[1], max_new_tokens=5).text


@pytest.mark.parametrize("positions", ["after_parents", "restart"])
def test_positions_and_pins(positions):
    model = shared_model("llama")
    context = ICLNode(ids(5, 0), id="context", start_pos_id=3)
    draft = GenNode(ids(3, 1), [context], "draft", max_new_tokens=4)
    pinned = GenNode(ids(3, 2), [draft], "pinned", max_new_tokens=2, start_pos_id=40)
    graph = ICLGraph(GenNode(ids(2, 3), [draft, pinned], "last", max_new_tokens=3))
    result = generate(model, graph, positions=positions)
    written = {name: sequences[0].token_ids.tolist() for name, sequences in result.branches.items()}
    for node in graph.nodes:
        if isinstance(node, GenNode):
            finished = {name: new for name, new in written.items() if name != node.id}
            prompt = compile_prompt(alone(node, finished, {}), positions=positions)
            expected, margins = oracle(model, prompt, node.max_new_tokens)
            assert_equal_up_to_ties(written[node.id], expected, margins)


# Chats.


def test_a_generated_turn_is_what_transformers_generates_on_the_rendered_chat():
    model, tokenizer = leattn.tiny.load()
    fact = "The capital of Quorin is Kumund. What is the capital of Quorin?"
    messages = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": fact}]
    options = {"max_new_tokens": 6}
    graph = leattn.from_chat(tokenizer, [*messages, {"role": "assistant", "generate": options}])
    result = generate(model, graph, tokenizer)
    plain = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**plain, **options)[0, plain["input_ids"].shape[1] :]
    assert result.text == tokenizer.decode(new, skip_special_tokens=True).strip()
    assert result.token_ids.tolist() == new.tolist()[: len(result.token_ids)]


def test_a_later_turn_sees_what_was_generated():
    model, tokenizer = leattn.tiny.load()
    turn = {"role": "assistant", "generate": {"max_new_tokens": 6}}
    questions = [{"role": "user", "content": f"What is the capital of {name}?"} for name in ("Zarvia", "Genia")]
    graph = leattn.from_chat(tokenizer, [questions[0], turn, questions[1], turn], documents=["The capital of Genia is Pardan."])
    result = generate(model, graph, tokenizer)
    first = result.branches["assistant 1"][0].text
    again = leattn.from_chat(
        tokenizer,
        [questions[0], {"role": "assistant", "content": first}, questions[1], turn],
        documents=["The capital of Genia is Pardan."],
    )
    (sink,) = again.sinks
    assert result["assistant 2"] == generate(model, again, tokenizer)[sink]
