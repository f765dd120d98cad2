"""The attention calls of the sparse backend. Queries come as ``[B, H, Q, D]``, results go out as ``[B, Q, H, D]``.

Keys and values are ``[B, G, K, D]``. With torch's CPU flash kernel, which returns the log-sum-exp, what many stretches see
is computed apart from their own part; everywhere else keys are put side by side for one public call.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from leattn.backends.plan import Group


class Kernel:
    """How to compute one layer's attention: its scaling, and whether the kernel that returns the log-sum-exp may be used."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> None:
        needs_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
        self.scaling = scaling
        # Private, but the one that returns the log-sum-exp and takes grouped heads; it has no gradient for that.
        self.with_lse = (
            query.device.type == "cpu"
            and not needs_gradient
            and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
        )

    def masked(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """One call under a mask ``[Q, K]`` that all heads share, with the query heads folded onto their key head."""
        rows, heads, length, size = query.shape
        groups = key.shape[1]
        folded = query.reshape(rows, groups, heads // groups * length, size)
        folded_mask = None if mask is None else mask.repeat(heads // groups, 1)
        output = scaled_dot_product_attention(folded, key, value, folded_mask, scale=self.scaling)
        return output.view(rows, groups, heads // groups, length, -1).flatten(1, 2).transpose(1, 2)

    def bottom_right(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal with the last query at the last key, in steps whose masks stay small."""
        length, keys = query.shape[2], key.shape[2]
        if length == 1:
            return self.masked(query, key, value, None)
        if length == keys:
            return self._causal(query, key, value).transpose(1, 2)
        outputs = []
        for start in range(0, length, 256):
            stop = min(start + 256, length)
            seen = keys - length + stop
            rows = torch.arange(keys - length + start, seen, device=query.device)[:, None]
            mask = torch.arange(seen, device=query.device) <= rows
            outputs.append(self._sdpa(query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], mask))
        return (torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]).transpose(1, 2)

    def continuation(
        self, query: torch.Tensor, seen_key: torch.Tensor, seen_value: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Queries that see some keys whole, ``[B or 1, G, n, D]``, and are causal with the last of their own ``[B, G, K, D]``."""
        rows = len(query)
        if not self.with_lse:
            seen = (seen_key.expand(rows, -1, -1, -1), seen_value.expand(rows, -1, -1, -1))
            keys, values = (torch.cat(pair, 2) for pair in zip(seen, (key, value), strict=True))
            return self.bottom_right(query, keys, values)
        length, keys_own = query.shape[2], key.shape[2]
        mask = None
        if length > 1:
            shape = (length, keys_own)
            later = torch.ones(shape, dtype=torch.bool, device=query.device).triu(keys_own - length + 1)
            mask = torch.zeros(shape, dtype=query.dtype, device=query.device).masked_fill_(later, -torch.inf)
        theirs, theirs_lse = self._folded(query, seen_key, seen_value)
        mine, mine_lse = self._folded(query, key, value, mask)
        return torch.lerp(mine, theirs, torch.sigmoid(theirs_lse - mine_lse).to(query.dtype))

    def _folded(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query heads, and rows that share one row of keys, side by side as queries of their key head: keys are read once.

        Output ``[B, Q, H, D]`` and log-sum-exp ``[B, Q, H, 1]``.
        """
        rows, heads, length, size = query.shape
        kept, groups = key.shape[:2]
        sharing, each = rows // kept, heads // groups
        folded = query.reshape(kept, sharing, groups, each, length, size).transpose(1, 2).flatten(2, 4)
        mask = None if mask is None else mask.repeat(sharing * each, 1)
        output, lse = self._flash(folded, key, value, mask=mask)
        parts = [x.reshape(kept, groups, sharing, each, length, -1) for x in (output, lse)]
        result, result_lse = (x.permute(0, 2, 4, 1, 3, 5).reshape(rows, length, heads, -1) for x in parts)
        return result, result_lse

    def group(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        group: Group,
        seen: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Equal stretches; ``seen`` are the keys and values that all of them see, unless each has a window of its own."""
        own = slice(group.start, group.stop)
        parts = [_split(x, group) for x in (query, key[:, :, own], value[:, :, own])]
        if not group.seen_keys:
            return _joined(self._causal(*parts), group)
        if not self.with_lse:
            before = [_windows(x, group) for x in (key, value)] if group.window else [_repeat(x, group) for x in seen]
            keys, values = (torch.cat(pair, 2) for pair in zip(before, parts[1:], strict=True))
            return _joined(self.bottom_right(parts[0], keys, values).transpose(1, 2), group)
        mine, mine_lse = self._staircase(*parts)
        if group.window:
            theirs, theirs_lse = self._flash(parts[0], *(_windows(x, group) for x in (key, value)))
            theirs, theirs_lse = _joined(theirs, group), _joined(theirs_lse[..., None], group)
        else:
            theirs, theirs_lse = self._flash(query, *seen)
            theirs, theirs_lse = theirs.transpose(1, 2), theirs_lse.transpose(1, 2)[..., None]
        weight = torch.sigmoid(theirs_lse - _joined(mine_lse[..., None], group)).to(query.dtype)
        return torch.lerp(_joined(mine, group), theirs, weight)

    def _causal(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scaling, enable_gqa=True)

    def _sdpa(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, mask, scale=self.scaling, enable_gqa=True)

    def _staircase(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output ``[B, H, Q, D]`` and log-sum-exp ``[B, H, Q]``; both lie in memory with Q before H."""
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=self.scaling
        )
        return output, lse


def _split(x: torch.Tensor, group: Group) -> torch.Tensor:
    """``[B, H, count · L, D]`` to ``[B · count, H, L, D]``; a view for one row."""
    if group.count == 1:
        return x
    rows, heads, _, size = x.shape
    return x.view(rows, heads, group.count, group.length, size).transpose(1, 2).flatten(0, 1)


def _joined(x: torch.Tensor, group: Group) -> torch.Tensor:
    """``[B · count, H, L, D]`` to ``[B, count · L, H, D]``; a view of what the kernel returns."""
    _, heads, length, size = x.shape
    return x.transpose(1, 2).reshape(-1, group.count * length, heads, size)


def _windows(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The ``window`` columns before each stretch, ``[B · count, G, window, D]``."""
    before = x[:, :, group.start - group.window : group.stop - group.length]
    return before.unfold(2, group.window, group.length).transpose(3, 4).transpose(1, 2).flatten(0, 1)


def _repeat(x: torch.Tensor, group: Group) -> torch.Tensor:
    """What all stretches see, ``[B, G, K, D]``, once for each: ``[B · count, G, K, D]``, a view."""
    return x.unsqueeze(1).expand(-1, group.count, -1, -1, -1).flatten(0, 1)
