"""``attribute`` against AtMan's published explainer, written from its meaning in plain loops over a Llama run by hand.

Its rules: one forward per token of prompt and target but the target's last; the token's scores as a key are (S − min S) · f
with the minimum over all keys, its neighbours' by f + (1 − f)(1 − c) where their input embeddings have a cosine c of at least
κ with its own; the value for a target token is loss(untouched) − loss(suppressed), squared on request, or the same of its
logit, and is listed for the tokens that come before it.
"""

from __future__ import annotations

import pytest
import torch
from llama_by_hand import run
from models import make_model

from leattn import ICLNode, LeattnError, compile_prompt
from leattn.analysis import attribute
from leattn.viz import plot_attribution

PROMPT = [1, 50, 53, 52, 8, 51, 30]
TARGET = [17, 51, 60, 5]
FACTOR, THRESHOLD = 0.1, 0.6
PUBLISHED = {"methods": "suppress_tokens", "shift": "all", "neighbours": THRESHOLD, "target_tokens": True}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    made = make_model("llama")
    table = made.get_input_embeddings().weight
    with torch.no_grad():
        table[51] = 0.9 * table[50] + 0.1 * table[51]
        table[52] = 0.6 * table[50] + 0.4 * table[52]
        table[60] = 0.5 * table[17] + 0.5 * table[60]
    return made


@pytest.fixture(scope="module")
def prompt():
    """Plain text, as theirs is, in two nodes."""
    first = ICLNode(PROMPT[:4], id="first")
    return compile_prompt(ICLNode(PROMPT[4:], [first], id="last"))


def explainer(model, *, logit=False, squared=False, neighbours=True):
    """Their explanation: for each target token {index of a token before it: value}."""
    ids = [*PROMPT, *TARGET[:-1]]
    whole = compile_prompt(ICLNode(ids))
    embeddings = model.get_input_embeddings().weight[ids]

    def rows(factors):
        def scores(layer, head, query, row, visible):
            matrix = torch.ones(len(row))
            for index, factor in factors.items():
                matrix[index] = factor
            return (row - row.min()) * matrix

        logits = run(model, whole, scores=scores if factors else None)[len(PROMPT) - 1 :]
        if logit:
            return [row[token] for row, token in zip(logits, TARGET, strict=True)]
        return [torch.nn.functional.cross_entropy(row, torch.tensor(token)) for row, token in zip(logits, TARGET, strict=True)]

    untouched = rows({})
    explanation = [{} for _ in TARGET]
    for index in range(len(ids)):
        factors = {}
        for other, embedding in enumerate(embeddings) if neighbours else ():
            cosine = float(embeddings[index] @ embedding / (embeddings[index].norm() * embedding.norm()))
            if cosine >= THRESHOLD and other != index:
                factors[other] = (1 - FACTOR) * (1 - cosine) + FACTOR
        for i, value in enumerate(rows({**factors, index: FACTOR})):
            if index < len(PROMPT) + i:
                delta = float(untouched[i] - value)
                explanation[i][index] = delta**2 if squared else delta
    return explanation


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("measure", ["loss", "logit"])
def test_it_equals_the_published_explainer(model, prompt, measure, squared):
    found = attribute(model, prompt, TARGET, measure=measure, squared=squared, **PUBLISHED)
    expected = explainer(model, logit=measure == "logit", squared=squared)
    assert [row.token for row in found.rows] == list(range(len(PROMPT) + len(TARGET) - 1))
    sign = -1 if measure == "loss" and not squared else 1  # theirs is what the loss falls by
    for row in found.rows:
        wanted = [sign * one.get(row.token, 0.0) for one in expected]
        assert row.per_token == pytest.approx(wanted, abs=1e-4)
        assert row.importance == pytest.approx(sum(wanted), abs=4e-4)
    assert [row.node for row in found.rows] == ["first"] * 4 + ["last"] * 3 + ["target"] * 3
    assert max(abs(row.importance) for row in found.rows[-3:]) > 1e-2
    unit = {"loss": "nats", "logit": "logits"}[measure] + "²" * squared
    assert f"importance in {unit} for" in str(found)
    assert "shift over all keys" in str(found)
    assert plot_attribution(found).get_xlabel().startswith(unit)


def test_each_switch_changes_the_numbers(model, prompt):
    reference = [row.importance for row in attribute(model, prompt, TARGET, **PUBLISHED).rows]
    alone = attribute(model, prompt, TARGET, **{**PUBLISHED, "neighbours": None}).rows
    expected = explainer(model, neighbours=False)
    for row in alone:
        assert row.per_token == pytest.approx([-one.get(row.token, 0.0) for one in expected], abs=1e-4)
    for switch in ({"shift": "visible"}, {"neighbours": None}):
        changed = [row.importance for row in attribute(model, prompt, TARGET, **{**PUBLISHED, **switch}).rows]
        assert max(abs(a - b) for a, b in zip(reference, changed, strict=True)) > 1e-3
    without = attribute(model, prompt, TARGET, nodes=["first", "last"], **{**PUBLISHED, "target_tokens": False}).rows
    assert len(without) == len(PROMPT)
    near_a_target = PROMPT.index(50)  # whose neighbour 51 the target holds too
    assert abs(without[near_a_target].importance - reference[near_a_target]) > 1e-3


def test_some_tokens_of_the_prompt_and_all_of_the_target(model, prompt):
    """As their prompt_explain_indices, which leave the target's tokens in."""
    everything = attribute(model, prompt, TARGET, **PUBLISHED).rows
    some = attribute(model, prompt, TARGET, nodes="last", **PUBLISHED).rows
    assert [row.token for row in some] == [4, 5, 6, 7, 8, 9]
    assert [row.importance for row in some] == pytest.approx([row.importance for row in everything[4:]], abs=1e-5)


def test_a_target_of_one_token_has_none_before_it(model, prompt):
    rows = attribute(model, prompt, [17], **PUBLISHED).rows
    assert [row.token for row in rows] == list(range(len(PROMPT)))


def test_a_node_that_is_called_target_keeps_its_name(model):
    prompt = compile_prompt(ICLNode(PROMPT, id="target"))
    rows = attribute(model, prompt, TARGET, **PUBLISHED).rows
    assert [row.node for row in rows] == ["target"] * len(PROMPT) + ["ids 17 51"] * 3


def test_cuts_do_not_depend_on_how_the_target_is_fed(model, prompt):
    one, two = (attribute(model, prompt, TARGET, methods=["cut_nodes", "cut_edges"], target_tokens=on).rows for on in (0, 1))
    for a, b in zip(one, two, strict=True):
        assert (a.method, a.node, a.query) == (b.method, b.node, b.query)
        assert a.per_token == pytest.approx(b.per_token, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shift": "none"}, "unknown shift 'none'; choose one of 'visible', 'all'"),
        ({"measure": "rank"}, "unknown measure 'rank'; choose one of 'loss', 'logit'"),
        ({"nodes": "last", "methods": ["suppress_tokens", "cut_nodes"]}, "methods='suppress_tokens' alone takes its tokens"),
    ],
)
def test_bad_switches(model, prompt, options, words):
    with pytest.raises(LeattnError, match=words):
        attribute(model, prompt, TARGET, **options)
