"""A model's own forward with its attention done by hand: row by row, group by group, from the words of METHODS.md.

Only what the model hands to its attention is the model's: queries, keys and values. Who sees whom, what is read how, where keys
stand, how they turn and how the row is put together are written down here again.
"""

from __future__ import annotations

import math
import sys

import torch
from oracles import positions, relation, tokens_of


def turned(keys, shift, theta):
    """Keys ``[n, D]`` that stand ``shift`` positions further on: pairs (i, i + D/2) turned by shift · theta^(−2i/D)."""
    half = keys.shape[-1] // 2
    angles = torch.as_tensor(shift, dtype=torch.float64)[..., None] * theta ** (
        -2 * torch.arange(half).double() / keys.shape[1]
    )
    first, second = keys[:, :half].double(), keys[:, half:].double()
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], 1)


def theta_of(config, kind):
    return config.rope_parameters.get(kind, config.rope_parameters)["rope_theta"]


def row_of(q, k, v, seen, groups, scaling, theta, layer, head, softcap=None, sink=None):
    """One query's output ``[D]``, and its weights by key ``[K]``. ``seen``: key indices; ``groups``: (indices, reading)."""

    def met(keys):
        plain = keys.double() @ q.double() * scaling
        return plain if softcap is None else softcap * torch.tanh(plain / softcap)

    logs = torch.full([len(k)], -math.inf, dtype=torch.float64)  # of keys that are not seen
    left = set(seen)
    for members, how in groups:
        holds = (how.layers is None or layer in how.layers) and (how.heads is None or head in how.heads)
        members = [j for j in members if j in left]
        if not holds or not members:
            continue
        left -= set(members)
        scores = met(turned(k[members], how.shift, theta)) / how.temperature
        total = scores.exp().sum().log()
        # exp(σ·τ·L + b) for the group, shared out as its own softmax says
        logs[members] = how.scale * how.temperature * total + how.log_weight + scores - total
    left = sorted(left)
    logs[left] = met(k[left])
    weights = logs.exp()
    shares = weights / (weights.sum() + (0 if sink is None else math.exp(sink)))
    return shares @ v.double(), shares


def logits(model, nodes, *, visibility="parents", where=None, weights=None, turns=False):
    """Logits ``[S, V]`` of nodes that hold token ids, in their order. ``weights`` receives ``{(layer, head): [S, S]}``.

    With ``turns`` the model's own rotary embedding turns nothing: queries and keys are turned here, to positions ``where``.
    """
    sees = relation(nodes, visibility)
    tokens, at = tokens_of(nodes), where or positions(nodes, sees)
    config = model.config
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers

    layers = []

    def attention(module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
        layer = module.layer_idx
        layers.append(layer)
        window = config.sliding_window if types[layer] == "sliding_attention" else None
        theta = theta_of(config, types[layer])
        heads, groups = query.shape[1], key.shape[1]
        if turns:
            query, key = (torch.stack([turned(x, at, theta) for x in states[0]])[None] for states in (query, key))
        output = torch.zeros(1, len(tokens), heads, value.shape[-1])
        for i, (node, place) in enumerate(tokens):
            shift_of = {other: group.reading.shift for group in node.readings for other in group.nodes}
            seen = []
            for j, (other, there) in enumerate(tokens):
                if (there <= place) if other is node else other in sees[node]:
                    further = shift_of.get(other, 0)
                    if window is None or at[i] - (at[j] + further) < window:
                        seen.append(j)
            named = [
                ([j for j, (other, _) in enumerate(tokens) if other in group.nodes], group.reading) for group in node.readings
            ]
            for head in range(heads):
                k, v = key[0, head // (heads // groups)], value[0, head // (heads // groups)]
                row = row_of(query[0, head, i], k, v, seen, named, scaling, theta, layer, head, softcap)
                output[0, i, head], shares = row
                if weights is not None:
                    weights.setdefault((layer, head), torch.zeros(len(tokens), len(tokens)))[i] = shares
        return output, None

    library = sys.modules[type(model).__module__]
    own, ids = library.eager_attention_forward, torch.tensor([[node.content[i] for node, i in tokens]])
    library.eager_attention_forward = attention
    try:
        with torch.no_grad():
            found = model(input_ids=ids, position_ids=torch.tensor([[0] * len(at) if turns else at]), use_cache=False).logits[0]
        assert layers == list(range(config.num_hidden_layers)), "load the model with attn_implementation='eager'"
        return found
    finally:
        library.eager_attention_forward = own


def greedy(model, nodes, count):
    """What the last node goes on with: it reads on as it did, one token at a time, without any cache."""
    from leattn import ICLNode
    from leattn.dag.node import regrouped

    *before, sink = nodes
    written = []
    for _ in range(count):
        grown = ICLNode([*sink.content, *written], regrouped(sink), "grown")
        written.append(int(logits(model, [*before, grown])[-1].argmax()))
    return written
