"""``attribute`` against losses by hand: the plain model under a dense mask that a test edits cell by cell."""

from __future__ import annotations

import sys
from random import Random

import pytest
import torch
from models import make_model, shared_model

import leattn
from leattn import BackendError, GraphError, ICLNode, LeattnError, causal, compile_prompt
from leattn.analysis import attribute
from leattn.interventions import Suppress, intervene
from leattn.tiny.examples import make


@pytest.fixture(autouse=True)
def _uncompiled_flex():
    with torch.compiler.set_stance("force_eager"):
        yield


METHODS = ("suppress_nodes", "cut_nodes", "cut_edges", "suppress_tokens")
TARGET = [17, 5, 60]


def diamond():
    """A root, two documents of which the second sees the first, a bystander that nobody sees but the sink, a sink."""
    root = ICLNode([1, 8], id="root")
    first = ICLNode([11, 12, 13], [root], id="first")
    second = ICLNode([21, 22], [root, first], id="second")
    other = ICLNode([31, 32, 33], id="other")
    return compile_prompt(ICLNode([41, 42], [root, second, other], id="Q"))


def losses_by_hand(model, prompt, allowed):
    """Cross-entropy of TARGET behind a prompt, from a dense mask ``[S, S]``: the target sees what the last row sees."""
    size, new = len(prompt), len(TARGET)
    mask = torch.zeros(size + new, size + new, dtype=torch.bool)
    mask[:size, :size] = allowed
    for i in range(new):
        mask[size + i, :size] = allowed[-1]
        mask[size + i, size : size + i + 1] = True
    positions = torch.cat([prompt.position_ids[0], prompt.position_ids[0, -1] + 1 + torch.arange(new)])
    additive = torch.zeros(1, 1, size + new, size + new).masked_fill(~mask, torch.finfo(torch.float32).min)
    ids = torch.cat([prompt.input_ids[0], torch.tensor(TARGET)])
    with torch.no_grad():
        logits = model(ids[None], attention_mask=additive, position_ids=positions[None], use_cache=False).logits[0]
    chances = logits.double().log_softmax(-1)
    return [-float(chances[size - 1 + i, token]) for i, token in enumerate(TARGET)]


def close(a, b):
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-4)


def test_the_oracle_builds_the_mask_of_the_continued_prompt():
    """Two ways to say it: rows written by hand, and ``prompt.continued(ids).additive_mask()``."""
    model, prompt = shared_model("llama"), diamond()
    whole = prompt.continued(TARGET)
    with torch.no_grad():
        logits = model(whole.input_ids, attention_mask=whole.additive_mask(), position_ids=whole.position_ids).logits[0]
    chances = logits.log_softmax(-1)
    close(
        [-float(chances[len(prompt) - 1 + i, t]) for i, t in enumerate(TARGET)],
        losses_by_hand(model, prompt, prompt.dense_mask()),
    )


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_cuts_equal_a_mask_edited_by_hand(backend):
    model, prompt = shared_model("llama"), diamond()
    found = attribute(model, prompt, TARGET, methods=["cut_nodes", "cut_edges"], backend=backend)
    untouched = losses_by_hand(model, prompt, prompt.dense_mask())
    close(found.loss, untouched)
    assert found.backend == backend
    for row in found.rows:
        (start, end), allowed = prompt[row.node].span, prompt.dense_mask()
        queries = range(*prompt[row.query].span) if row.method == "cut_edges" else range(len(prompt))
        for q in queries:
            for k in range(start, end):
                allowed[q, k] = allowed[q, k] and start <= q < end  # within the node nothing changes
        expected = losses_by_hand(model, prompt, allowed)
        close(row.per_token, [a - b for a, b in zip(expected, untouched, strict=True)])
    assert [row.node for row in found.rows if row.method == "cut_nodes"] == ["root", "first", "second", "other"]
    assert {(row.query, row.node) for row in found.rows if row.method == "cut_edges"} == {
        ("first", "root"),
        ("second", "root"),
        ("second", "first"),
        ("Q", "root"),
        ("Q", "second"),
        ("Q", "other"),
    }


