"""How a node reads, against a Llama, a Qwen3 and a Gemma3 whose attention is done by hand (reading_by_hand.py)."""

from __future__ import annotations

import math

import pytest
import reading_by_hand as by_hand
import torch
from models import make_model, shared_model
from oracles import tokens_of

import leattn
from leattn import BackendError, GenNode, GraphError, ICLGraph, ICLNode, KVStore, compile_prompt, forward, generate, read

HAND = ["llama", "qwen3", "gemma3_text"]
BACKENDS = ["eager", "sdpa", "sparse"]
"""Flex, which is slow uncompiled, has tests of its own in test_readings_flex.py."""


@pytest.fixture(autouse=True)
def _no_grad(request):
    if "gradient" in request.node.name:
        yield
        return
    with torch.no_grad():
        yield


def graph(*readings, last=(6, 7, 8, 9, 11, 12)):
    """Header, three documents, a question that reads groups of them: ``readings`` are (documents, options).

    The question is longer than what the sparse backend computes in one product; what continues it is not.
    """
    header = ICLNode([5, 6, 7], id="header")
    docs = [ICLNode(ids, [header], f"doc{i}") for i, ids in enumerate(([10, 11, 12, 13], [20, 21], [30, 31, 32]))]
    alone = [doc for i, doc in enumerate(docs) if all(i not in which for which, _ in readings)]
    groups = [read([docs[i] for i in which], **options) for which, options in readings]
    return [header, *docs, ICLNode(list(last), [header, *alone, *groups], "Q")]


