"""Ensembles as the published scripts write them, each phrasing a prompt of its own, one full forward per token.

Their "avg" is the mean of **logits**, "max" the largest probability of each token over the phrasings, "weighted_avg" the mean
of logits with weights that are divided by their sum, "weighted_max" the logits of the phrasing with the largest weight.
"""

from __future__ import annotations

import pytest
import torch
from models import shared_model

from leattn import CompiledPrompt, ICLNode, LeattnError, compile_prompt
from leattn.patterns import paraphrase_ensemble

CONTEXT = [5, 17, 3, 40, 22, 9]
ASKS = [[41, 7, 66], [12, 80, 33, 4], [55, 21, 90, 8, 2]]
WEIGHTS = [0.5, 3.0, 1.5]
STEPS = 5


def phrasings() -> list[ICLNode]:
    context = ICLNode(CONTEXT, id="context")
    return [ICLNode(ask, [context], f"Q{i}") for i, ask in enumerate(ASKS)]


def published(model, method, weights=None):
    """The tokens they choose, and by how much the best leads in each step."""
    written, leads = [], []
    for _ in range(STEPS):
        with torch.no_grad():
            rows = [model(torch.tensor([CONTEXT + ask + written]), use_cache=False).logits[0, -1].double() for ask in ASKS]
        if method == "avg":
            scores = sum(rows) / len(rows)
        elif method == "max":
            scores = torch.stack([row.softmax(-1) for row in rows]).max(0).values.log()
        elif method == "weighted_avg":
            scores = sum(weight / sum(weights) * row for weight, row in zip(weights, rows, strict=True))
        else:
            scores = rows[weights.index(max(weights))]
        best = scores.topk(2)
        written.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
    return written, leads


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("avg", {"mean": "geometric"}),
        ("max", {"mean": "max"}),
        ("weighted_avg", {"mean": "geometric", "weights": WEIGHTS}),
        ("weighted_max", {"mean": "max", "weights": WEIGHTS}),
    ],
)
def test_the_published_ensembles(family, method, options):
    model = shared_model(family)
    expected, leads = published(model, method, options.get("weights"))
    assert min(leads) > 1e-3
    found = paraphrase_ensemble(model, phrasings(), max_new_tokens=STEPS, **options)
    assert found.token_ids.tolist() == expected
    assert found.probabilities.sum(-1).max() <= 1 + 1e-5


def first(options, given=None):
    found = paraphrase_ensemble(shared_model("llama"), phrasings() if given is None else given, max_new_tokens=1, **options)
    return found, dict(zip(found.candidates[0].tolist(), found.probabilities[0].tolist(), strict=True))


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_weighted_means_by_hand(mean):
    found, best = first({"mean": mean, "weights": WEIGHTS})
    shares = torch.tensor(WEIGHTS) / sum(WEIGHTS)
    together = (shares[:, None] * found.first_step).sum(0)
    if mean == "geometric":
        together = (found.first_step ** shares[:, None]).prod(0)
        together = together / together.sum()
    for token, probability in best.items():
        assert probability == pytest.approx(float(together[token]), abs=1e-5)
    assert set(best) == set(together.topk(len(best)).indices.tolist())


def test_weights_belong_to_phrasings_and_not_to_the_layout():
    nodes = phrasings()
    _, expected = first({"weights": WEIGHTS}, nodes)
    turned = paraphrase_ensemble(shared_model("llama"), nodes[::-1], max_new_tokens=1, weights=WEIGHTS[::-1])
    named = {"Q2": WEIGHTS[2], nodes[0]: WEIGHTS[0], "Q1": WEIGHTS[1]}
    prompt = compile_prompt(nodes)
    assert isinstance(prompt, CompiledPrompt)
    for found in (
        turned,
        paraphrase_ensemble(shared_model("llama"), iter(nodes), max_new_tokens=1, weights=WEIGHTS),
        paraphrase_ensemble(shared_model("llama"), prompt, max_new_tokens=1, weights=named),
        paraphrase_ensemble(shared_model("llama"), prompt.graph, max_new_tokens=1, weights=WEIGHTS),
    ):
        assert dict(zip(found.candidates[0].tolist(), found.probabilities[0].tolist(), strict=True)) == pytest.approx(expected)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric", "max"])
def test_a_phrasing_that_alone_counts_decides_alone(mean):
    nodes = phrasings()
    _, weighted = first({"mean": mean, "weights": [0, 2, 0]}, nodes)
    _, alone = first({}, [nodes[1]])
    assert weighted == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0, 2.0], "there are 2 weights for 3 phrasings; give one for each"),
        ([1.0, -2.0, 1.0], "give numbers from 0 up, of which one is larger"),
        ([0, 0, 0], "give numbers from 0 up"),
        ([1.0, float("nan"), 1.0], "give numbers from 0 up"),
        ({"Q0": 1.0}, "'Q1', 'Q2' is no sink, or has none"),
        ({"Q0": 1.0, "Q1": 1.0, "Q2": 1.0, "context": 1.0}, "'context' is no sink, or has none"),
    ],
)
def test_weights_that_do_not_fit(weights, words):
    with pytest.raises(LeattnError) as error:
        paraphrase_ensemble(shared_model("llama"), phrasings(), weights=weights)
    assert words in str(error.value)