def test_suppression_equals_one_prompt_at_a_time_under_intervene():
    model, prompt = shared_model("llama"), diamond()
    found = attribute(model, prompt, TARGET, methods=["suppress_nodes", "suppress_tokens"], factor=0.3, layers=[0, 2])
    whole = prompt.continued(TARGET)

    def losses(operations):
        with intervene(model, whole, operations) as attention, torch.no_grad():
            chances = model(**attention.inputs).logits[0].double().log_softmax(-1)
        return [-float(chances[len(prompt) - 1 + i, token]) for i, token in enumerate(TARGET)]

    untouched = losses([])
    for row in found.rows:
        where = row.node if row.token is None else row.token
        expected = losses([Suppress(where, 0.3, layers=[0, 2])])
        close(row.per_token, [a - b for a, b in zip(expected, untouched, strict=True)])
        assert abs(row.importance) > 1e-4
    assert [row.token for row in found.rows if row.token is not None] == list(range(len(prompt) - 2))


def test_a_weight_of_nothing_equals_cutting_where_the_node_does_not_see_itself():
    """Of a node of one token, and of what others see: a knockout also hides a node's tokens from each other."""
    model = shared_model("llama")
    nodes = causal([[5], [6], [7]])
    prompt = compile_prompt(ICLNode([8, 9], nodes, id="Q"))
    edges = [(row.query, row.node) for row in attribute(model, prompt, TARGET, methods="cut_edges").rows]
    for query, node in edges:
        cut = attribute(model, prompt, TARGET, methods="cut_edges", edges=[(query, node)]).rows[0]
        whole = prompt.continued(TARGET)
        last = whole.graph.nodes[-1]
        queries = [query, last] if query == "Q" else [query]
        with intervene(model, whole, [Suppress(node, 0.0, mode="weight", queries=queries)]) as attention, torch.no_grad():
            chances = model(**attention.inputs).logits[0].double().log_softmax(-1)
        after = [-float(chances[len(prompt) - 1 + i, token]) for i, token in enumerate(TARGET)]
        before = losses_by_hand(model, prompt, prompt.dense_mask())
        close(cut.per_token, [a - b for a, b in zip(after, before, strict=True)])


def test_a_weight_of_nothing_on_a_whole_node_of_one_token_in_attribute_itself():
    """The first token of a causal prompt is left out: it sees nothing but itself, so a knockout would leave it nothing."""
    model = shared_model("llama")
    root = ICLNode([5, 6], id="root")
    one = ICLNode([7], [root], id="one")
    prompt = compile_prompt(ICLNode([8, 9], [root, one], id="Q"))
    found = attribute(model, prompt, TARGET, methods=["suppress_nodes", "cut_nodes"], factor=0.0, mode="weight", nodes="one")
    suppressed, cut = found.rows
    # The node's own output differs, but nobody sees it any more.
    close(suppressed.per_token, cut.per_token)


def test_sums_signs_and_rank():
    found = attribute(shared_model("llama"), diamond(), TARGET, methods=METHODS)
    for row in found.rows:
        assert row.importance == pytest.approx(sum(row.per_token), abs=1e-12)
        assert len(row.per_token) == len(TARGET)
    for method in METHODS:
        values = [row.importance for row in found.rank(method)]
        assert values == sorted(values, reverse=True)
        assert {row.method for row in found.rank(method)} == {method}
    assert sum(len(found.rank(method)) for method in METHODS) == len(found.rows)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_batch_size_does_not_matter(batch_size):
    model, prompt = shared_model("llama"), diamond()
    many = attribute(model, prompt, TARGET, methods=METHODS, neighbours=0.1)
    few = attribute(model, prompt, TARGET, methods=METHODS, neighbours=0.1, batch_size=batch_size)
    for a, b in zip(many.rows, few.rows, strict=True):
        assert (a.method, a.node, a.query, a.token, a.text) == (b.method, b.node, b.query, b.token, b.text)
        close(a.per_token, b.per_token)


