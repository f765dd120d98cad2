"""Our own backend: only what the graph allows is computed, nothing is compiled, and nothing of size S × S is made.

A group of equal stretches is one batched call on its own keys and one unmasked call on what it sees, merged by log-sum-exp; a
prompt in which everyone sees everything is one causal call. What is generated sees the same columns of the prompt at every
step, so these are gathered once per layer and kept.

Shapes: B rows of one prompt, H query heads, G key heads, Q queries of a step, K keys, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from leattn.attention import varlen
from leattn.attention.kernels import Kernel
from leattn.attention.plan import Group, Mixed, plan_groups, plan_windowed
from leattn.attention.request import LayerAttention, Need, Request
from leattn.errors import BackendError
from leattn.model.facts import Facts
from leattn.prompt.columns import Stretch, columns_in

TEMPORARY = 4 << 20
"""Bytes of output that one batched call may make: page faults on large fresh tensors cost more than the calls."""

LONG = 1024
"""Keys seen whole from which on a stretch by itself computes them apart from its own, without any mask."""


class Step(Protocol):
    """Some adjacent queries of one prompt, and how their attention is computed."""

    @property
    def columns(self) -> slice:
        """The columns of the queries."""

    def run(self, kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> None:
        """Query ``[B, H, Q, D]`` of the step, key and value ``[B, G, K, D]`` of all columns, into output ``[B, Q, H, D]``."""


class Keys:
    """Some columns of keys and values: a view where they are one interval, otherwise one copy."""

    def __init__(self, columns: npt.NDArray[np.int64], device: torch.device) -> None:
        first, last = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
        self.span = slice(first, last)
        self.index = None if last - first == len(columns) else torch.from_numpy(columns).to(device)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, G, K, D]`` → ``[B, G, n, D]``."""
        return x[:, :, self.span] if self.index is None else x.index_select(2, self.index)