CASES = {
    "temperature": [([0, 1, 2], {"temperature": 0.7})],
    "scale": [([0, 1], {"scale": 1.4})],
    "weight": [([1], {"log_weight": -1.1})],
    "cut": [([0, 2], {"log_weight": -math.inf})],
    "all": [([0, 1, 2], {"temperature": 0.6, "scale": 0.8, "log_weight": 0.5})],
    "groups": [([0], {"temperature": 0.5}), ([1], {"scale": 1.3, "log_weight": -0.4}), ([2], {"temperature": 2.0})],
    "layers": [([0, 1], {"temperature": 0.4, "layers": [0, 2]}), ([2], {"log_weight": -2.0, "layers": 1})],
    "heads": [([0, 2], {"temperature": 0.5, "scale": 1.5, "log_weight": 0.7, "heads": [0, 3]})],
    "shift": [([0, 1], {"shift": 4})],
    "back": [([0], {"shift": -3, "temperature": 0.8}), ([2], {"shift": 2, "heads": 1})],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", HAND)
def test_a_forward(family, case):
    nodes, model = graph(*CASES[case]), shared_model(family)
    expected, plain = by_hand.logits(model, nodes), by_hand.logits(model, graph())
    before = len(plain) - len(nodes[-1].content)
    assert (plain[-1] - expected[-1]).abs().max() > 1e-2, "the reading changes nothing here, so nothing was tested"
    assert (plain[:before] - expected[:before]).abs().max() < 1e-6
    for backend in BACKENDS:
        found = forward(model, compile_prompt(nodes[-1]), backend=backend).logits[0]
        assert (found - expected).abs().max() < 1e-4, backend


@pytest.mark.parametrize("family", HAND)
@pytest.mark.parametrize("case", ["all", "groups", "heads", "back"])
def test_what_is_generated_reads_as_the_sink_does(family, case):
    nodes, model = graph(*CASES[case]), shared_model(family)
    prompt, expected = compile_prompt(nodes[-1]), by_hand.greedy(model, nodes, 3)
    for backend in BACKENDS:
        store = KVStore()
        for options in ({}, {"use_cache": False}, {"kv_store": store}, {"kv_store": store}):
            result = generate(model, prompt, max_new_tokens=3, backend=backend, **options)
            assert result.token_ids.tolist() == expected, (backend, options)
        assert store.stats.hits > 0


def test_long_readers_and_scattered_groups():
    """More queries than one call takes, groups in more pieces than are read one by one, siblings that read alike."""
    header = ICLNode([5, 6, 7], id="header")
    docs = [ICLNode([(7 * i + j) % 90 + 3 for j in range(3 + i % 4)], [header], f"doc{i}") for i in range(14)]
    parents = [header, *docs[1::2], read(docs[::2], temperature=0.7, scale=1.2, log_weight=-0.3)]
    siblings = [ICLNode([(11 * i + j) % 90 + 3 for j in range(8)], parents, f"q{i}") for i in range(3)]
    last = ICLNode([3, 4], [*siblings[1:], read(siblings[0], log_weight=0.4)], "last")
    nodes, model = [header, *docs, *siblings, last], shared_model("llama")
    expected = by_hand.logits(model, nodes)
    for backend in BACKENDS:
        found = forward(model, compile_prompt(last), backend=backend).logits[0]
        assert (found - expected).abs().max() < 1e-4, backend
    wide = compile_prompt([ICLNode([j % 90 + 3 for j in range(700)], parents, "wide"), *siblings])
    dense, sparse = (forward(model, wide, backend=backend).logits[0] for backend in ("eager", "sparse"))
    assert (dense - sparse).abs().max() < 1e-4


def test_plots_show_what_is_read_otherwise():
    nodes = graph(*CASES["groups"])
    ax = leattn.viz.plot_mask(compile_prompt(nodes[-1]))
    assert ax.get_title(loc="left").endswith("; hatched: read otherwise")
    hatched = [collection for collection in ax.collections if collection.get_hatch()]
    assert len(hatched) == 1
    (outline,) = hatched[0].get_paths()
    assert outline.get_extents().extents.tolist() == [3, 12, 12, 18]  # the documents' tokens, in the rows of the question
    assert {"τ 0.5", "τ 2"} <= {text.get_text() for text in ax.texts}
    for drawn in (nodes[-1], compile_prompt(nodes[-1])):
        ax = leattn.viz.plot_dag(drawn)
        assert ax.get_title(loc="left").endswith("; 1 read otherwise")
        assert any(text.get_text().startswith("Q ◂ 1 at τ 0.5") for text in ax.texts)
    assert "hatched" not in leattn.viz.plot_mask(compile_prompt(graph()[-1])).get_title(loc="left")


def test_documents_of_a_chat():
    _, tokenizer = leattn.tiny.load()
    messages = [{"role": "user", "content": "Which city?"}, {"role": "assistant", "content": "Lumo."}]
    documents = ["Lumo.", leattn.read(["Vex.", [7, 8]], temperature=0.5), leattn.read("Zar.", log_weight=-1.0)]
    made = leattn.from_chat(tokenizer, messages, documents)
    plain = leattn.from_chat(tokenizer, messages, ["Lumo.", "Vex.", [7, 8], "Zar."])
    expected = compile_prompt(plain, tokenizer)
    for name in ("user", "assistant"):
        if name in [plain.name(node) for node in plain]:
            expected = expected.with_reading(name, ["document 2", "document 3"], temperature=0.5)
            expected = expected.with_reading(name, "document 4", log_weight=-1.0)
    found = compile_prompt(made, tokenizer)
    assert found.visible == expected.visible
    assert found.input_ids.tolist() == expected.input_ids.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_prompts_that_read_otherwise(backend):
    one, other = graph(*CASES["all"]), graph(*CASES["groups"], last=(40, 41, 42, 43, 44))
    model = shared_model("llama")
    found = forward(model, [compile_prompt(one[-1]), compile_prompt(other[-1])], backend=backend).logits
    for row, nodes in zip(found, (one, other), strict=True):
        expected = by_hand.logits(model, nodes)
        assert (row[-len(expected) :] - expected).abs().max() < 1e-4
    both = generate(model, [compile_prompt(one[-1]), compile_prompt(other[-1])], backend=backend, max_new_tokens=3)
    assert [each.token_ids.tolist() for each in both] == [by_hand.greedy(model, nodes, 3) for nodes in (one, other)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_identity_is_exact_to_the_last_bit(backend):
    model = shared_model("llama")
    plain, same = graph(), graph(([0, 1, 2], {"temperature": 1.0, "scale": 1, "log_weight": 0.0, "shift": 0}))
    first, second = (forward(model, compile_prompt(nodes[-1]), backend=backend).logits for nodes in (plain, same))
    assert torch.equal(first, second)
    elsewhere = graph(([0, 1], {"temperature": 0.5, "layers": [2]}))
    hidden = [
        forward(model, compile_prompt(nodes[-1]), backend=backend, output_hidden_states=True).hidden_states
        for nodes in (plain, elsewhere)
    ]
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(hidden[0][:3], hidden[1][:3], strict=True))
    assert (hidden[0][-1] - hidden[1][-1]).abs().max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_group_over_everything_is_a_row_at_a_temperature(backend):
    """A query that sees one group, and of itself as good as nothing: its row is the plain one with the scores divided by τ."""
    doc = ICLNode([10, 11, 12, 13, 14], id="doc")
    sharp, soft = (read(doc, temperature=temperature, log_weight=60.0) for temperature in (0.5, 1.0))
    model, divided = make_model("llama", num_hidden_layers=1), make_model("llama", num_hidden_layers=1)
    for layer in divided.model.layers:
        layer.self_attn.scaling /= 0.5  # all scores of the model
    prompts = [compile_prompt(ICLNode([20], [group], "Q")) for group in (sharp, soft)]
    found = forward(model, prompts[0], backend=backend).logits[0, -1]
    expected = forward(divided, prompts[1], backend=backend).logits[0, -1]
    assert (found - expected).abs().max() < 1e-4
    assert (found - forward(model, prompts[1], backend=backend).logits[0, -1]).abs().max() > 1e-2


def test_programs_read_with_header_and_written_tokens():
    model = shared_model("llama")
    header, *docs, _ = graph()
    parents = [header, docs[2], read(docs[:2], temperature=0.6, log_weight=-0.5)]
    first = GenNode([40, 41], parents, "first", max_new_tokens=3)
    second = GenNode([50, 51], [header, read(first, temperature=0.5, scale=1.5)], "second", max_new_tokens=3)
    written = by_hand.greedy(model, [header, *docs, ICLNode([40, 41], parents, "first")], 3)
    done = ICLNode([40, 41, *written], parents, "first")
    then = by_hand.greedy(
        model, [header, *docs, done, ICLNode([50, 51], [header, read(done, temperature=0.5, scale=1.5)], "second")], 3
    )
    for backend in BACKENDS:
        for store in (None, KVStore()):
            result = generate(model, ICLGraph(second), backend=backend, kv_store=store)
            assert [result.token_ids[name].tolist() for name in ("first", "second")] == [written, then]
    again = forward(model, compile_prompt(result.realised), backend="eager").logits[0]
    nodes = list(result.realised.nodes)
    assert [len(node.readings) for node in nodes[-2:]] == [1, 1]
    assert (again - by_hand.logits(model, nodes)).abs().max() < 1e-4


def test_beams_and_sampling():
    model, nodes = shared_model("llama"), graph(*CASES["all"])
    results = [
        generate(model, compile_prompt(nodes[-1]), backend=backend, max_new_tokens=4, num_beams=3, num_return_sequences=3)
        for backend in BACKENDS
    ]
    texts = [[sequence.token_ids.tolist() for sequence in result.sequences] for result in results]
    assert texts[0] == texts[1] == texts[2]
    best = results[0].sequences[0].token_ids.tolist()
    *before, sink = nodes
    from leattn.dag.node import regrouped

    grown = [*before, ICLNode([*sink.content, *best], regrouped(sink), "grown")]
    rows = by_hand.logits(model, grown).log_softmax(-1)[-len(best) - 1 : -1]
    by_tokens = sum(float(row[token]) for row, token in zip(rows, best, strict=True))
    greedy = by_hand.greedy(model, nodes, 4)
    grown = [*before, ICLNode([*sink.content, *greedy], regrouped(sink), "grown")]
    rows = by_hand.logits(model, grown).log_softmax(-1)[-len(greedy) - 1 : -1]
    assert by_tokens >= sum(float(row[token]) for row, token in zip(rows, greedy, strict=True)) - 1e-4


@pytest.mark.parametrize("family", HAND)
def test_a_store_shares_what_is_read_and_keeps_readers_apart(family):
    model, store = shared_model(family), KVStore()
    forward(model, compile_prompt(graph()[-1]), kv_store=store)
    held = len(store)
    for case in ("temperature", "groups", "shift"):
        nodes = graph(*CASES[case])
        hits = store.stats.hits
        found = forward(model, compile_prompt(nodes[-1]), kv_store=store).logits[0]
        assert (found - by_hand.logits(model, nodes)[-6:]).abs().max() < 1e-4
        assert store.stats.hits - hits == 4, "header and documents come from the store"
    assert len(store) == held + 3
    reader = graph(*CASES["temperature"])[-1]
    after = ICLNode([60, 61], [reader], "after")
    plain = graph()[-1]
    other = ICLNode([60, 61], [plain], "after")
    for _ in range(2):
        for last in (after, other):
            found = forward(model, compile_prompt(last), kv_store=store).logits[0]
            nodes = list(ICLGraph(last).nodes)
            assert (found - by_hand.logits(model, nodes)[-2:]).abs().max() < 1e-4


def test_a_store_moves_readers():
    model, store = shared_model("llama"), KVStore()

    def at(start):
        header = ICLNode([5, 6, 7], id="header", start_pos_id=start)
        doc = ICLNode([10, 11, 12], [header], "doc")
        reader = ICLNode([40, 41], [header, read(doc, temperature=0.6, shift=3)], "reader")
        return [header, doc, reader, ICLNode([50, 51], [reader], "Q")]

    forward(model, compile_prompt(at(0)[-1]), kv_store=store)
    hits = store.stats.hits
    found = forward(model, compile_prompt(at(90)[-1]), kv_store=store).logits[0]
    assert store.stats.hits - hits == 1  # the reader, and nothing else is needed
    nodes = at(90)
    assert (
        found - by_hand.logits(model, nodes, where=[90 + p for p in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)])[-2:]
    ).abs().max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["groups", "heads", "layers", "back"])
