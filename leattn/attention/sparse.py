"""Our own backend: only what the graph allows is computed, nothing is compiled, and nothing of size S × S is made.

A group of equal stretches is one batched call on its own keys and one unmasked call on what it sees, merged by log-sum-exp; a
prompt in which everyone sees everything is one causal call. What is generated sees the same columns of the prompt at every
step, so these are gathered once per layer and kept.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from leattn.attention import varlen
from leattn.attention.group import Group
from leattn.attention.kernels import Kernel
from leattn.attention.plan import Continuation, Mixed, Step, plan
from leattn.attention.reader import Reader
from leattn.attention.reading import active, holding, moved_query
from leattn.attention.request import Backend, Need, Request
from leattn.dag.reading import Reading
from leattn.errors import BackendError
from leattn.model.record import Model
from leattn.model.registry import check_keywords
from leattn.prompt.stretch import Stretch, columns_in


class SparseAttention:
    """The attention of a forward's layers: the steps of each prompt, made when the first layer asks."""

    def __init__(self, request: Request, *, packs: bool = False) -> None:
        self.request, self.packs = request, packs
        self.stretches = request.columns.stretches(request.queries)
        self.number = 0
        self._steps: dict[frozenset[Reading], list[list[tuple[Step, Any]]]] = {}

    @cached_property
    def _positions(self) -> Tensor:
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

    def steps(self, readings: frozenset[Reading]) -> list[list[tuple[Step, Any]]]:
        """The steps of each prompt where these readings hold, and where the keys are that they compute with."""
        if readings not in self._steps:
            self._steps[readings] = self._planned(readings)
        return self._steps[readings]

    def _planned(self, readings: frozenset[Reading]) -> list[list[tuple[Step, Any]]]:
        prompts = []
        for p, every in enumerate(self.stretches):
            stretches = [holding(stretch, readings) for stretch in every]
            positions = self._positions[p].numpy() if self.is_windowed else None
            steps = [self._continued(p, step) for step in plan(stretches, positions, self.request.window)]
            prompts.append([(step, step.index(self.request.device)) for step in steps])
        return prompts

    def _continued(self, p: int, step: Group | Mixed | Reader) -> Step:
        """A step of what is generated, as a continuation of the prompt where it sees scattered columns of that."""
        width = self.request.columns.width
        if not isinstance(step, Group) or step.start < width:
            return step
        seen = columns_in([(first, min(last, width)) for first, last in step.seen if first < width])
        if not len(seen) or seen[-1] - seen[0] < len(seen):
            return step
        name = (self.request.window, p)
        return Continuation(step.start, step.stop, seen, slice(width, step.stop), self.request.kept, name)

    @cached_property
    def packed(self) -> varlen.Packed:
        """All prompts at once, for CUDA."""
        return varlen.Packed(self.stretches, self.request.repeats, self.request.queries, self.request.device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # many small calls, planned already
    def __call__(
        self,
        module: torch.nn.Module | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of query ``[B, H, Q, D]`` over key and value ``[B, G, K, D]`` → ``[B, Q, H, D]``.

        Raises
        ------
        BackendError
            An option that would be left out.
        """
        check_keywords(kwargs, (), "the sparse backend")
        if dropout:
            raise BackendError("the sparse backend has no attention dropout; use model.eval() or set it to 0 in the config")
        request, (rows, heads, length, size) = self.request, query.shape
        scaling = size**-0.5 if scaling is None else scaling
        number, self.number = self.number, self.number + 1
        varlen_kernel = varlen.kernel_for(query, key, value) if self.packs and not self.is_windowed else None
        if varlen_kernel is not None:
            return self.packed.attention(varlen_kernel, query, key, value, scaling), None
        readings = active(request.columns.readings, module)

        def moved(query: Tensor, reading: Reading) -> Tensor:
            return moved_query(query, reading, request.turns, module)

        kernel = Kernel(query, key, value, scaling, number, moved)
        if self.is_causal:
            return kernel.causal(query, key[:, :, :length], value[:, :, :length]), None
        output = query.new_zeros(rows, length, heads, value.shape[-1])  # padding columns stay 0
        repeats, first = request.repeats, request.queries.start
        for p, steps in enumerate(self.steps(readings)):
            part = slice(p * repeats, (p + 1) * repeats)
            queries, keys, values, outputs = query[part], key[part], value[part], output[part]
            for step, index in steps:
                columns = slice(step.start - first, step.stop - first)
                step.run(kernel, index, queries[:, :, columns], keys, values, outputs[:, columns])
        return output, None


def _refusal(record: Model) -> str | None:
    if record.facts.softcap:
        return "it has no soft-cap on attention scores; use backend='eager' or 'flex'"
    if record.facts.learned_sinks:
        return "it has no attention sinks; use backend='eager'"
    return None


SPARSE = Backend("sparse", SparseAttention, _refusal, carries=frozenset[Need]({"readings"}))
VARLEN = Backend("varlen", partial(SparseAttention, packs=True), _refusal, device="cuda")
"""A backend of its own name, that ``"auto"`` does not take: it has run on an emulation of the kernel only."""
