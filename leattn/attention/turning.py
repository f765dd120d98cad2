"""Whether a model's queries can read in other ways, and how its keys turn with the position: found out by doing it, once."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

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
from leattn.dag.node import Position
from leattn.dag.reading import Reading
from leattn.errors import BackendError
from leattn.model.record import Model, variant
from leattn.model.turns import Turn, positions_from, possible_turns
from leattn.prompt.columns import columns_of

NATIVE = (
    "its layers do not take their attention from transformers' interface, or calculate with the mask; what they compute scores "
    "with cannot be reached"
)

DISTANCES = (3, 57, 4096)
"""Shifts that are tried, and the furthest that the model was made for."""
BETWEEN = ((0.375, 8), (1.3125, 16))
"""Distances that are not whole, and how often one of them makes a whole one."""


def check_readings(model: Any, record: Model, readings: Collection[Reading]) -> None:
    """Refuse a model that cannot read so, and layers and heads that it does not have.

    Raises
    ------
    BackendError
        In words.
    """
    reason = readings_refusal(model, record)
    shifts = [reading.shift for reading in readings if reading.shift]
    if reason is None and shifts:
        reason = shift_refusal(model, record)
    if reason is None and any(shift % 1 for shift in shifts):
        reason = real_refusal(model, record)
    if reason is not None:
        raise BackendError(f"{type(model).__name__} cannot read in other ways than as it does (leattn.read): {reason}")
    config = record.base.config
    for what, count in (("layers", config.num_hidden_layers), ("heads", config.num_attention_heads)):
        highest = max(count) if isinstance(count, list | tuple) else count
        for reading in readings:
            beyond = sorted(index for index in getattr(reading, what) or () if index >= highest)
            if beyond:
                raise BackendError(f"a reading names {what} {beyond}; this model has {what} 0 to {highest - 1}")


def check_real_positions(model: Any, record: Model) -> None:
    """Refuse positions that are no whole numbers where the model has none between two of those.

    Raises
    ------
    BackendError
        In words.
    """
    raise_if_not_real(record.facts.family, real_refusal(model, record))


def raise_if_not_real(family: str, reason: str | None) -> None:
    """Refuse positions between two whole numbers, if there is a reason."""
    if reason is not None:
        raise BackendError(
            f"{family} cannot take positions that are not whole numbers: {reason}; round them, or use positions='after_parents'"
        )


def readings_refusal(model: Any, record: Model) -> str | None:
    """Why no node can read in another way in this model, or None."""
    return _found_out(model, record).readings


def shift_refusal(model: Any, record: Model) -> str | None:
    """Why no node can read what stands elsewhere in this model, or None."""
    found = _found_out(model, record)
    return found.readings or found.shift


def real_refusal(model: Any, record: Model) -> str | None:
    """Why nothing can stand between two whole numbers in this model, or None."""
    if record.facts.position_limit is not None:
        return "its positions are in a table, which has none between two whole numbers"
    return _found_out(model, record).real


def key_turns(model: Any, record: Model) -> Turns:
    """How the keys of every layer turn with the position, as its attention gets them."""
    return _found_out(model, record).turns


@dataclass(frozen=True)
class Finding:
    """Why nothing can be read otherwise, nothing at another place, nothing stand between whole numbers; and how keys turn."""

    readings: str | None
    shift: str | None
    real: str | None
    turns: Turns = ()

    @classmethod
    def all_for(cls, reason: str) -> Finding:
        """One reason for everything."""
        return cls(reason, reason, reason)


def _found_out(model: Any, record: Model) -> Finding:
    with record.lock:
        which = variant(model)
        if which not in record.readings:
            finding = _remembered(model, record)
            if isinstance(finding, Failure):
                return Finding.all_for(finding)
            record.readings[which] = finding
        found: Finding = record.readings[which]
        return found


def _remembered(model: Any, record: Model) -> Finding | Failure:
    """What an earlier process found out, or else what is found out now."""
    kept = verdicts(model, record)
    known = kept["readings"]
    if known is not None:
        ways = (_ways(record, layer) for layer in range(len(known["turns"])))
        turns = tuple(each[i] for each, i in zip(ways, known["turns"], strict=True))
        return Finding(known["readings"], known["shift"], known["real"], turns)
    try:
        finding = _tried(model, record)
    except BackendError as error:
        finding = Finding.all_for(str(error))
    except Exception as error:  # whatever a family's code raises is a reason
        raise_if_not_the_models(error)
        return Failure(f"trying it fails with {in_words(error)}")
    turned = [_ways(record, layer).index(turn) for layer, turn in enumerate(finding.turns)]
    kept["readings"] = {"readings": finding.readings, "shift": finding.shift, "real": finding.real, "turns": turned}
    return finding


def _ways(record: Model, layer: int) -> list[Turn | None]:
    """The ways in which the keys of a layer may turn, not at all among them."""
    return [None, *possible_turns(record, layer)]


def _tried(model: Any, record: Model) -> Finding:
    columns = columns_of([sample(sample_tokens(record.facts))], record.device)
    with probing(model, record):
        block = chosen(model, record, columns, "auto")  # any backend at all
    if block.native:
        return Finding.all_for(NATIVE)
    cold = _watched(model, record, 0)
    allowed = max(512 * torch.finfo(torch.float32).eps, 8 * torch.finfo(record.dtype).eps)
    real = _real(model, record, cold.keys, allowed)
    if not cold.off <= allowed:
        reason = (
            f"its attention is not a softmax of scaled scores (off by {cold.off:.1e}, and {allowed:.1e} is rounding), so what "
            "a group weighs is not known"
        )
        return Finding(reason, reason, real)
    shift, turns = _turns(record, cold.keys, lambda start: _watched(model, record, start).keys, allowed)
    return Finding(None, shift, real, turns)


def _real(model: Any, record: Model, cold: dict[int, Tensor], allowed: float) -> str | None:
    """Why nothing can stand between two whole numbers: keys there must be turned as far as the position says."""
    for start, times in BETWEEN:
        try:
            there, whole = (_watched(model, record, at).keys for at in (start, int(start * times)))
        except Exception as error:  # whatever a family's code raises is a reason
            raise_if_not_the_models(error)
            return f"trying it fails with {in_words(error)}"
        for layer, keys in sorted(cold.items()):
            ways = [way for way in _ways(record, layer) if _off(way, keys, there[layer], start) <= allowed]
            # A rotation that cuts positions off would find its own keys right.
            if not any(_off(way, keys, whole[layer], start, times) <= times * allowed for way in ways):
                return f"no rotation of its family gives the keys of layer {layer} {start} positions further on"
    return None


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


def _watched(model: Any, record: Model, start: Position) -> _Watched:
    """One forward of the sample graph, its root at a position."""
    watched = _Watched()
    columns = columns_of([sample(sample_tokens(record.facts), start=start)], record.device)
    backend = Backend("watched", watched.attention, carries=tuple(NEEDS))
    with probing(model, record), follow(Block(record, model, columns, [backend])) as block:
        model(**block.inputs, use_cache=False)
    if not watched.keys:
        raise BackendError("its attention does not go through transformers' attention interface")
    return watched


def _off(turn: Turn | None, keys: Tensor, expected: Tensor, start: Position, times: int = 1) -> float:
    """How far keys ``[G, n, D]`` turned several times are from those that stand there; infinite where it does not even fit."""
    try:
        steps = torch.zeros(keys.shape[1], dtype=torch.long, device=keys.device)
        old, new = positions_from(0, steps), positions_from(start, steps)
        moved = keys[None]
        for _ in range(0 if turn is None else times):
            moved = turn.apply(moved, turn.between(old, new))  # type: ignore[union-attr]
    except Exception:  # a function of some family, called in a way that it may not be made for
        return math.inf
    return _difference(moved[0].float(), expected.float()) if moved[0].shape == expected.shape else math.inf


def _difference(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected, at the median token of ``[.., n, D]``."""
    off, size = (each.movedim(-2, 0).flatten(1).norm(dim=1) for each in (found - expected, expected))
    relative = float((off / size.clamp_min(1e-30)).median())
    return relative if math.isfinite(relative) else math.inf
