"""Our own backend: only what the graph allows is computed, nothing is compiled, and nothing of size S × S is made.

The plan travels through the model as its mask argument. A group of equal runs is one batched call on its own keys and one
unmasked call on what it sees, merged by log-sum-exp; a prompt in which everyone sees everything is one causal call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from leattn.backends.batch import Batch, MaskRequest
from leattn.backends.kinds import ModelFacts
from leattn.backends.plan import Group, plan_groups
from leattn.errors import BackendError
from leattn.visible import Run

TEMPORARY = 4 << 20
"""Bytes of output that one batched call may make."""

Part = tuple[torch.Tensor, torch.Tensor]
"""Output ``[…, H, Q, D]`` and log-sum-exp ``[…, H, Q]``."""


class Plan:
    """Groups of queries for each prompt of a batch, and how many rows repeat a prompt."""

    def __init__(self, batch: Batch, request: MaskRequest) -> None:
        self.repeats = batch.repeats(request.rows)
        self.prompts: list[list[Group]] = []
        for prompt, padding in zip(batch.prompts, batch.table.padding, strict=True):
            visible, offsets = prompt.visible, [padding + offset for offset in prompt.offsets]
            if request.queries.stop > offsets[-1]:
                visible, offsets = visible.continued(), [*offsets, request.queries.stop]
            self.prompts.append(plan_groups(visible, offsets, request.queries))
        self.first = request.queries.start


def sparse_attention(
    _module: torch.nn.Module,
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
        raise BackendError("sparse runs inside leattn.attend only; call model.set_attn_implementation('sdpa') first")
    unknown = [name for name in ("softcap", "s_aux", "position_bias", "sliding_window") if kwargs.get(name) is not None]
    if unknown:
        raise BackendError(f"the sparse backend has no {unknown[0]}; use another backend")
    if dropout:
        raise BackendError("the sparse backend has no attention dropout; use model.eval() or set it to 0 in the config")
    plan, (rows, heads, length, _) = attention_mask, query.shape
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = query.new_zeros(rows, length, heads, value.shape[-1])  # padding columns stay 0
    # Page faults on large fresh tensors cost more than the calls: see TEMPORARY.
    most = max(1, TEMPORARY // (plan.repeats * heads * query.shape[-1] * query.element_size()))
    kernel = Kernel(scaling, with_lse=_has_lse(query, key, value))
    for p, groups in enumerate(plan.prompts):
        part = slice(p * plan.repeats, (p + 1) * plan.repeats)
        for group in groups:
            merges = kernel.with_lse and not group.is_single and not group.window
            parents = tuple(_gather(x[part], group.parents) for x in (key, value)) if merges else None
            for piece in group.pieces(most):
                columns = slice(piece.start - plan.first, piece.stop - plan.first)
                result = kernel.group(query[part, :, columns], key[part], value[part], piece, parents)
                output[part, columns] = result.transpose(1, 2)
    return output, None


def _has_lse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's CPU flash kernel, which also returns the log-sum-exp, may be used: it has no gradient for that."""
    needs_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return (
        query.device.type == "cpu"
        and not needs_gradient
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    )