def test_a_trace_shows_the_weights_that_were_used(backend, case):
    model, nodes = shared_model("llama"), graph(*CASES[case])
    weights: dict = {}
    by_hand.logits(model, nodes, weights=weights)
    seen = leattn.analysis.trace(model, compile_prompt(nodes[-1]), backend=backend, tokens=[("Q", f"doc{i}") for i in range(3)])
    spans = compile_prompt(nodes[-1]).spans
    (low, high) = spans[nodes[-1]]
    for i in range(3):
        start, stop = spans[nodes[1 + i]]
        for (layer, head), expected in weights.items():
            shown = seen.tokens["Q", f"doc{i}"].weights[layer, head]
            assert (shown - expected[low:high, start:stop]).abs().max() < 1e-5
            assert abs(float(seen.mass[layer, head, 4, 1 + i]) - float(expected[low:high, start:stop].sum(1).mean())) < 1e-5


def test_eager_returns_the_weights_that_were_used():
    model, nodes = shared_model("llama"), graph(*CASES["all"])
    weights: dict = {}
    by_hand.logits(model, nodes, weights=weights)
    shown = forward(model, compile_prompt(nodes[-1]), backend="eager", output_attentions=True).attentions
    for (layer, head), expected in weights.items():
        assert (shown[layer][0, head] - expected).abs().max() < 1e-5


