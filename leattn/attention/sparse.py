"""Our own backend: only what the graph allows is computed, nothing is compiled, and nothing of size S × S is made.

The plan travels through the model as its mask argument. A group of equal stretches is one batched call on its own keys and one
unmasked call on what it sees, merged by log-sum-exp; a prompt in which everyone sees everything is one causal call. What is
generated sees the same columns of the prompt at every step, so these are gathered once per layer and kept. On CUDA, all groups
go into a few calls (backends/varlen.py) where torch has the kernel.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch

from leattn.attention import varlen
from leattn.attention.batch import Batch, MaskRequest
from leattn.attention.kernels import Kernel
from leattn.attention.kinds import ModelFacts
from leattn.attention.plan import Mixed, Step, Stretch, plan_groups
from leattn.attention.windows import windowed_steps
from leattn.errors import BackendError

TEMPORARY = 4 << 20
"""Bytes of output that one batched call may make: page faults on large fresh tensors cost more than the calls."""

LONG = 1024
"""Keys seen whole from which on a stretch by itself computes them apart from its own, without any mask."""

Pair = tuple[torch.Tensor, torch.Tensor]


class NoPlan(BackendError):
    """A layer's attention was called with something else than our plan."""


class Planned:
    """A step with its indices and masks, which all layers share.

    ``own`` is where the columns begin that a continuation adds to the prompt's scattered ones; None for any other step.
    """

    def __init__(self, step: Step, prompt_columns: int, device: torch.device) -> None:
        self.step = step
        self.is_apart = False
        self.own: int | None = None
        self.mask: torch.Tensor | None = None
        if isinstance(step, Mixed):
            keys, self.mask = step.keys, torch.from_numpy(step.mask).to(device)
        else:
            self.is_apart = step.count > 1 or step.window > 0 or (step.length > 1 and step.seen_keys > LONG)
            runs = step.seen if self.is_apart else (*step.seen, (step.start, step.stop))
            keys = np.concatenate([np.arange(start, stop) for start, stop in runs] or [np.arange(0)])
            scattered = keys[keys < prompt_columns]
            if step.start >= prompt_columns and len(scattered) and scattered[-1] - scattered[0] >= len(scattered):
                self.is_apart, self.own, keys = False, prompt_columns, scattered
        first, last = (int(keys[0]), int(keys[-1]) + 1) if len(keys) else (0, 0)
        self.span = slice(first, last)
        self.index = None if last - first == len(keys) else torch.from_numpy(keys).to(device)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """The columns of ``[B, G, K, D]`` to compute with: a view where they are one interval, otherwise one copy."""
        return x[:, :, self.span] if self.index is None else x.index_select(2, self.index)


class Plan:
    """The steps for each prompt of a batch, and how many rows repeat a prompt.

    ``kept`` holds, by layer and prompt, the gathered keys and values that a continuation sees of its prompt; the prompt's
    columns of a cache stay as they are until the prompt runs again.
    """

    def __init__(self, batch: Batch, request: MaskRequest) -> None:
        self.repeats = batch.repeats(request.rows)
        self.first = request.queries.start
        self.kept: dict[tuple[int, int], Pair | None] = batch.kept
        self._request = request
        self._stretches = batch.stretches(request)
        self._table = batch.table
        if self.first < batch.table.columns:
            self.kept.clear()

    @cached_property
    def prompts(self) -> list[list[Planned]]:
        """The steps of each prompt."""
        columns, device, window = self._table.columns, self._request.device, self._request.window
        if window is None or not self.is_windowed:
            steps = [plan_groups(stretches) for stretches in self._stretches]
        else:
            each = zip(self._stretches, self._positions.cpu().numpy(), strict=True)
            steps = [windowed_steps(stretches, positions, window) for stretches, positions in each]
        return [[Planned(step, columns, device) for step in those] for those in steps]

    @cached_property
    def _positions(self) -> torch.Tensor:
        """Of all keys, ``[P, K]``."""
        return self._table.positions_at(0, self._request.keys)

    @cached_property
    def is_windowed(self) -> bool:
        """Whether any query could reach further back than the window of these layers."""
        window, queries = self._request.window, self._request.queries
        if window is None:
            return False
        return bool(self._positions[:, queries.start : queries.stop].max() - self._positions.min() >= window)

    @property
    def is_causal(self) -> bool:
        """Whether this is one prompt in which everyone sees everything before: one call, as for plain text."""
        queries = self._request.queries
        return self._stretches == [[Stretch(0, queries.stop, ())]] and not queries.start and not self.is_windowed

    @cached_property
    def packed(self) -> varlen.Packed:
        """All prompts at once, for CUDA."""
        return varlen.Packed(self._stretches, self.repeats, self._request.queries, self._request.device)

    def seen_of_prompt(self, layer: int | None, p: int, planned: Planned, key: torch.Tensor, value: torch.Tensor) -> Pair:
        """Keys and values ``[B or 1, G, n, D]`` that a continuation sees of prompt p, gathered at the first step only.

        Rows of one prompt (beams, return sequences) share one copy. Where rows differ, because something noises each, beams
        may still trade places, so nothing is kept.
        """
        found = None if layer is None else self.kept.get((layer, p))
        if found is None:
            found = planned.keys(key), planned.keys(value)
            if layer is not None and (layer, p) not in self.kept:
                shared = all(_rows_agree(x) for x in found)
                self.kept[layer, p] = (found[0][:1].clone(), found[1][:1].clone()) if shared else None
        return found


