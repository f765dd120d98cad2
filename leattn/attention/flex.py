"""Transformers' own flex_attention, with a ``BlockMask`` straight from stretches; and readings by the same kernel.

On a CPU, torch 2.13 fails to compile flex for many padded or odd shapes; ``torch.compiler.set_stance("force_eager")`` around
the call runs it uncompiled, slowly. There is no backward on a CPU.

Shapes: B rows, H query heads, G key heads, Q queries, K keys, D head size, n groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from leattn.attention.blocks import GroupMod, Groups, Label, Part, block_mask
from leattn.attention.reading import active, moved_query, numbers
from leattn.attention.request import NEEDS, Backend, Request, UnderMask
from leattn.dag.reading import Reading
from leattn.errors import BackendError
from leattn.model.record import Model
from leattn.model.registry import check_keywords, flex_attention


@dataclass(frozen=True)
class ReadUnderBlocks(UnderMask):
    """The same where nodes read groups in other ways.

    A score function sees one score, not the sum over a group. Where σ·τ = 1 that is enough: the group weighs Σ exp(s/τ + b).
    Other groups are computed apart, each under a mask of its own, and log-sum-exps say how to put them together.
    """

    request: Request
    kept: dict[Any, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def groups(self) -> Groups:
        """What the queries read, in every layer."""
        return Groups(self.request)

    def __call__(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        readings = active(self.request.columns.readings, module)
        labels = tuple(label for label in self.groups.numbers if label[0] in readings)
        if not labels:
            return super().__call__(module, query, key, value, **kwargs)
        return self._read(labels, module, query, key, value, **kwargs), None

    def _read(
        self,
        labels: Sequence[Label],
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Query ``[B, H, Q, D]`` over key and value ``[B, G, K, D]`` → ``[B, Q, H, D]``; ``s_aux`` ``[H]`` are sinks."""
        check_keywords(kwargs, (), "a reading under flex_attention")
        if dropout:
            raise BackendError(NEEDS["dropout"].format("flex"))
        heads, number_of = query.shape[1], self.groups.numbers
        if heads & (heads - 1):  # as transformers has it: the kernel's grouped heads come in powers of two
            key, value = (each.repeat_interleave(heads // each.shape[1], 1) for each in (key, value))
        tau, sigma, weight = self._once(("numbers", labels), lambda: _table(labels, number_of, heads, query.device))
        apart = frozenset(label for label in labels if not _is_of_scores(label[0]))
        group_of = self.groups.group_mod(self.request.queries.start) if len(apart) < len(labels) else _first
        mask = self._once(apart, lambda: block_mask(self.request, Part(self.groups, apart, rest=True)) if apart else self.mask)
        call = partial(flex_attention, module, scaling, with_lse=bool(apart) or s_aux is not None)
        whole, log = call(query, key, value, mask, _score_mod(softcap, tau, weight, group_of))
        logs, parts = [log], []
        for label in self.groups.spans:
            if label not in apart:
                continue
            span, at = self.groups.spans[label], number_of[label]
            first = self.request.queries.start
            queries = slice(span.start - first, span.stop - first)
            mask = self._once(label, partial(self._mask_of, label))
            asking = moved_query(query[:, :, queries], label[0], self.request.turns, module)
            read = _score_mod(softcap, tau[at : at + 1], torch.zeros_like(weight[:1]), _first)
            output, log_of = call(asking, key, value, mask, read)
            parts.append((queries, output))
            logs.append(torch.full_like(log, -torch.inf))
            logs[-1][:, :, queries] = (sigma * tau)[at, :, None] * log_of + weight[at, :, None]
        if len(logs) > 1 or s_aux is not None:
            whole = _merged(whole, parts, logs, s_aux)
        return whole.to(query.dtype).transpose(1, 2).contiguous()

    def _mask_of(self, label: Label) -> BlockMask:
        """For the queries that read a group, the blocks of it; a window is measured to where it is read."""
        request = self.request
        window = None if request.window is None else request.window + label[0].shift
        own = replace(request, queries=self.groups.spans[label], window=window)  # type: ignore[arg-type]
        return block_mask(own, Part(self.groups, frozenset({label})))

    def _once(self, name: Any, make: Any) -> Any:
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]


def _is_of_scores(reading: Reading) -> bool:
    """Whether a group's weight, exp(σ·τ·L + b), is a sum over its scores one by one."""
    return not reading.shift and math.isclose(reading.scale * reading.temperature, 1.0, rel_tol=1e-12)


def _table(labels: Sequence[Label], number_of: dict[Label, int], heads: int, device: torch.device) -> tuple[Tensor, ...]:
    """τ, σ and b of every group and head, ``[n + 1, H]`` each; those of no group of these are 1, 1 and 0."""
    table = torch.tensor([1.0, 1.0, 0.0], device=device).view(3, 1, 1).repeat(1, len(number_of) + 1, heads)
    for label in labels:
        for rows, given in zip(table, numbers(label[0], heads, device), strict=True):
            rows[number_of[label]] = given.flatten() if isinstance(given, Tensor) else given
    return tuple(table)


def _first(b: Tensor, *_: Tensor) -> Tensor:
    """Number 0, whatever is asked."""
    return b * 0


def _score_mod(softcap: float | None, tau: Tensor, weight: Tensor, group_of: GroupMod) -> Any:
    def read(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        group = group_of(b, q_idx, kv_idx)
        return score / tau[group, h] + weight[group, h]

    return read


def _merged(whole: Tensor, parts: Sequence[tuple[slice, Tensor]], logs: Sequence[Tensor], sinks: Tensor | None) -> Tensor:
    """``whole`` and parts of its queries, by their log-weights ``[B, H, Q]``; a sink takes weight, and has no value."""
    if sinks is not None:
        logs = [*logs, sinks.to(logs[0]).view(1, -1, 1).expand_as(logs[0])]
    shares = torch.stack(list(logs)).softmax(0).nan_to_num(0.0)[..., None]  # a query to which nothing is left has none
    total = whole * shares[0]
    for share, (queries, output) in zip(shares[1:], parts, strict=False):
        total[:, :, queries] += output * share[:, :, queries]
    return total


def _flex(request: Request) -> UnderMask:
    mask = block_mask(request)
    return ReadUnderBlocks("flex_attention", mask, request) if request.columns.readings else UnderMask("flex_attention", mask)


def _refusal(record: Model) -> str | None:
    if record.facts.learned_sinks and record.device.type == "cpu":
        return "transformers has no attention sinks for flex_attention on a CPU; use backend='eager'"
    if not record.facts.supports_flex:
        return f"transformers does not run {record.facts.family} through flex_attention; use backend='eager'"
    return None


FLEX = Backend("flex", _flex, _refusal, "flex_attention", ("mask", "padding", "readings"))