@dataclass(frozen=True)
class Alone:
    """Queries that see some keys: under a mask ``[Q, K]``, all of them if there is none, or as stairs that end at the last."""

    columns: slice
    keys: Keys
    mask: torch.Tensor | None = None
    stairs: bool = False

    def run(self, kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> None:
        if self.stairs:
            kernel.stairs(query, self.keys.of(key), self.keys.of(value), output[:, None])
        else:
            output.copy_(kernel.masked(query, self.keys.of(key), self.keys.of(value), self.mask))


@dataclass(frozen=True)
class Grouped:
    """Equal stretches side by side, and the keys that all of them see whole."""

    group: Group
    seen: Keys

    @property
    def columns(self) -> slice:
        return slice(self.group.start, self.group.stop)

    def run(self, kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> None:
        group, seen = self.group, (self.seen.of(key), self.seen.of(value))
        rows, heads, _, size = query.shape
        most = max(1, TEMPORARY // (rows * heads * size * query.element_size()))
        if not kernel.with_lse:  # each stretch gets a copy of what it sees
            most = most * group.length // (group.length + group.seen_keys)
        for piece in group.pieces(most):
            columns = slice(piece.start - group.start, piece.stop - group.start)
            kernel.group(query[:, :, columns], key, value, piece, seen, output[:, columns])


@dataclass(frozen=True)
class Continuation:
    """What is generated: it sees scattered columns of the prompt, gathered at the first step only, and everything after it.

    ``kept`` holds them by layer, in the order of calls. Rows of one prompt (beams, return sequences) share one copy. Where rows
    differ, because something noises each, beams may still trade places, so nothing is kept.
    """

    columns: slice
    seen: Keys
    own: slice
    kept: dict[Any, Any]
    name: Any

    def run(self, kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> None:
        name = (self.name, kernel.number)
        pair: tuple[torch.Tensor, torch.Tensor] | None = self.kept.get(name)
        if pair is None:
            pair = self.seen.of(key), self.seen.of(value)
            if kernel.with_lse and name not in self.kept:
                shared = all(_rows_agree(x) for x in pair)
                self.kept[name] = (pair[0][:1].clone(), pair[1][:1].clone()) if shared else None
        kernel.continuation(query, *pair, key[:, :, self.own], value[:, :, self.own], output)


def _rows_agree(x: torch.Tensor) -> bool:
    """Whether rows are equal up to rounding."""
    return len(x) == 1 or bool((x - x[:1]).abs().max() <= 64 * torch.finfo(x.dtype).eps * x.abs().max())


class SparseAttention:
    """The attention of a forward's layers: the steps of each prompt, made when the first layer asks."""

    def __init__(self, request: Request, *, packs: bool = False) -> None:
        self.request, self.packs = request, packs
        self.stretches = request.columns.stretches(request.queries)
        self.number = 0

    @cached_property
    def _positions(self) -> torch.Tensor:
        """Of all keys, ``[P, K]``."""
        return self.request.columns.positions(range(self.request.queries.stop)).cpu()

    @cached_property
    def is_windowed(self) -> bool:
        """Whether any query could reach further back than the window of these layers."""
        if self.request.window is None:
            return False
        queries = self._positions[:, self.request.queries.start :]
        return bool(queries.max() - self._positions.min() >= self.request.window)

    @cached_property
    def is_causal(self) -> bool:
        """Whether this is one prompt in which everyone sees everything before: one call, as for plain text."""
        queries = self.request.queries
        return self.stretches == [[Stretch(0, queries.stop, ())]] and not queries.start and not self.is_windowed

    @cached_property
    def steps(self) -> list[list[Step]]:
        """The steps of each prompt."""
        prompts: list[list[Step]] = []
        for p, stretches in enumerate(self.stretches):
            if self.is_windowed and self.request.window is not None:
                planned = plan_windowed(stretches, self._positions[p].numpy(), self.request.window)
            else:
                planned = plan_groups(stretches)
            prompts.append([self._step(p, one) for one in planned])
        return prompts

    def _step(self, p: int, planned: Group | Mixed) -> Step:
        request, columns = self.request, slice(planned.start, planned.stop)
        device, width = request.device, request.columns.width
        if isinstance(planned, Mixed):
            return Alone(columns, Keys(planned.keys, device), torch.from_numpy(planned.mask).to(device))
        apart = planned.count > 1 or planned.window > 0 or (planned.length > 1 and planned.seen_keys > LONG)
        if planned.start >= width:
            scattered = columns_in([(a, min(b, width)) for a, b in planned.seen if a < width])
            if len(scattered) and scattered[-1] - scattered[0] >= len(scattered):
                own = slice(width, planned.stop)
                return Continuation(columns, Keys(scattered, device), own, request.kept, (request.window, p))
        if apart:
            return Grouped(planned, Keys(columns_in(planned.seen), device))
        keys = Keys(columns_in([*planned.seen, (planned.start, planned.stop)]), device)
        return Alone(columns, keys, stairs=planned.length > 1)

    @cached_property
    def packed(self) -> varlen.Packed:
        """All prompts at once, for CUDA."""
        return varlen.Packed(self.stretches, self.request.repeats, self.request.queries, self.request.device)

    def __call__(
        self,
        module: torch.nn.Module | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention of query ``[B, H, Q, D]`` over key and value ``[B, G, K, D]`` → ``[B, Q, H, D]``.

        Raises
        ------
        BackendError
            An option that would be left out.
        """
        del module
        unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
        if unknown:
            raise BackendError(f"the sparse backend has no {unknown[0]}; use another backend")
        if dropout:
            raise BackendError("the sparse backend has no attention dropout; use model.eval() or set it to 0 in the config")
        request, (rows, heads, length, size) = self.request, query.shape
        scaling = size**-0.5 if scaling is None else scaling
        number, self.number = self.number, self.number + 1
        varlen_kernel = varlen.kernel_for(query, key, value) if self.packs and not self.is_windowed else None
        if varlen_kernel is not None:
            return self.packed.attention(varlen_kernel, query, key, value, scaling), None
        kernel = Kernel(query, key, value, scaling, number)
        if self.is_causal:
            return kernel.causal(query, key[:, :, :length], value[:, :, :length]), None
        output = query.new_zeros(rows, length, heads, value.shape[-1])  # padding columns stay 0
        repeats, first = request.repeats, request.queries.start
        for p, steps in enumerate(self.steps):
            part = slice(p * repeats, (p + 1) * repeats)
            queries, keys, values, outputs = query[part], key[part], value[part], output[part]
            for step in steps:
                columns = slice(step.columns.start - first, step.columns.stop - first)
                step.run(kernel, queries[:, :, columns], keys, values, outputs[:, columns])
        return output, None


class Sparse:
    """Group by group, through torch's scaled_dot_product_attention; or, packed, through its variable-length kernel on CUDA.

    The second is a backend of its own name: it has run on an emulation of the kernel only.
    """

    implementation = None
    carries: Sequence[Need] = ()

    def __init__(self, name: str, *, packs: bool = False) -> None:
        self.name, self.packs = name, packs

    def refusal(self, facts: Facts, device: torch.device) -> str | None:
        if facts.softcap:
            return "it has no soft-cap on attention scores; use backend='eager' or 'flex'"
        if facts.sinks:
            return "it has no attention sinks; use backend='eager'"
        if self.packs and device.type != "cuda":
            return "torch has its variable-length attention on CUDA only; use backend='sparse'"
        return None

    def attention(self, request: Request) -> LayerAttention:
        return SparseAttention(request, packs=self.packs)
