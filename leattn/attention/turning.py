"""Whether a model's queries can read in other ways, and how its keys turn with the position: found out by doing it, once."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, TypeAlias

import torch
from torch import Tensor

from leattn.attention.block import Block
from leattn.attention.choose import chosen
from leattn.attention.dense import EAGER
from leattn.attention.follow import follow
from leattn.attention.reading import Turns, scaled_scores
from leattn.attention.request import NEEDS, Backend, LayerAttention, Request
from leattn.attention.sample import in_words, probing, raise_if_not_the_models, sample, sample_tokens
from leattn.attention.verdicts import Failure, verdicts
from leattn.dag.reading import Reading
from leattn.errors import BackendError
from leattn.model.record import Model, variant
from leattn.model.turns import Turn, possible_turns
from leattn.prompt.compiled import columns_of

NATIVE = (
    "its layers do not take their attention from transformers' interface, or calculate with the mask; what they compute scores "
    "with cannot be reached"
)

DISTANCES = (3, 57, 4096)
"""Shifts that are tried, and the furthest that the model was made for."""


def check_readings(model: Any, record: Model, readings: Collection[Reading]) -> None:
    """Refuse a model that cannot read so, and layers and heads that it does not have.

    Raises
    ------
    BackendError
        In words.
    """
    reason = readings_refusal(model, record)
    if reason is None and any(reading.shift for reading in readings):
        reason = shift_refusal(model, record)
    if reason is not None:
        raise BackendError(f"{type(model).__name__} cannot read in other ways than as it does (leattn.read): {reason}")
    config = record.base.config
    for what, count in (("layers", config.num_hidden_layers), ("heads", config.num_attention_heads)):
        highest = max(count) if isinstance(count, list | tuple) else count
        for reading in readings:
            beyond = sorted(index for index in getattr(reading, what) or () if index >= highest)
            if beyond:
                raise BackendError(f"a reading names {what} {beyond}; this model has {what} 0 to {highest - 1}")


def readings_refusal(model: Any, record: Model) -> str | None:
    """Why no node can read in another way in this model, or None."""
    found = _found_out(model, record)
    return found if isinstance(found, str) else None


def shift_refusal(model: Any, record: Model) -> str | None:
    """Why no node can read what stands elsewhere in this model, or None."""
    found = _found_out(model, record)
    return found if isinstance(found, str) else found[0]


def key_turns(model: Any, record: Model) -> Turns:
    """How the keys of every layer turn with the position, as its attention gets them."""
    found = _found_out(model, record)
    assert not isinstance(found, str)
    return found[1]


Finding: TypeAlias = str | tuple[str | None, Turns]
"""Why nothing can be read otherwise; or why nothing at another place, and how keys turn."""


def _found_out(model: Any, record: Model) -> Finding:
    with record.lock:
        which = variant(model)
        if which not in record.readings:
            finding = _remembered(model, record)
            if isinstance(finding, Failure):
                return finding
            record.readings[which] = finding
        found: Finding = record.readings[which]
        return found


def _remembered(model: Any, record: Model) -> Finding:
    """What an earlier process found out, or else what is found out now."""
    kept = verdicts(model, record)
    known = kept["readings"]
    if isinstance(known, str):
        return known
    if known is not None:
        ways = (_ways(record, layer) for layer in range(len(known["turns"])))
        return known["shift"], tuple(turns[i] for turns, i in zip(ways, known["turns"], strict=True))
    try:
        finding = _tried(model, record)
    except BackendError as error:
        finding = str(error)
    except Exception as error:  # whatever a family's code raises is a reason
        raise_if_not_the_models(error)
        return Failure(f"trying it fails with {in_words(error)}")
    if isinstance(finding, str):
        kept["readings"] = finding
    else:
        turned = [_ways(record, layer).index(turn) for layer, turn in enumerate(finding[1])]
        kept["readings"] = {"shift": finding[0], "turns": turned}
    return finding


def _ways(record: Model, layer: int) -> list[Turn | None]:
    """The ways in which the keys of a layer may turn, not at all among them."""
    return [None, *possible_turns(record, layer)]


def _tried(model: Any, record: Model) -> Finding:
    columns = columns_of([sample(sample_tokens(record.facts))], record.device)
    with probing(model, record):
        block = chosen(model, record, columns, "auto")  # any backend at all
    if block.native:
        return NATIVE
    cold = _watched(model, record, 0)
    allowed = max(512 * torch.finfo(torch.float32).eps, 8 * torch.finfo(record.dtype).eps)
    if not cold.off <= allowed:
        return (
            f"its attention is not a softmax of scaled scores (off by {cold.off:.1e}, and {allowed:.1e} is rounding), so what "
            "a group weighs is not known"
        )
    return _turns(record, cold.keys, lambda start: _watched(model, record, start).keys, allowed)


def _turns(record: Model, cold: dict[int, Tensor], keys_at: Any, allowed: float) -> tuple[str | None, Turns]:
    facts = record.facts
    if facts.rope_limit is not None:
        return "its rotary angles depend on the length of the input (dynamic NTK, longrope)", ()
    limits = [limit for limit in (facts.position_limit, facts.trained_length) if limit is not None]
    last = min(limits, default=2 * DISTANCES[-1]) - len(sample(sample_tokens(facts)))
    starts = sorted(start for start in {*DISTANCES, last} if 0 < start <= last)
    if not starts:
        return f"{min(limits)} positions are too few to try it", ()
    moved = [keys_at(start) for start in starts]
    turns: list[Turn | None] = []
    for layer, keys in sorted(cold.items()):
        ways = _ways(record, layer)
        errors = [[_off(way, keys, there[layer], start) for there, start in zip(moved, starts, strict=True)] for way in ways]
        best = min(range(len(ways)), key=lambda i: sum(errors[i]))
        for start, off in zip(starts, errors[best], strict=True):
            if off > allowed + 2 * start * torch.finfo(torch.float32).eps:
                return f"no rotation of its family gives the keys of layer {layer} {start} positions further on", ()
        turns.append(ways[best])
    if len(turns) != record.base.config.num_hidden_layers:
        return "not all of its layers have keys of their own", ()
    return None, tuple(turns)


class _Watched:
    """An attention that keeps every layer's keys, and how far its output is from a softmax of scaled scores."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.off = 0.0

    def attention(self, request: Request) -> LayerAttention:
        inner = EAGER.attention(request)

        def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            output, weights = inner(module, query, key, value, **kwargs)
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            scores = scaled_scores(query, key, scaling, kwargs.get("softcap")).float() + inner.mask.float()  # type: ignore[attr-defined]
            if getattr(module, "sinks", None) is not None:
                scores = torch.cat([scores, module.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
            shares = scores.softmax(-1)[..., : key.shape[2]]
            each = value.float().repeat_interleave(query.shape[1] // value.shape[1], 1)
            expected = (shares @ each).transpose(1, 2)
            self.off = max(self.off, float((output.float() - expected).abs().max() / expected.abs().max()))
            self.keys[module.layer_idx] = key[0].detach()
            return output, weights

        return watched


def _watched(model: Any, record: Model, start: int) -> _Watched:
    """One forward of the sample graph, its root at a position."""
    watched = _Watched()
    columns = columns_of([sample(sample_tokens(record.facts), start=start)], record.device)
    backend = Backend("watched", watched.attention, carries=tuple(NEEDS))
    with probing(model, record), follow(Block(record, model, columns, [backend])) as block:
        model(**block.inputs, use_cache=False)
    if not watched.keys:
        raise BackendError("its attention does not go through transformers' attention interface")
    return watched


def _off(turn: Turn | None, keys: Tensor, expected: Tensor, start: int) -> float:
    """How far turned keys ``[G, n, D]`` are from those that stand ``start`` further on; infinite where it does not even fit."""
    try:
        old, new = (torch.full((keys.shape[1],), at, device=keys.device) for at in (0, start))
        moved = keys if turn is None else turn.apply(keys[None], turn.between(old, new))[0]
    except Exception:  # a function of some family, called in a way that it may not be made for
        return math.inf
    return _difference(moved.float(), expected.float()) if moved.shape == expected.shape else math.inf


def _difference(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected, at the median token of ``[.., n, D]``."""
    off, size = (each.movedim(-2, 0).flatten(1).norm(dim=1) for each in (found - expected, expected))
    relative = float((off / size.clamp_min(1e-30)).median())
    return relative if math.isfinite(relative) else math.inf
