"""Scores before the softmax and norms of means, as the published plotter of attention sinks shows them: by hand.

It draws, per layer, the mean over the heads of QKᵀ/√d plus the causal mask, and the norms of the mean key and the mean value
over the key/value heads.
"""

from __future__ import annotations

import math

import pytest
import torch
from llama_by_hand import run
from models import make_model, shared_model
from test_attend import fan

import leattn
from leattn import ICLNode, LeattnError, compile_prompt
from leattn.analysis import trace
from leattn.interventions import Suppress
from leattn.viz import PLOTS, plot_norms, plot_scores, save_report


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def scores_by_hand(model, prompt):
    """``[L, H, S, S]``; −inf where masked."""
    size, config = len(prompt), model.config
    found = torch.full((config.num_hidden_layers, config.num_attention_heads, size, size), -torch.inf)

    def keep(layer, head, query, row, visible):
        found[layer, head, query] = row.masked_fill(~visible, -torch.inf)
        return row

    run(model, prompt, scores=keep)
    return found


def test_the_scores_of_a_layer():
    model, prompt = shared_model("llama"), fan()
    seen, expected = trace(model, prompt, scores=True), scores_by_hand(model, prompt)
    torch.testing.assert_close(seen.scores, expected, rtol=1e-4, atol=1e-4)
    one = trace(model, prompt, layers=1, scores=True)
    assert one.scores.shape == (1, 4, 17, 17)
    torch.testing.assert_close(one.scores[0], expected[1], rtol=1e-4, atol=1e-4)
    assert trace(model, prompt).scores is None
    weights = leattn.forward(model, prompt, backend="eager", output_attentions=True).attentions
    torch.testing.assert_close(seen.scores.softmax(-1), torch.cat(weights), rtol=1e-4, atol=1e-4)


def test_the_scores_of_pairs_of_nodes():
    model, prompt = shared_model("llama"), fan()
    seen = trace(model, prompt, tokens=[("Q", "doc1"), ("doc1", "doc1")], scores=True)
    expected = scores_by_hand(model, prompt)
    for (query, key), kept in seen.tokens.items():
        part = expected[:, :, slice(*prompt[query].span), slice(*prompt[key].span)]
        torch.testing.assert_close(kept.scores, part, rtol=1e-4, atol=1e-4)
        assert kept.scores.shape == kept.weights.shape
    assert seen.scores is None
    assert trace(model, prompt, tokens=("Q", "doc1")).tokens["Q", "doc1"].scores is None


@pytest.mark.parametrize("tile_bytes", [1, 700])
def test_tiles_make_no_difference(tile_bytes):
    model, prompt = shared_model("mistral"), fan()
    whole, tiled = (trace(model, prompt, scores=True, **more).scores for more in ({}, {"tile_bytes": tile_bytes}))
    assert torch.equal(whole.isfinite(), tiled.isfinite())
    torch.testing.assert_close(whole, tiled)


def test_operations_and_soft_caps_show_in_the_scores():
    model, prompt = shared_model("llama"), fan()
    plain, added = (
        trace(model, prompt, layers=0, scores=True, operations=some, backend="eager").scores
        for some in ([], [Suppress("doc1", -3.0, mode="additive")])
    )
    moved = torch.zeros(17)
    moved[slice(*prompt["doc1"].span)] = -3.0
    finite = plain.isfinite()
    torch.testing.assert_close(added[finite], (plain + moved)[finite], rtol=1e-4, atol=1e-4)
    gemma, cap = shared_model("gemma2"), shared_model("gemma2").config.attn_logit_softcapping
    capped = trace(gemma, prompt, scores=True).scores
    assert capped[capped.isfinite()].abs().max() <= cap