def test_neighbours_are_suppressed_by_their_likeness():
    model = make_model("llama")
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[50] = torch.cat([torch.ones(24), torch.zeros(24)])
        table[51] = 2 * table[50]  # cosine 1
        table[52] = torch.cat([torch.ones(18), torch.zeros(24), torch.ones(6)])  # cosine 0.75
        table[53] = torch.cat([torch.zeros(24), torch.ones(24)])  # cosine 0
    a = ICLNode([50, 53, 52], id="a")
    prompt = compile_prompt(ICLNode([51, 53], [a], id="Q"))
    found = attribute(model, prompt, TARGET, methods="suppress_tokens", neighbours=0.6, factor=0.2, mode="weight")
    alone = attribute(model, prompt, TARGET, methods="suppress_tokens", factor=0.2, mode="weight")
    whole = prompt.continued(TARGET)
    factors = {0: 0.2, 2: 0.2 + 0.8 * 0.25, 3: 0.2}
    with intervene(model, whole, [Suppress(list(factors), list(factors.values()), mode="weight")]) as attention:
        chances = model(**attention.inputs).logits[0].detach().double().log_softmax(-1)
    after = [-float(chances[len(prompt) - 1 + i, token]) for i, token in enumerate(TARGET)]
    close(found.rows[0].per_token, [a - b for a, b in zip(after, found.loss, strict=True)])
    assert abs(found.rows[0].importance - alone.rows[0].importance) > 1e-4
    # Of the first document, only the last row's token 53 is like token 1.
    assert found.rows[1].token == 1


def test_a_node_that_nobody_sees_is_worth_nothing():
    a, b = ICLNode([5, 6], id="a"), ICLNode([7, 8], id="b")
    prompt = compile_prompt(ICLNode([9], [a, b], id="Q")).without_node("b")
    found = attribute(shared_model("llama"), prompt, TARGET, methods=["suppress_nodes", "cut_nodes"])
    assert all(abs(row.importance) < 1e-5 for row in found.rows if row.node == "b")
    assert all(abs(row.importance) > 1e-3 for row in found.rows if row.node == "a")


def test_choosing_nodes_and_edges():
    model, prompt = shared_model("llama"), diamond()
    found = attribute(model, prompt, TARGET, nodes=["second", prompt.graph["root"], "second"])
    assert [row.node for row in found.rows if row.method == "cut_nodes"] == ["second", "root"]
    assert {row.node for row in found.rows if row.method == "cut_edges"} == {"second", "root"}
    chosen = attribute(model, prompt, TARGET, methods="cut_edges", edges=[("Q", "other")])
    assert [(row.query, row.node) for row in chosen.rows] == [("Q", "other")]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"methods": "shapley"}, LeattnError, "unknown method 'shapley'; choose one of 'suppress_nodes'"),
        ({"methods": []}, LeattnError, "methods is empty"),
        ({"mode": "soft"}, LeattnError, "unknown mode 'soft'"),
        ({"nodes": ["nobody"]}, GraphError, "nobody"),
        ({"nodes": ["Q"]}, LeattnError, "'Q' is the last node, which the target continues"),
        ({"edges": [("Q", "first")]}, GraphError, "'Q' does not see 'first'"),
        ({"edges": ["Q"]}, LeattnError, "an edge is a pair"),
        ({"layers": [3]}, LeattnError, "attribute names layer 3; this model has layers 0 to 2"),
        ({"factor": -1.0, "mode": "weight"}, LeattnError, "give a factor >= 0"),
        ({"batch_size": 0}, LeattnError, "batch_size is 0"),
        ({"neighbours": 2.0}, LeattnError, "neighbours=2.0 is a least cosine"),
        ({"neighbours": 0.5, "mode": "additive"}, LeattnError, "no shift"),
        ({"backend": "flex"}, BackendError, "use backend='eager' or 'sdpa'"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(options, error, words):
    model = make_model("llama")
    leattn.check_model(model)  # the probe runs the model too
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match=words.replace("(", r"\(")):
        attribute(model, diamond(), TARGET, **options)
    handle.remove()
    assert not calls


