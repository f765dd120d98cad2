"""Whether a model's keys and values may be used again, here and at other positions: found out by doing it, once per model."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leattn.attention.attend import prepare
from leattn.attention.follow import follow
from leattn.attention.sample import in_words, probing, raise_if_not_the_models, sample, sample_tokens
from leattn.attention.verdicts import Failure, verdicts
from leattn.errors import BackendError, LeattnWarning
from leattn.kv.entry import NodeKV, node_kv
from leattn.model.cache import full_length_cache
from leattn.model.record import Model, variant
from leattn.model.turns import Turn, positions_from, possible_turns
from leattn.prompt.compiled import CompiledPrompt

Turns = tuple[tuple[Turn | None, Turn | None], ...]
"""For every layer, how its keys and its values turn; None where position is not in them."""

_FP32 = torch.finfo(torch.float32)
_OFFSETS = (3, 57, 4096, 32768)
"""And the last one that the model was made for: low frequencies, and whatever begins past some length, show there alone."""


@dataclass(frozen=True)
class Certificate:
    """What holds for a model's keys and values.

    Attributes
    ----------
    reuse
        Why a node's keys and values cannot be used again where the same sub-graph stands at the same positions, or None. On a
        small graph of random tokens, every node's keys and values, computed with its ancestors alone, must equal those of the
        whole graph, and what a node computes from them must equal the cold run, up to the rounding that another order of
        siblings brings.
    shift
        Why they cannot be used at other positions, or None. The whole graph is computed at other offsets, near and far; turned
        keys must equal the recomputed ones in all layers.
    turns
        How every layer's keys and values turn with the position, as measured.
    """

    reuse: str | None
    shift: str | None
    turns: Turns = ()


def certificate(model: Any) -> Certificate:
    """The certificate of a model, made once."""
    record = Model.of(model)
    with record.lock:
        which = variant(model)
        if which not in record.certificates:
            with probing(model, record), warnings.catch_warnings():
                warnings.simplefilter("ignore", LeattnWarning)
                record.certificates[which] = _remembered(model, record)
        made: Certificate = record.certificates[which]
        return made


def _remembered(model: Any, record: Model) -> Certificate:
    """What an earlier process found out, or else what is found out now."""
    kept = verdicts(model, record)
    found = kept["certificate"]
    if found is not None:
        turns = zip(_possible(record, len(found["turns"])), found["turns"], strict=True)
        return Certificate(found["reuse"], found["shift"], tuple((ways[keys], ways[values]) for ways, (keys, values) in turns))
    made = _tried(model, record)
    if isinstance(made.reuse, Failure):
        return made
    turned = zip(_possible(record, len(made.turns)), made.turns, strict=True)
    which = [[ways.index(keys), ways.index(values)] for ways, (keys, values) in turned]
    kept["certificate"] = {"reuse": made.reuse, "shift": made.shift, "turns": which}
    return made


def _possible(record: Model, layers: int) -> list[list[Turn | None]]:
    """The ways in which each layer may turn its keys, not at all among them."""
    return [[None, *possible_turns(record, layer)] for layer in range(layers)]


def _tried(model: Any, record: Model) -> Certificate:
    try:
        return _certify(model, record)
    except Exception as error:  # whatever a family's code raises is a reason
        if not isinstance(error, BackendError):
            raise_if_not_the_models(error)
        reason = str(error) if isinstance(error, BackendError) else Failure(f"trying it fails with {in_words(error)}")
        return Certificate(reason, reason)


def _certify(model: Any, record: Model) -> Certificate:
    tokens = sample_tokens(record.facts)
    if record.facts.cached_beside is not None:
        prepare(model, record, sample(tokens))  # a model that follows no graph at all says so first
        return Certificate(record.facts.cached_beside, record.facts.cached_beside)
    cold, logits = _run(model, record, sample(tokens))
    swapped, _ = _run(model, record, sample(tokens, swap=True))
    alone: dict[str, NodeKV] = {}
    for name in ("tail", "other", "left", "right"):  # each in a graph that is smaller than the whole one
        alone.update(_run(model, record, sample(tokens, only=name))[0])
    # What rounding does: another order of the same nodes changes nothing else.
    noise = max(_largest_difference(swapped[name], kv) for name, kv in cold.items())
    allowed = min(max(64 * _FP32.eps, 8 * torch.finfo(cold["root"].keys[0].dtype).eps) + 4 * noise, 0.2)
    worst = max(_largest_difference(kv, cold[name]) for name, kv in alone.items())
    if worst > allowed:
        reason = (
            f"keys and values of a node computed with its ancestors alone differ from those of the whole graph by {worst:.1e} "
            f"({allowed:.1e} is rounding)"
        )
        return Certificate(reason, reason)
    resumed = _difference(_resume(model, record, sample(tokens), alone), logits[slice(*sample(tokens)["child"].span)])
    if resumed > allowed:
        reason = (
            f"what it computes from stored keys and values differs from a cold run by {resumed:.1e} ({allowed:.1e} is rounding)"
        )
        return Certificate(reason, reason)
    return _certify_shift(model, record, tokens, cold, allowed)


def _certify_shift(
    model: Any, record: Model, tokens: dict[str, list[int]], cold: dict[str, NodeKV], allowed: float
) -> Certificate:
    facts = record.facts
    if facts.rope_limit is not None:
        return Certificate(None, "its rotary angles depend on the length of the input (dynamic NTK, longrope)")
    limits = [limit for limit in (facts.position_limit, facts.trained_length) if limit is not None]
    last = min(limits, default=2 * _OFFSETS[-1]) - 1 - int(sample(tokens).position_ids.max())
    starts = sorted(start for start in {*_OFFSETS, last} if 0 < start <= last)
    if not starts:
        return Certificate(None, f"{min(limits)} positions are too few to try it")
    moved = [_run(model, record, sample(tokens, start=start))[0] for start in starts]
    turns = []
    for layer, candidates in enumerate(_possible(record, len(cold["root"].keys))):
        best = []
        for part in ("keys", "values"):
            ways = [(_errors(turn, part, layer, cold, moved), turn) for turn in candidates]
            errors, turn = min(ways, key=lambda way: sum(way[0]))
            best.append(turn)
            for start, off in zip(starts, errors, strict=True):
                # Moved far, rounding does what it does near by, except that angles, products of position and frequency, are
                # less exact there.
                far = 2.5 * errors[0] + _FP32.eps * (64 + 2 * start)
                limit = allowed if start == starts[0] else far
                if off > limit:
                    why = "no rotation of its family gives what is recomputed"
                    if candidates == [None]:
                        why = "it has no rotary embedding, and its keys change with the position"
                    if facts.position_limit is not None and candidates == [None]:
                        why = "its positions are learned" if facts.positions_learned else "its positions are in a fixed table"
                    return Certificate(
                        None,
                        f"{why}: moved by {start} positions, the {part} of layer {layer} are off by {off:.1e} in "
                        f"{str(cold['root'].keys[0].dtype).removeprefix('torch.')} ({limit:.1e} is rounding)",
                    )
        turns.append((best[0], best[1]))
    return Certificate(None, None, tuple(turns))


def _errors(turn: Turn | None, part: str, layer: int, cold: dict[str, NodeKV], moved: list[dict[str, NodeKV]]) -> list[float]:
    """How far this way to turn is off at the worst node, for each offset; infinite where it does not even fit."""
    return [_moved_difference(turn, part, layer, cold, nodes) for nodes in moved]


def _moved_difference(turn: Turn | None, part: str, layer: int, cold: dict[str, NodeKV], moved: dict[str, NodeKV]) -> float:
    pairs = [(kv, moved[name]) for name, kv in cold.items()]
    stored, expected = ([getattr(kv, part)[layer] for kv in kvs] for kvs in zip(*pairs, strict=True))
    if turn is not None:
        old, new = (
            torch.cat([positions_from(kv.start, torch.arange(kv.keys[layer].shape[1], device=stored[0].device)) for kv in kvs])
            for kvs in zip(*pairs, strict=True)
        )
        try:
            turned = turn.apply(torch.cat(stored, 1)[None], turn.between(old, new))[0]
        # The functions of some family, called in ways it may not be made for: whatever they raise, this is not the way.
        except Exception:
            return math.inf
        if turned.shape != torch.cat(expected, 1).shape:
            return math.inf
        stored = list(torch.split(turned, [tensor.shape[1] for tensor in expected], 1))
    return max(_difference(*pair) for pair in zip(stored, expected, strict=True))


def _run(model: Any, record: Model, prompt: CompiledPrompt) -> tuple[dict[str, NodeKV], Tensor]:
    """The nodes of a cold run, by name, and the logits of all tokens, ``[S, V]``."""
    cache = full_length_cache(None)
    with follow(prepare(model, record, prompt)) as attention:
        output = model(**attention.inputs, use_cache=True, past_key_values=cache)
    starts = prompt.position_ids[0].tolist()
    spans = {prompt.graph.name(node): span for node, span in prompt.spans.items()}
    return {name: node_kv(cache, slice(*span), starts[span[0]]) for name, span in spans.items()}, _logits(output)


def _resume(model: Any, record: Model, prompt: CompiledPrompt, stored: dict[str, NodeKV]) -> Tensor:
    """The logits of ``child``, computed from a cache that is put together from stored nodes, ``[n, V]``."""
    first, last = prompt["child"].span
    before = [stored[prompt.graph.name(node)] for node, span in prompt.spans.items() if span[1] <= first]
    cache = full_length_cache(None)
    for layer in range(len(before[0].keys)):
        keys, values = (torch.cat([getattr(kv, part)[layer] for kv in before], 1)[None] for part in ("keys", "values"))
        cache.update(keys, values, layer)
    with follow(prepare(model, record, prompt)) as attention:
        output = model(input_ids=attention.inputs["input_ids"][:, first:last], use_cache=True, past_key_values=cache)
    return _logits(output)


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return logits[0]


def _largest_difference(found: NodeKV, expected: NodeKV) -> float:
    """The largest relative difference among all layers' keys and values."""
    pairs = zip((*found.keys, *found.values), (*expected.keys, *expected.values), strict=True)
    return max(_difference(a, b) for a, b in pairs)


def _difference(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected, at the median token of ``[.., n, D]``.

    A wrong rotation, or one neighbour too many, gives about 1 at every token. At a single one, rounding can do that too: it
    makes a router choose another expert.
    """
    by_token = [tensor.float().movedim(-2, 0).flatten(1).norm(dim=1) for tensor in (found - expected, expected)]
    relative = (by_token[0] / by_token[1].clamp_min(1e-30)).median().item()
    return relative if math.isfinite(relative) else math.inf
