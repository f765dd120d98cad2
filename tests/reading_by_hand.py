"""A model's own forward with its attention done by hand: row by row, group by group, from the words of METHODS.md.

Only what the model hands to its attention is the model's: queries, keys and values. Who sees whom, what is read how, where keys
stand, how they turn and how the row is put together are written down here again.
"""

from __future__ import annotations

import math
import sys

import torch
from oracles import positions, relation, tokens_of


def turned(key, shift, theta):
    """A key ``[D]`` that stands ``shift`` positions further on: pairs (i, i + D/2) turned by shift · theta^(−2i/D)."""
    half = len(key) // 2
    angles = shift * theta ** (-torch.arange(half, dtype=torch.float64) * 2 / len(key))
    first, second = key[:half].double(), key[half:].double()
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])


def theta_of(config, kind):
    return config.rope_parameters.get(kind, config.rope_parameters)["rope_theta"]


def row_of(q, k, v, seen, groups, scaling, theta, layer, head, softcap=None, sink=None):
    """One query's output, and its weights by key. ``seen``: key indices; ``groups``: (indices by reading, reading)."""

    def met(key):
        plain = float(q.double() @ key.double()) * scaling
        return plain if softcap is None else softcap * math.tanh(plain / softcap)

    logs = {}
    left = set(seen)
    for members, how in groups:
        holds = (how.layers is None or layer in how.layers) and (how.heads is None or head in how.heads)
        members = [j for j in members if j in left]
        if not holds or not members:
            continue
        left -= set(members)
        scores = [met(turned(k[j], how.shift, theta)) / how.temperature for j in members]
        total = math.log(sum(math.exp(score) for score in scores))
        for j, score in zip(members, scores, strict=True):
            # exp(σ·τ·L + b) for the group, shared out as its own softmax says
            logs[j] = how.scale * how.temperature * total + how.log_weight + score - total
    for j in left:
        logs[j] = met(k[j])
    weights = {j: math.exp(log) for j, log in logs.items()}
    whole = sum(weights.values()) + (0 if sink is None else math.exp(sink))
    return sum(weights[j] / whole * v[j].double() for j in weights), {j: weight / whole for j, weight in weights.items()}


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
            query, key = (
                torch.stack([torch.stack([turned(x[i], at[i], theta) for i in range(len(at))]) for x in states[0]])[None]
                for states in (query, key)
            )
        output = torch.zeros(1, len(tokens), heads, value.shape[-1])
        for head in range(heads):
            k, v = key[0, head // (heads // groups)], value[0, head // (heads // groups)]
            for i, (node, place) in enumerate(tokens):
                shift_of = {other: group.reading.shift for group in node.readings for other in group.nodes}
                seen = []
                for j, (other, there) in enumerate(tokens):
                    if (there <= place) if other is node else other in sees[node]:
                        further = shift_of.get(other, 0)
                        if window is None or at[i] - (at[j] + further) < window:
                            seen.append(j)
                named = [
                    ([j for j, (other, _) in enumerate(tokens) if other in group.nodes], group.reading)
                    for group in node.readings
                ]
                row = row_of(query[0, head, i], k, v, seen, named, scaling, theta, layer, head, softcap)
                output[0, i, head], shares = row
                if weights is not None:
                    row = weights.setdefault((layer, head), torch.zeros(len(tokens), len(tokens)))[i]
                    for j, share in shares.items():
                        row[j] = share
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