def test_bad_targets_and_models():
    model, prompt = shared_model("llama"), diamond()
    with pytest.raises(LeattnError, match=r"0 tokens|no content|empty"):
        attribute(model, prompt, [])
    with pytest.raises(BackendError, match="token id 100, but the model has 100 embeddings"):
        attribute(model, prompt, [100])
    with pytest.raises(LeattnError, match=r"call leattn\.compile_prompt first"):
        attribute(model, prompt.graph, TARGET)
    with pytest.raises(GraphError, match="several sinks"):
        attribute(model, compile_prompt([ICLNode([1]), ICLNode([2])]), TARGET)
    training = make_model("llama").train()
    with pytest.raises(LeattnError, match=r"call model.eval\(\) first"):
        attribute(training, prompt, TARGET)


def test_it_reads_as_text_html_and_a_data_frame(monkeypatch):
    model, tokenizer = leattn.tiny.load()
    example = make("parallel", Random(1), n=3)
    found = attribute(model, example.compile(tokenizer), example.answer, methods=METHODS)
    text = str(found)
    assert repr(example.answer) in text
    assert f"\n{example.source.id}" in text
    assert "sees no more" in text
    assert example.answer.strip() in found._repr_html_()
    assert found.target == example.answer
    with pytest.raises(LeattnError, match="unknown method 'cut_nodes'; choose one of 'cut_edges'"):
        attribute(model, example.compile(tokenizer), example.answer, methods="cut_edges").rank("cut_nodes")

    class Pandas:
        DataFrame = dict

    monkeypatch.setitem(sys.modules, "pandas", Pandas)
    frame = found.to_pandas()
    assert list(frame) == ["method", "node", "query", "token", "text", "importance", "per_token"]
    assert len(frame["node"]) == len(found.rows)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(LeattnError, match="to_pandas needs pandas, which is not installed"):
        found.to_pandas()


@pytest.mark.parametrize("method", ["cut_nodes", "suppress_nodes"])
def test_the_document_that_holds_the_answer_ranks_first(method):
    model, tokenizer = leattn.tiny.load()
    examples = [make("parallel", Random(seed), n=8, plain=seed % 2 == 0) for seed in range(40)]
    right = 0
    for example in examples:
        found = attribute(model, example.compile(tokenizer), example.answer, methods=method)
        right += found.rank(method)[0].node == example.source.id
    assert right >= 38


def test_the_model_is_left_as_it_was():
    model = make_model("llama", "sdpa")
    attribute(model, diamond(), TARGET, methods=METHODS)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_pictures(method, tmp_path):
    from leattn.viz import plot_attribution
    from leattn.viz.style import node_colours

    found = attribute(shared_model("llama"), diamond(), TARGET, methods=METHODS)
    ax = plot_attribution(found, method=method, path=tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    ranked = found.rank(method)
    if method == "cut_edges":
        shown = ax.images[1].get_array()
        names = list(found.prompt.graph.names.values())
        for row in ranked:
            assert shown[names.index(row.query), names.index(row.node)] == row.importance
        assert shown.mask.sum() == 25 - len(ranked)
    else:
        assert [bar.get_width() for bar in ax.patches] == [row.importance for row in ranked]
        names = list(found.prompt.graph.names.values())
        for bar, row in zip(ax.patches, ranked, strict=True):
            assert bar.get_facecolor()[:3] == pytest.approx(node_colours(5)[names.index(row.node)])
    assert "importance" in ax.get_title(loc="left")


def test_pictures_refuse_what_they_cannot_show():
    from leattn.viz import plot_attribution

    found = attribute(shared_model("llama"), diamond(), TARGET, methods="cut_edges", edges=[])
    with pytest.raises(LeattnError, match="has no rows of 'cut_edges'"):
        plot_attribution(found)
    with pytest.raises(LeattnError, match="unknown method 'cut_nodes'"):
        plot_attribution(found, method="cut_nodes")