def test_long_sides_are_pooled_to_the_largest_score():
    model = make_model("llama", max_position_embeddings=1024)
    prompt = compile_prompt(ICLNode((torch.arange(600) % 90 + 2).tolist()))
    pooled = trace(model, prompt, layers=0, scores=True).scores
    assert pooled.shape == (1, 4, 300, 300)
    expected = scores_of_one_layer(model, prompt)
    cells = torch.nn.functional.max_pool2d(expected.clamp(min=-1e9), 2)
    torch.testing.assert_close(pooled[0].clamp(min=-1e9), cells, rtol=1e-3, atol=1e-3)


def scores_of_one_layer(model, prompt):
    """Of the first, in one product, for a plain causal text."""
    attention, x = model.model.layers[0].self_attn, model.model.embed_tokens(prompt.input_ids)
    x = model.model.layers[0].input_layernorm(x)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    shape = (1, len(prompt), -1, attention.head_dim)
    q, k = (projection(x).view(shape).transpose(1, 2) for projection in (attention.q_proj, attention.k_proj))
    q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(x, position_ids=prompt.position_ids))
    scores = (q @ repeat_kv(k, 2).transpose(2, 3))[0] / math.sqrt(attention.head_dim)
    return scores.masked_fill(~torch.ones(len(prompt), len(prompt)).tril().bool(), -torch.inf)


def test_norms_of_the_mean_over_the_heads():
    model, prompt = shared_model("llama"), compile_prompt(ICLNode([5, 17, 40, 8, 61]))
    seen = trace(model, prompt)
    cache = model(prompt.input_ids, use_cache=True).past_key_values
    for number, layer in enumerate(cache.layers):
        for norms, by_head, states in (
            (seen.mean_key_norms, seen.key_norms, layer.keys[0]),
            (seen.mean_value_norms, seen.value_norms, layer.values[0]),
        ):
            torch.testing.assert_close(norms[number], states.mean(0).norm(dim=-1), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(by_head[number], states.norm(dim=-1), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(norms[number], by_head[number].mean(0), atol=1e-2), "no mean of norms"


def test_the_picture_of_scores(tmp_path):
    """Theirs draws a masked pair as the lowest number that the dtype has, which leaves the colours nothing for the others."""
    model, prompt = shared_model("llama"), fan()
    seen = trace(model, prompt, scores=True)
    ax = plot_scores(seen, layer=1, path=tmp_path / "scores.png")
    shown = ax.images[0].get_array()
    expected = scores_by_hand(model, prompt)[1].mean(0)
    assert (shown.mask == ~prompt.dense_mask().numpy()).all()
    assert abs(shown.filled(0) - expected.masked_fill(expected.isinf(), 0).numpy()).max() < 1e-4
    assert ax.images[0].get_clim() == pytest.approx((float(expected[expected.isfinite()].min()), float(expected.max())))
    pairs = trace(model, prompt, tokens=("Q", "doc1"), scores=True)
    assert plot_scores(pairs, layer=0).get_xlabel() == "key token of doc1"
    for kind, words in (
        ("mean_keys", "the mean key over the heads after RoPE"),
        ("mean_values", "the mean value over the heads"),
    ):
        assert plot_norms(seen, kind=kind, layer=2).get_title(loc="left").startswith(f"norm of {words} of layer 2")
        assert plot_norms(seen, kind=kind).get_title(loc="left").startswith(f"norm of {words} of each layer")
    plots = {**PLOTS, "layer_{layer}_attention.png": plot_scores}
    assert save_report(seen, tmp_path, layers=[0], plots=plots)[0].stat().st_size > 1000


def test_traces_without_scores_have_no_picture_of_them():
    model, prompt = shared_model("llama"), fan()
    with pytest.raises(LeattnError, match="this trace has no scores; call trace"):
        plot_scores(trace(model, prompt))
    with pytest.raises(LeattnError, match="kept weights and no scores"):
        plot_scores(trace(model, prompt, tokens=("Q", "doc1")))
    with pytest.raises(LeattnError, match="did not keep the pair"):
        plot_scores(trace(model, prompt, tokens=("Q", "doc1"), scores=True), ("Q", "doc0"))
