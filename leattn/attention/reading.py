"""Groups that a query reads in another way than as they are: what becomes of its scores, and of parts computed apart.

Shapes: B rows, H query heads, G key heads, Q queries, C columns of a group, P parts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from leattn.dag.node import as_position
from leattn.dag.reading import Reading
from leattn.errors import BackendError
from leattn.model.turns import Turn, positions_from
from leattn.prompt.columns import Columns
from leattn.prompt.stretch import Stretch

PerHead: TypeAlias = float | Tensor
"""One number for all heads, or ``[H, 1, 1]``."""
Turns: TypeAlias = Sequence[Turn | None]
"""For every layer, how its keys turn with the position; None where position is not in them."""


def active(readings: Collection[Reading], module: Any) -> frozenset[Reading]:
    """Those that hold in the layer of an attention module."""
    layer = getattr(module, "layer_idx", None)
    if layer is None and any(reading.layers is not None for reading in readings):
        raise BackendError(f"{type(module).__name__} does not know its layer; leave layers= of readings out")
    return frozenset(reading for reading in readings if reading.layers is None or layer in reading.layers)


def holding(stretch: Stretch, readings: Collection[Reading]) -> Stretch:
    """A stretch with no other readings than these."""
    if all(reading in readings for _, reading in stretch.readings):
        return stretch
    kept = tuple((runs, reading) for runs, reading in stretch.readings if reading in readings)
    return Stretch(stretch.start, stretch.stop, stretch.seen, kept)


def numbers(reading: Reading, heads: int, device: torch.device) -> tuple[PerHead, PerHead, PerHead]:
    """τ, σ and b of every head."""
    given = (reading.temperature, reading.scale, reading.log_weight)
    if reading.heads is None:
        return given
    holds = _of_heads(reading, heads, device)
    plain = torch.tensor([1.0, 1.0, 0.0], device=device).view(3, 1, 1, 1)
    changed = torch.tensor(given, device=device).view(3, 1, 1, 1)
    temperature, scale, weight = torch.where(holds, changed, plain)
    return temperature, scale, weight


def _of_heads(reading: Reading, heads: int, device: torch.device) -> Tensor:
    assert reading.heads is not None
    holds = torch.zeros(heads, 1, 1, dtype=torch.bool, device=device)
    holds[sorted(reading.heads)] = True
    return holds


def read_scores(scores: Tensor, visible: Tensor | None, reading: Reading) -> Tensor:
    """Scores ``[…, H, Q, C]`` of a group as its reader takes them; −inf where it does not see (``visible`` broadcasts).

    With s / τ in place of s, and L the log-sum-exp of that over the group, every score gets (σ·τ − 1)·L + b: a softmax over the
    whole row then gives the group the weight exp(σ·τ·L + b), shared out as its own softmax does.
    """
    temperature, scale, weight = numbers(reading, scores.shape[-3], scores.device)
    sharp = scores / temperature
    if visible is not None:
        sharp = sharp.masked_fill(~visible, -torch.inf)
    total = sharp.logsumexp(-1, keepdim=True)
    if visible is not None:
        total = total.masked_fill(total == -torch.inf, 0.0)  # nobody is there to weigh
    return sharp + ((scale * temperature - 1) * total + weight)


def read_parts(lse: Tensor, reading: Reading) -> Tensor:
    """Log-weights of the parts of one group, from log-sum-exps ``[P, B, Q, H]`` that were taken of s / τ."""
    temperature, scale, weight = numbers(reading, lse.shape[-1], lse.device)
    if isinstance(temperature, Tensor):
        temperature, scale, weight = (value.flatten() for value in (temperature, scale, weight))  # type: ignore[union-attr]
    return lse + ((scale * temperature - 1) * lse.logsumexp(0) + weight)


def scaled_scores(query: Tensor, key: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """Of query ``[B, H, Q, D]`` and key ``[B, G, K, D]``, soft-capped where the model does so, ``[B, H, Q, K]``."""
    rows, heads, length, size = query.shape
    groups, keys = key.shape[1], key.shape[2]
    folded = query.reshape(rows, groups, heads // groups * length, size)
    scores = (folded @ key.transpose(2, 3)).reshape(rows, heads, length, keys) * scaling
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def moved_query(query: Tensor, reading: Reading, turns: Turns, module: Any) -> Tensor:
    """Query ``[B, H, Q, D]`` as it meets keys that it reads ``reading.shift`` positions further on."""
    turn = turns[module.layer_idx] if reading.shift else None
    if turn is None:
        return query
    # A rotation of the keys by δ is one of the query by −δ, wherever the two stand.
    shift = as_position(reading.shift) or 0
    steps = torch.zeros(query.shape[2], dtype=torch.long, device=query.device)
    old, new = positions_from(max(shift, 0), steps), positions_from(max(-shift, 0), steps)
    with torch.autocast(query.device.type, enabled=False):
        moved = turn.apply(query, turn.between(old, new))
    return moved if reading.heads is None else torch.where(_of_heads(reading, query.shape[1], query.device), moved, query)


def in_window(columns: Columns, p: int, queries: range, keys: Any, window: int, shift: float) -> Tensor:
    """Which of some keys of prompt ``p`` are in a window, ``[Q, C]``, where they are read ``shift`` positions further on."""
    at = torch.from_numpy(columns.rows[p].positions(range(queries.stop)))
    return (at[queries.start : queries.stop, None] - (at[keys] + shift) < window).to(columns.device)
