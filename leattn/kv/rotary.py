"""Stored keys at other positions: turned on a copy, with the family's own rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leattn.dag.node import Position
from leattn.errors import BackendError
from leattn.kv.certify import certificate
from leattn.kv.entry import NodeKV
from leattn.model.turns import Angles, Turn, positions_from


def shifted(model: Any, kv: NodeKV, start: Position) -> NodeKV:
    """The keys and values of the same node where it, and all that it sees, stand ``start - kv.start`` positions further on.

    Computed in fp32 and rounded once. At its own position the same object comes back; otherwise what needs no turning (values,
    layers without rotary embedding) is shared with ``kv``.

    Raises
    ------
    BackendError
        The certificate of the model says why this model's keys cannot be moved.

    Examples
    --------
    >>> import leattn
    >>> from transformers import DynamicCache
    >>> from leattn.kv.entry import node_kv
    >>> from leattn.kv.rotary import shifted
    >>> model, _ = leattn.tiny.load()
    >>> def keys_at(start):
    ...     cache = DynamicCache()
    ...     prompt = leattn.compile_prompt(leattn.ICLNode([5, 6, 7], start_pos_id=start))
    ...     _ = leattn.forward(model, prompt, past_key_values=cache, use_cache=True)
    ...     return node_kv(cache, slice(0, 3), start)
    >>> moved = shifted(model, keys_at(0), 9)
    >>> all(torch.allclose(a, b, atol=1e-4) for a, b in zip(moved.keys, keys_at(9).keys))
    True
    """
    if start == kv.start:
        return kv
    certified = certificate(model)
    if certified.shift is not None:
        raise BackendError(f"keys of {type(model).__name__} cannot be moved to other positions: {certified.shift}")
    turns = certified.turns
    angles: dict[Any, Angles] = {}
    steps = torch.arange(len(kv), device=kv.keys[0].device)
    old, new = positions_from(kv.start, steps), positions_from(start, steps)

    def moved(tensors: tuple[Tensor, ...], how: Sequence[Turn | None]) -> tuple[Tensor, ...]:
        result = list(tensors)
        # Layers that turn alike go in one call.
        groups: dict[tuple[Turn, torch.Size], list[int]] = {}
        for layer, turn in enumerate(how):
            if turn is not None:
                groups.setdefault((turn, tensors[layer].shape), []).append(layer)
        for (turn, _), layers in groups.items():
            if turn.angles not in angles:
                angles[turn.angles] = turn.between(old, new)
            together = turn.apply(torch.stack([tensors[layer] for layer in layers]), angles[turn.angles])
            for layer, tensor in zip(layers, together, strict=True):
                result[layer] = tensor
        return tuple(result)

    with torch.no_grad(), torch.autocast(steps.device.type, enabled=False):
        return NodeKV(moved(kv.keys, [keys for keys, _ in turns]), moved(kv.values, [values for _, values in turns]), start)