class Kernel:
    """The calls that one group of queries takes; shapes are ``[B, H, Q, D]`` for one prompt's rows."""

    def __init__(self, scaling: float, *, with_lse: bool) -> None:
        self.scaling = scaling
        self.with_lse = with_lse

    def group(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        group: Group,
        parents: tuple[torch.Tensor, ...] | None,
    ) -> torch.Tensor:
        """Output ``[B, H, count · length, D]``; ``parents`` are the gathered keys and values that all runs see."""
        if group.is_single or (group.parent_keys and not self.with_lse):
            return self._few(query, key, value, group)
        own = slice(group.start, group.stop)
        if not group.parent_keys:
            return self._joined(self._own(*(_split(x, group) for x in (query, key[:, :, own], value[:, :, own]))), group)[0]
        return self._merged(query, key, value, group, parents)

    def _merged(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        group: Group,
        parents: tuple[torch.Tensor, ...] | None,
    ) -> torch.Tensor:
        own = slice(group.start, group.stop)
        mine = self._joined(self._own_lse(*(_split(x, group) for x in (query, key[:, :, own], value[:, :, own]))), group)
        if parents is None:
            windows = [_windows(x, group) for x in (key, value)]
            theirs = self._joined(self._flash(_split(query, group), *windows), group)
        else:
            theirs = self._flash(query, *parents)
        weight = torch.sigmoid(theirs[1] - mine[1])[..., None].to(query.dtype)
        return torch.lerp(mine[0], theirs[0], weight)

    def _own(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Part:
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scaling, enable_gqa=True)
        return output, output.new_zeros(())

    def _own_lse(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Part:
        """A causal square. The kernel skips what is masked in blocks of 512 keys only, so shorter ones go in steps."""
        length = query.shape[-2]
        step = length if length <= 64 or length > 1024 else 32 if length <= 128 else 64
        if step == length:
            return self._flash(query, key, value, causal=True)
        parts = []
        for start in range(0, length, step):
            stop = min(start + step, length)
            rows = torch.arange(start, stop, device=query.device)[:, None]
            mask = torch.zeros(stop - start, stop, dtype=query.dtype, device=query.device)
            mask.masked_fill_(torch.arange(stop, device=query.device) > rows, -torch.inf)
            parts.append(self._flash(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], mask=mask))
        return torch.cat([part[0] for part in parts], -2), torch.cat([part[1] for part in parts], -1)

    def _flash(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        causal: bool = False,
        mask: torch.Tensor | None = None,
    ) -> Part:
        # Private, but the one that returns the log-sum-exp and takes grouped heads; where it is missing, _few serves.
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=self.scaling
        )
        return output, lse

    def _few(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: Group) -> torch.Tensor:
        """Run by run with the keys gathered and one small mask: decoding, chunked prefill, gradients."""
        outputs = []
        for i in range(group.count):
            start = group.start + i * group.length
            stop = start + group.length
            parents = ((start - group.window, start),) if group.window else group.parents
            intervals = (*parents, (start if group.own is None else group.own, stop))
            keys, values = (_gather(x, intervals) for x in (key, value))
            part = query[:, :, i * group.length : (i + 1) * group.length]
            outputs.append(self._bottom_right(part, keys, values))
        return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]

    def _bottom_right(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal with the last query at the last key, in steps whose masks stay small."""
        length, keys = query.shape[-2], key.shape[-2]
        if length == 1:
            return scaled_dot_product_attention(query, key, value, scale=self.scaling, enable_gqa=True)
        outputs = []
        for start in range(0, length, 256):
            stop = min(start + 256, length)
            seen = keys - length + stop
            rows = torch.arange(keys - length + start, seen, device=query.device)[:, None]
            mask = torch.arange(seen, device=query.device) <= rows
            outputs.append(
                scaled_dot_product_attention(
                    query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], mask, scale=self.scaling, enable_gqa=True
                )
            )
        return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]

    @staticmethod
    def _joined(part: Part, group: Group) -> Part:
        """``[B · count, H, L, D]`` back to ``[B, H, count · L, D]``."""
        output, lse = part
        if group.count == 1:
            return part
        heads, length = output.shape[1:3]
        shape = (-1, group.count, heads, length)
        output = output.reshape(*shape, output.shape[-1]).transpose(1, 2).flatten(2, 3)
        return output, lse if not lse.dim() else lse.reshape(shape).transpose(1, 2).flatten(2, 3)


def _split(x: torch.Tensor, group: Group) -> torch.Tensor:
    """``[B, H, count · L, D]`` to ``[B · count, H, L, D]``; a view for one row."""
    if group.count == 1:
        return x
    rows, heads, _, size = x.shape
    return x.view(rows, heads, group.count, group.length, size).transpose(1, 2).flatten(0, 1)


def _windows(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The ``window`` columns before each run, ``[B · count, G, window, D]``."""
    before = x[:, :, group.start - group.window : group.stop - group.length]
    return before.unfold(2, group.window, group.length).transpose(3, 4).transpose(1, 2).flatten(0, 1)


def _gather(x: torch.Tensor, intervals: Sequence[Run]) -> torch.Tensor:
    """Columns of ``[B, G, K, D]``: a view of one interval, otherwise one copy."""
    joined: list[Run] = []
    for start, stop in intervals:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    parts = [x[:, :, start:stop] for start, stop in joined] or [x[:, :, :0]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class Sparse:
    name = "sparse"
    implementation = "leattn_sparse"
    function = staticmethod(sparse_attention)

    def refusal(self, facts: ModelFacts) -> str | None:
        if facts.softcap:
            return "it has no soft-cap on attention scores; use backend='eager' or 'flex'"
        if facts.sinks:
            return "it has no attention sinks; use backend='eager'"
        if facts.windowed:
            return "it has no sliding windows; use backend='eager', 'sdpa' or 'flex'"
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