def test_gradients_flow_through_readings():
    nodes, grads = graph(*CASES["all"]), []
    for backend in BACKENDS:
        model = make_model("llama")
        forward(model, compile_prompt(nodes[-1]), backend=backend, use_cache=False).logits[0, -1].square().sum().backward()
        grads.append(model.model.layers[1].self_attn.k_proj.weight.grad.clone())
    assert (grads[0] - grads[1]).abs().max() < 1e-3 * grads[0].abs().max()
    assert (grads[0] - grads[2]).abs().max() < 1e-3 * grads[0].abs().max()
    model, step = make_model("llama"), 1e-3
    weight = model.model.layers[1].self_attn.k_proj.weight
    row, column = divmod(int(grads[0].abs().argmax()), grads[0].shape[1])
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            weight[row, column] += sign * step
            values.append(float(by_hand.logits(model, nodes)[-1].square().sum()))
            weight[row, column] -= sign * step
    slope = (values[0] - values[1]) / (2 * step)
    assert abs(slope - float(grads[0][row, column])) < 2e-2 * abs(slope)


def test_suppression_acts_before_the_reading():
    """Scores are changed first and then read: with the same factor on both, as done by hand."""
    from leattn.interventions import Suppress, intervene

    model = make_model("llama", num_hidden_layers=1)
    nodes = graph(([0], {"temperature": 0.5}))
    prompt = compile_prompt(nodes[-1])
    with intervene(model, prompt, [Suppress("doc0", 0.7, mode="additive")]) as block:
        found = model(**block.inputs).logits[0, -1]
    # s + 0.7 read at τ: L gains 0.7 / τ, and with σ = 1 the group σ·τ·0.7/τ = 0.7: a log-weight of 0.7.
    expected = by_hand.logits(model, graph(([0], {"temperature": 0.5, "log_weight": 0.7})))[-1]
    assert (found - expected).abs().max() < 1e-4


