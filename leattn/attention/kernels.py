"""The attention calls of the sparse backend. Queries come as ``[B, H, Q, D]``, results go out as ``[B, Q, H, D]``.

Keys and values are ``[B, G, K, D]``. With torch's CPU flash kernel, which returns the log-sum-exp, what many stretches see
is computed apart from their own part; everywhere else keys are put side by side for one public call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from leattn.attention.group import Group
from leattn.dag.reading import Reading

SHORT = 64
"""Keys seen whole up to which each stretch of a group gets a copy of them; more are computed apart and merged."""


BLOCK = 32
"""Queries that the CPU's kernel takes at a time. Fewer cost as much, so short stretches go side by side, and few queries with
the heads that share a key head."""

TEMPORARY = 4 << 20
"""Bytes of output that one batched call may make: page faults on large fresh tensors cost more than the calls."""


Moved: TypeAlias = Callable[[Tensor, Reading], Tensor]
"""A query as it meets the keys of a group."""


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether anybody will ask for the gradient of what is computed from these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class Kernel:
    """How to compute one layer's attention: its scaling, whether the kernel that returns the log-sum-exp may be used, which of
    a forward's calls this is, and how its queries are turned to read what stands elsewhere."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, number: int = 0, moved: Moved | None = None
    ) -> None:
        self.scaling, self.number = scaling, number
        self.moved: Moved = (lambda query, _: query) if moved is None else moved
        # Private, but the one that returns the log-sum-exp and takes grouped heads; it has no gradient for that, and wants
        # values as wide as keys (deepseek's latent attention has others).
        self.with_lse = (
            query.device.type == "cpu"
            and not needs_gradient(query, key, value)
            and key.shape[-1] == value.shape[-1]
            and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
        )

    def masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """One call under a mask ``[Q, K]`` that all heads share, with the query heads folded onto their key head."""
        rows, heads, length, size = query.shape
        groups = key.shape[1]
        folded = query.reshape(rows, groups, heads // groups * length, size)
        folded_mask = None if mask is None else mask.repeat(heads // groups, 1)
        output = scaled_dot_product_attention(folded, key, value, folded_mask, scale=self.scaling)
        return output.view(rows, groups, heads // groups, length, -1).flatten(1, 2).transpose(1, 2)

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Plain causal attention, in one call whose result is not copied."""
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scaling, enable_gqa=True)
        return output.transpose(1, 2)

    def stairs(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, *, count: int = 1) -> None:
        """Causal, the last query at the last key, into ``output`` ``[B, count, Q, H, D]``; others are ``[B · count, …]``."""
        length, keys = query.shape[2], key.shape[2]
        for start, stop in _steps(length, keys):
            seen = keys - length + stop
            is_causal = length == keys and stop - start == length
            mask = None if is_causal or stop - start == 1 else _bottom_right(stop - start, seen, query)
            part = scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, :seen],
                value[:, :, :seen],
                mask,
                is_causal=is_causal,
                scale=self.scaling,
                enable_gqa=True,
            )
            output[:, :, start:stop] = part.transpose(1, 2).unflatten(0, (-1, count))  # type: ignore[no-untyped-call]

    def continuation(
        self, query: Tensor, seen_key: Tensor, seen_value: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> None:
        """Queries that see some keys whole, ``[B or 1, G, n, D]``, and end at the last of their own ``[B, G, K, D]``."""
        rows = len(query)
        if not self.with_lse:
            seen = (seen_key.expand(rows, -1, -1, -1), seen_value.expand(rows, -1, -1, -1))
            keys, values = (torch.cat(pair, 2) for pair in zip(seen, (key, value), strict=True))
            self.stairs(query, keys, values, output[:, None])
            return
        mask = None if query.shape[2] == 1 else _bottom_right(query.shape[2], key.shape[2], query)
        theirs, theirs_lse = self.folded(query, seen_key, seen_value)
        mine, mine_lse = self.folded(query, key, value, mask)
        torch.lerp(mine, theirs, torch.sigmoid(theirs_lse - mine_lse).to(query.dtype), out=output)

    def folded(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scaling: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Query heads, and rows that share one row of keys, side by side as queries of their key head: keys are read once.

        Output ``[B, Q, H, D]`` and log-sum-exp ``[B, Q, H, 1]``.
        """
        rows, heads, length, size = query.shape
        kept, groups = key.shape[:2]
        sharing, each = rows // kept, heads // groups
        folded = query.reshape(kept, sharing, groups, each, length, size).transpose(1, 2).flatten(2, 4)
        mask = None if mask is None else mask.repeat(sharing * each, 1)
        output, lse = self._flash(folded, key, value, mask=mask, scaling=scaling)
        parts = [x.reshape(kept, groups, sharing, each, length, -1) for x in (output, lse)]
        result, result_lse = (x.permute(0, 2, 4, 1, 3, 5).reshape(rows, length, heads, -1) for x in parts)
        return result, result_lse

    def group(
        self, query: Tensor, key: Tensor, value: Tensor, group: Group, seen: tuple[Tensor, Tensor], output: Tensor
    ) -> None:
        """Equal stretches, into ``output``; ``seen`` are the keys and values that all see, if they have no windows."""
        rows, heads, _, size = query.shape
        most = max(1, TEMPORARY // (rows * heads * size * query.element_size()))
        if not self.with_lse:  # each stretch gets a copy of what it sees
            most = most * group.length // (group.length + group.seen_keys)
        for piece in group.pieces(most):
            part = slice(piece.start - group.start, piece.stop - group.start)
            self._piece(query[:, :, part], key, value, piece, seen, output[:, part])

    def _piece(
        self, query: Tensor, key: Tensor, value: Tensor, group: Group, seen: tuple[Tensor, Tensor], output: Tensor
    ) -> None:
        if group.window or not self.with_lse or group.seen_keys <= SHORT:
            for block, several in _blocks(group):
                columns = slice(block.start - group.start, block.stop - group.start)
                by_block = output[:, columns].unflatten(1, (block.count, block.length))  # type: ignore[no-untyped-call]
                self._with_copies(query[:, :, columns], key, value, block, several, seen, by_block)
            return
        mine, mine_lse = self.own(query, key, value, group)
        theirs, theirs_lse = self.over(query, *seen, self.scaling)
        torch.lerp(mine, theirs, torch.sigmoid(theirs_lse - mine_lse).to(query.dtype), out=output)

    def own(self, query: Tensor, key: Tensor, value: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """What equal stretches see of themselves: output ``[B, Q, H, D]`` and log-sum-exp ``[B, Q, H, 1]``."""
        own = slice(group.start, group.stop)
        parts = [_split(x, group) for x in (query, key[:, :, own], value[:, :, own])]
        steps = []
        for start, stop in _steps(group.length, group.length):
            is_causal = stop - start == group.length
            mask = None if is_causal else _bottom_right(stop - start, stop, query)
            step = parts[0][:, :, start:stop], parts[1][:, :, :stop], parts[2][:, :, :stop]
            steps.append(self._flash(*step, causal=is_causal, mask=mask))
        output, lse = (_joined(torch.cat(x, 2), group) for x in zip(*steps, strict=True))
        return output, lse

    def over(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """All queries over all keys: output ``[B, Q, H, D]`` and log-sum-exp ``[B, Q, H, 1]``."""
        if 2 * query.shape[2] <= BLOCK:
            return self.folded(query, key, value, scaling=scaling)
        output, lse = self._flash(query, key, value, scaling=scaling)
        return output.transpose(1, 2), lse.transpose(1, 2)

    def _with_copies(
        self, query: Tensor, key: Tensor, value: Tensor, group: Group, several: int, seen: tuple[Tensor, Tensor], output: Tensor
    ) -> None:
        """What is seen lies in front of own keys, once for every ``several`` stretches, which are one of the group's.

        Output is ``[B, count, L, H, D]``.
        """
        own = slice(group.start, group.stop)
        if group.window:
            keys, values = (_with_window(x, group) for x in (key, value))
        else:
            keys, values = (_split(x[:, :, own], group) for x in (key, value))
            if group.seen_keys:
                pairs = zip(seen, (keys, values), strict=True)
                keys, values = (torch.cat([_repeat(x, group), part], 2) for x, part in pairs)
        queries = _split(query, group)
        if several == 1:
            self.stairs(queries, keys, values, output, count=group.count)
            return
        mask = _side_by_side(several, group.length // several, keys.shape[2], query)
        part = scaled_dot_product_attention(queries, keys, values, mask, scale=self.scaling, enable_gqa=True)
        output.copy_(part.transpose(1, 2).unflatten(0, (-1, group.count)))  # type: ignore[no-untyped-call]

    def _flash(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        causal: bool = False,
        mask: Tensor | None = None,
        scaling: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output ``[B, H, Q, D]`` and log-sum-exp ``[B, H, Q, 1]``; both lie in memory with Q before H."""
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=self.scaling if scaling is None else scaling
        )
        return output, lse[..., None]


def _blocks(group: Group) -> Iterator[tuple[Group, int]]:
    """The group as one whose stretches each are several short ones side by side, and the same for what is left over."""
    several = 1 if group.window or not group.seen_keys else max(1, min(group.count, BLOCK // group.length))
    whole, rest = divmod(group.count, several)
    yield replace(group, length=several * group.length, count=whole), several
    if rest:
        yield replace(group, start=group.stop - rest * group.length, length=rest * group.length, count=1), rest


def _split(x: Tensor, group: Group) -> Tensor:
    """``[B, H, count · L, D]`` to ``[B · count, H, L, D]``; a view for one row."""
    if group.count == 1:
        return x
    rows, heads, _, size = x.shape
    return x.view(rows, heads, group.count, group.length, size).transpose(1, 2).flatten(0, 1)


def _joined(x: Tensor, group: Group) -> Tensor:
    """``[B · count, H, L, D]`` to ``[B, count · L, H, D]``; a view of what the kernel returns."""
    _, heads, length, size = x.shape
    return x.transpose(1, 2).reshape(-1, group.count * length, heads, size)


def _with_window(x: Tensor, group: Group) -> Tensor:
    """The ``window`` columns before each stretch and its own, ``[B · count, G, window + L, D]``; a view for one row."""
    columns = x[:, :, group.start - group.window : group.stop]
    return columns.unfold(2, group.window + group.length, group.length).transpose(3, 4).transpose(1, 2).flatten(0, 1)


def _repeat(x: Tensor, group: Group) -> Tensor:
    """What all stretches see, ``[B, G, K, D]``, once for each: ``[B · count, G, K, D]``."""
    return x.unsqueeze(1).expand(-1, group.count, -1, -1, -1).flatten(0, 1)


def _steps(length: int, keys: int) -> list[tuple[int, int]]:
    """Where to cut causal queries. The kernel skips what is masked in blocks of 512 keys only, so shorter ones go in steps."""
    if length <= 64 or (length > 1024 and length == keys):
        return [(0, length)]
    step = 32 if length <= 128 else 64 if length <= 1024 else 256
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def _bottom_right(length: int, keys: int, like: Tensor) -> Tensor:
    """What to add to the scores of queries of which the last stands at the last key, ``[Q, K]``."""
    mask = torch.full((length, keys), -torch.inf, dtype=like.dtype, device=like.device)
    return mask.triu_(keys - length + 1)


def _side_by_side(several: int, length: int, keys: int, like: Tensor) -> Tensor:
    """What to add to the scores of several stretches that see themselves up to each query, and what is in front whole."""
    mask = _bottom_right(several * length, keys, like)
    stretch = torch.arange(several * length, device=like.device) // length
    mask[:, keys - several * length :].masked_fill_(stretch[:, None] != stretch, -torch.inf)
    return mask