def _rows_agree(x: torch.Tensor) -> bool:
    """Whether rows are equal up to rounding."""
    if len(x) == 1:
        return True
    return bool((x - x[:1]).abs().max() <= 64 * torch.finfo(x.dtype).eps * x.abs().max())


def sparse_attention(
    module: torch.nn.Module | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Plan,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query ``[B, H, Q, D]`` over key and value ``[B, G, K, D]`` as the plan says → ``[B, Q, H, D]``.

    Raises
    ------
    BackendError
        No plan (the model was called outside of attend), or an option that would be left out.
    """
    if not isinstance(attention_mask, Plan):
        raise NoPlan("sparse runs inside leattn.attend only; call model.set_attn_implementation('sdpa') first")
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise BackendError(f"the sparse backend has no {unknown[0]}; use another backend")
    if dropout:
        raise BackendError("the sparse backend has no attention dropout; use model.eval() or set it to 0 in the config")
    plan, (rows, heads, length, size) = attention_mask, query.shape
    scaling = size**-0.5 if scaling is None else scaling
    packed_kernel = None if plan.is_windowed else varlen.kernel_for(query, key, value)
    if packed_kernel is not None:
        return plan.packed.attention(packed_kernel, query, key, value, scaling), None
    kernel = Kernel(query, key, value, scaling)
    if plan.is_causal:
        return kernel.causal(query, key[:, :, :length], value[:, :, :length]), None
    output = query.new_zeros(rows, length, heads, value.shape[-1])  # padding columns stay 0
    most = max(1, TEMPORARY // (plan.repeats * heads * size * query.element_size()))
    for p, steps in enumerate(plan.prompts):
        part = slice(p * plan.repeats, (p + 1) * plan.repeats)
        for planned in steps:
            step = planned.step
            columns = slice(step.start - plan.first, step.stop - plan.first)
            queries, keys, values = query[part, :, columns], key[part], value[part]
            if planned.own is not None:
                layer = getattr(module, "layer_idx", None) if kernel.with_lse else None
                pair = plan.seen_of_prompt(layer, p, planned, keys, values)
                own = slice(planned.own, step.stop)
                kernel.continuation(queries, *pair, keys[:, :, own], values[:, :, own], output[part, columns])
            elif isinstance(step, Mixed):
                output[part, columns] = kernel.masked(queries, planned.keys(keys), planned.keys(values), planned.mask)
            elif step.stop - step.start == 1:
                output[part, columns] = kernel.masked(queries, planned.keys(keys), planned.keys(values), None)
            elif not planned.is_apart:
                kernel.stairs(queries, planned.keys(keys), planned.keys(values), output[part, None, columns])
            else:
                seen = (planned.keys(keys), planned.keys(values))
                # Without the log-sum-exp, each stretch gets a copy of what it sees.
                share = most if kernel.with_lse else most * step.length // (step.length + step.seen_keys)
                for piece in step.pieces(share):
                    columns = slice(piece.start - plan.first, piece.stop - plan.first)
                    kernel.group(query[part, :, columns], keys, values, piece, seen, output[part, columns])
    return output, None


class Sparse:
    name = "sparse"
    implementation = "leattn_sparse"
    function = staticmethod(sparse_attention)

    def refusal(self, facts: ModelFacts) -> str | None:
        if facts.softcap:
            return "it has no soft-cap on attention scores; use backend='eager' or 'flex'"
        if facts.sinks:
            return "it has no attention sinks; use backend='eager'"
        return None

    def mask(self, batch: Batch, request: MaskRequest) -> Plan:
        """The plan for these queries, made once per forward.

        Raises
        ------
        BackendError
            A mask of the user's, or padding inside of a prompt: both are S × S in general.
        """
        if batch.user_mask is not None:
            raise BackendError("sparse takes no mask of your own; use backend='eager' or 'sdpa', or edit the prompt")
        if not batch.is_own_padding(request):
            raise BackendError("the sparse backend takes no attention_mask that hides tokens of a prompt; use backend='sdpa'")
        return Plan(batch, request)