# The language.


def test_groups_stand_where_nodes_do():
    a, b, c = (ICLNode([i], id=name) for i, name in enumerate("abc"))
    node = ICLNode([9], [a, *read([b, c], temperature=0.5)], "q")
    same = ICLNode([9], [a, read([b, c], temperature=0.5)], "q")
    for one in (node, same):
        assert set(one.parents) == {a, b, c}
        assert [group.nodes for group in one.readings] == [(b, c)]
    assert ICLNode([9], read(a, scale=2.0)).readings[0].nodes == (a,)
    assert ICLNode([9], [a, read(b)]).readings == ()
    with pytest.raises(GraphError, match="given twice"):
        ICLNode([9], [a, read([a, b], scale=2.0)])
    with pytest.raises(GraphError, match="given twice"):
        ICLNode([9], [read(a, scale=2.0), read([a, b], scale=3.0)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0}, "temperature=0 of a reading; give a positive number"),
        ({"scale": -1.0}, "scale=-1 of a reading"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"log_weight": math.inf}, "log_weight=inf"),
        ({"shift": math.inf}, "shift=inf"),
        ({"temperature": "warm"}, "temperature='warm' of a reading; give a number"),
        ({"layers": [-1]}, "layers of a reading are whole numbers from 0 up, not -1"),
        ({"heads": []}, r"heads=\[\] of a reading"),
    ],
)
def test_numbers_that_are_none(options, words):
    with pytest.raises(GraphError, match=words):
        read(ICLNode([1]), **options)


def test_what_is_no_group():
    a = ICLNode([1])
    with pytest.raises(GraphError, match="one node or more"):
        read([])
    with pytest.raises(GraphError, match="a parent is an ICLNode that exists already"):
        ICLNode([9], [read(["a"], scale=2.0)])
    with pytest.raises(GraphError, match="read in one way"):
        read([read(a, scale=2.0)])


def test_layers_and_heads_that_the_model_does_not_have():
    model = shared_model("llama")
    for options, words in (
        ({"layers": [3]}, r"layers \[3\]; this model has layers 0 to 2"),
        ({"heads": [4, 5]}, r"heads \[4, 5\]"),
    ):
        nodes = graph(([0], {"temperature": 0.5, **options}))
        with pytest.raises(BackendError, match=words):
            forward(model, compile_prompt(nodes[-1]))


def test_files_networkx_and_pickles(tmp_path):
    import copy
    import pickle

    nodes = graph(*CASES["groups"])
    made = ICLGraph(nodes[-1])
    for name in ("p.json", "p.yaml"):
        made.to_file(tmp_path / name)
    graphs = [
        ICLGraph.from_file(tmp_path / "p.json"),
        ICLGraph.from_file(tmp_path / "p.yaml"),
        ICLGraph.from_dict(made.to_dict()),
        ICLGraph.from_networkx(made.to_networkx()),
        pickle.loads(pickle.dumps(made)),
        copy.deepcopy(made),
    ]
    for other in graphs:
        assert str(compile_prompt(other)) == str(compile_prompt(made))
        groups = other["Q"].readings
        assert [[other.name(one) for one in group.nodes] for group in groups] == [["doc0"], ["doc1"], ["doc2"]]
        assert [group.reading for group in groups] == [group.reading for group in nodes[-1].readings]
    fields = made.to_dict()["nodes"][-1]["parents"]
    assert {"read": ["doc1"], "log_weight": -0.4, "scale": 1.3} in fields
    for wrong, words in (
        ({"read": "doc0"}, "has a list of ids under 'read'"),
        ({"read": ["doc0"], "warmth": 3}, "unknown 'warmth'"),
        ({"read": ["doc0"], "temperature": 0}, "temperature=0"),
    ):
        data = made.to_dict()
        data["nodes"][-1]["parents"] = ["header", wrong]
        with pytest.raises(GraphError, match=words):
            ICLGraph.from_dict(data)


