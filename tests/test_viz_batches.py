"""Pictures are of one prompt: a batch is refused, and what the error advises gives what the prompt alone has."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from models import shared_model

import leattn
from leattn import ICLNode, LeattnError, compile_prompt
from leattn.viz import fold_attention, plot_attention, plot_norms, plot_sinks, plot_tokens, save_report


def prompt_of(tokens, question):
    return compile_prompt(ICLNode(question, [ICLNode(tokens, id="doc")], id="Q"))


PROMPTS = [prompt_of([9, 8, 7, 3, 4, 11, 12], [5, 6]), prompt_of([9, 8, 7], [5, 6]), prompt_of([4, 2, 7, 5, 3], [1, 5, 6, 8])]


def eager(prompts):
    with torch.no_grad():
        return leattn.forward(shared_model("llama"), prompts, backend="eager", output_attentions=True).attentions


@pytest.fixture(scope="module")
def both():
    return eager(PROMPTS)


@pytest.fixture(scope="module")
def alone():
    return [eager(prompt) for prompt in PROMPTS]


def advised(error, weights, i):
    """What the slice in an error makes of weights, for row i."""
    found = re.search(r"weights(\[[^]]*\])", str(error.value))
    return eval(f"weights{found[1]}", {"weights": weights, "i": i})


def by_plain_loops(layers, prompt):
    """Mean over layers and heads of what each node gives to each, from ``[1, H, S, S]`` of the prompt alone."""
    mean = torch.stack(list(layers)).mean((0, 1, 2))
    spans = list(prompt.spans.values())
    return torch.stack([torch.stack([mean[slice(*q), slice(*k)].sum(1).mean() for k in spans]) for q in spans])


def of_tokens(layers, prompt):
    return torch.stack(list(layers)).mean((0, 1, 2))[slice(*prompt["Q"].span), slice(*prompt["doc"].span)]


def folded(weights, prompt):
    given = fold_attention(weights, prompt)
    return given.reshape(-1, *given.shape[-2:]).mean(0)


DRAWS = {
    "fold_attention": (folded, by_plain_loops),
    "plot_attention": (lambda w, prompt: plot_attention(w, prompt).images[0].get_array().filled(0), by_plain_loops),
    "plot_tokens": (lambda w, prompt: plot_tokens(w, ("Q", "doc"), prompt).images[0].get_array().filled(0), of_tokens),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("i", range(len(PROMPTS)))
def test_a_batch_is_refused_and_the_advice_is_right(name, i, both, alone):
    draw, expected = DRAWS[name]
    prompt = PROMPTS[i]
    stacked = torch.stack(alone[i])
    for layers in (stacked, stacked[:, 0]):
        with pytest.raises(LeattnError, match=r"more than one prompt's .* list\(weights\)"):
            draw(layers, prompt)
        np.testing.assert_allclose(draw(list(layers), prompt), expected(alone[i], prompt), atol=1e-5)
    for several in (torch.stack(both), both[0][:0], [alone[i][0], both[1]], both[1], both, list(both)):
        with pytest.raises(LeattnError, match="more than one prompt's") as error:
            draw(several, prompt)
    rows = [advised(error, layer, i) for layer in both]
    np.testing.assert_allclose(draw(rows, prompt), expected(alone[i], prompt), atol=1e-5)
    np.testing.assert_allclose(draw(rows[1], prompt), expected(alone[i][1:2], prompt), atol=1e-5)


@pytest.mark.parametrize("name", DRAWS)
def test_a_row_of_a_batch_is_cut_where_its_padding_is(name, both, alone):
    draw, expected = DRAWS[name]
    with pytest.raises(LeattnError, match="9 queries and 9 keys, but the prompt 5 tokens; slice") as error:
        draw(both[1][1], PROMPTS[1])
    shown = draw(advised(error, both[1][1], 1), PROMPTS[1])
    np.testing.assert_allclose(shown, expected(alone[1][1:2], PROMPTS[1]), atol=1e-5)


@pytest.mark.parametrize("draw", [plot_attention, plot_norms, plot_sinks, plot_tokens, lambda given: save_report(given, "out")])
def test_what_draws_a_trace_refuses_anything_else_in_words(draw, both, alone):
    several = [leattn.analysis.trace(shared_model("llama"), prompt) for prompt in PROMPTS[:2]]
    wrong = [np.zeros((2, 3, 4, 4)), *((both, both[0], several) if draw not in (plot_attention, plot_tokens) else ())]
    for given in wrong:
        with pytest.raises(LeattnError, match=r"draws a leattn.analysis.Trace, which is of one prompt, not \w+; give it"):
            draw(given)


def test_tokens_take_what_attention_takes(alone):
    prompt, layers = PROMPTS[0], alone[0]
    for weights in (layers[1], layers[1][0], layers[1][0].mean(0)):
        shown = plot_tokens(weights, ("Q", "doc"), prompt).images[0].get_array().filled(0)
        np.testing.assert_allclose(shown, of_tokens(layers[1:2], prompt), atol=1e-5)
    for weights, options, words in (
        ((), {}, "the sequence is empty"),
        (layers[0], {"layer": 0}, "these weights are one layer's"),
        (layers[0][0, 0], {"head": 0}, "they have no heads"),
        ((None,), {}, "layer 0: the attention weights are None"),
    ):
        with pytest.raises(LeattnError, match=words):
            plot_tokens(weights, ("Q", "doc"), prompt, **options)
