"""A Llama run by hand over its own modules, in plain loops, with the operations of INTERVENTIONS.md written from its text."""

from __future__ import annotations

import math

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def run(model, prompt, *, states=None, scores=None, skipped=(), hidden_states=None):
    """Logits ``[S, V]``.

    ``states(layer, h)`` may return other inputs ``[S, d]`` of a layer. ``scores(layer, head, q, row, visible)`` may return
    another row of scaled scores ``[S]`` of query q, given which keys it sees. ``skipped``: layers whose attention adds nothing.
    ``hidden_states``, if a list, receives the (edited) input of every layer.
    """
    mask = prompt.dense_mask()
    size = len(prompt)
    h = model.model.embed_tokens(prompt.input_ids)[0]
    cos, sin = model.model.rotary_emb(h[None], position_ids=prompt.position_ids)
    for number, layer in enumerate(model.model.layers):
        if states is not None:
            h = states(number, h)
        if hidden_states is not None:
            hidden_states.append(h)
        attention = layer.self_attn
        x = layer.input_layernorm(h)
        heads, groups, width = model.config.num_attention_heads, model.config.num_key_value_heads, attention.head_dim
        q = attention.q_proj(x).view(size, heads, width).transpose(0, 1)
        k = attention.k_proj(x).view(size, groups, width).transpose(0, 1)
        v = attention.v_proj(x).view(size, groups, width).transpose(0, 1)
        q, k = (part[0] for part in apply_rotary_pos_emb(q[None], k[None], cos, sin))
        if number not in skipped:
            out = torch.zeros(heads, size, width)
            for head in range(heads):
                group = head // (heads // groups)
                for token in range(size):
                    row = k[group] @ q[head, token] / math.sqrt(width)
                    if scores is not None:
                        row = scores(number, head, token, row, mask[token])
                    weights = torch.softmax(row.masked_fill(~mask[token], -torch.inf), 0)
                    out[head, token] = weights @ v[group]
            h = h + attention.o_proj(out.transpose(0, 1).reshape(size, heads * width))
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    return model.lm_head(model.model.norm(h))