def test_edits_and_continuations():
    nodes = graph(*CASES["groups"])
    prompt, plain = compile_prompt(nodes[-1]), compile_prompt(graph()[-1])
    edited = plain.with_reading("Q", "doc0", temperature=0.5).with_reading("Q", ["doc1"], scale=1.3, log_weight=-0.4)
    edited = edited.with_reading("Q", plain.graph["doc2"], temperature=2.0)
    assert edited.visible == prompt.visible
    assert plain.visible.readings == {}
    back = edited.with_reading("Q", ["doc0", "doc1", "doc2"])
    assert back.visible == plain.visible
    moved = edited.with_reading("Q", ["doc0", "doc1"], temperature=0.9)
    assert [runs for runs, _ in moved.visible.readings[4]] == [((3, 4),), ((1, 3),)]
    cut = prompt.without_edge("Q", "doc1")
    assert [runs for runs, _ in cut.visible.readings[4]] == [((1, 2),), ((3, 4),)]
    assert [runs for runs, _ in prompt.without_node("doc0").visible.readings[4]] == [((2, 3),), ((3, 4),)]
    with pytest.raises(GraphError, match="'doc0' does not see 'doc1'"):
        plain.with_reading("doc0", "doc1", temperature=0.5)
    model = shared_model("llama")
    longer = prompt.continued([70, 71], "answer")
    assert len(longer.graph["answer"].readings) == 3
    *before, sink = nodes
    expected = by_hand.logits(model, [*before, ICLNode([*sink.content, 70, 71], by_hand_parents(sink), "Q")])
    assert (forward(model, longer).logits[0] - expected).abs().max() < 1e-4


def by_hand_parents(node):
    grouped = {one for group in node.readings for one in group.nodes}
    return [*(parent for parent in node.parents if parent not in grouped), *node.readings]


def test_builders_pass_groups_on():
    header, *docs, _ = graph()
    group = read(docs, temperature=0.5)
    for made in (leattn.parallel([[1], [2]], [header, group]), leattn.causal([[1], [2]], [header, group])):
        assert all([each.nodes for each in node.readings] == [tuple(docs)] for node in made)
    first, second = leattn.chain([[1], [2]], parents=[header, group])
    assert len(first.readings) == 1
    assert second.readings == ()


def test_what_is_printed():
    lines = str(compile_prompt(graph(*CASES["groups"])[-1])).splitlines()
    assert lines[-1].endswith("■▣▤▥■  ▣ τ 0.5  ▤ σ 1.3  b -0.4  ▥ τ 2")
    assert lines[-2].endswith("■⬚⬚■⬚")
    assert "▣ τ 0.5" in compile_prompt(graph(*CASES["groups"])[-1])._repr_html_()


# What refuses.


def test_varlen_is_refused_by_name():
    prompt = compile_prompt(graph(*CASES["temperature"])[-1])
    with pytest.raises(BackendError, match=r"varlen reads everything as it is.*use backend='sparse' or 'sdpa'"):
        forward(shared_model("llama"), prompt, backend="varlen")


def test_models_without_rotary_positions_take_no_shift():
    model = shared_model("gpt2")
    nodes = graph(*CASES["shift"])
    with pytest.raises(BackendError, match="cannot read in other ways"):
        forward(model, compile_prompt(nodes[-1]))
    forward(model, compile_prompt(graph(*CASES["all"])[-1]))


def test_model_inputs_cannot_carry_a_reading():
    prompt = compile_prompt(graph(*CASES["temperature"])[-1])
    with pytest.raises(BackendError, match=r"reads some of what it sees in another way \(leattn\.read\), which no mask"):
        leattn.model_inputs(shared_model("llama"), prompt)
    for mask in (prompt.additive_mask, lambda: prompt.mask_mod, prompt.block_mask):
        with pytest.raises(BackendError, match="no mask can carry"):
            mask()


def test_check_model_says_it():
    report = leattn.check_model(shared_model("llama"))
    assert report["readings"].works
    assert report["shifted readings"].works
    report = leattn.check_model(shared_model("gpt2"))
    assert report["readings"].works
    assert not report["shifted readings"].works


def test_tokens_are_those_of_the_graph():
    """The oracle walks the nodes in the order that is compiled."""
    nodes = graph(*CASES["all"])
    prompt = compile_prompt(nodes[-1])
    assert [node.content[i] for node, i in tokens_of(nodes)] == prompt.input_ids[0].tolist()
