"""Transformers' own flex_attention, with a ``BlockMask`` straight from stretches.

On a CPU, torch 2.13 fails to compile flex for many padded or odd shapes; ``torch.compiler.set_stance("force_eager")`` around
the call runs it uncompiled, slowly. There is no backward on a CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from leattn.attention.request import Backend, Request, UnderMask
from leattn.model.record import Model
from leattn.prompt import masks

BLOCK = 128


def _flex(request: Request) -> UnderMask:
    """Under ``[B, 1 or H, Q blocks, K blocks]``; blocks that nobody sees are skipped."""
    queries, keys, columns = request.queries, request.keys, request.columns
    if request.user is not None:
        return UnderMask("flex_attention", _of_dense(request.allowed()))
    mask_mod = masks.column_mask_mod(columns, queries, keys, repeats=request.repeats, window=request.window)
    stretches = columns.stretches(queries)
    counts = torch.from_numpy(np.stack([masks.block_counts(those, queries, keys, BLOCK) for those in stretches]))
    counts = counts.repeat_interleave(request.repeats, 0).to(request.device)
    full = counts == BLOCK * BLOCK
    if request.window is not None:
        counts, full = _windowed(request, counts, full)
    if request.padding is not None:
        mask_mod, full = _and_padding(mask_mod, request), torch.zeros_like(full)
    return UnderMask("flex_attention", masks.block_mask_from_counts(counts, (len(queries), keys), BLOCK, mask_mod, full))


def _refusal(record: Model) -> str | None:
    if record.facts.learned_sinks and record.device.type == "cpu":
        return "transformers has no attention sinks for flex_attention on a CPU; use backend='eager'"
    if not record.facts.supports_flex:
        return f"transformers does not run {record.facts.family} through flex_attention; use backend='eager'"
    return None


def _of_dense(allowed: Tensor) -> BlockMask:
    """A mask ``[B, 1 or H, Q, K]`` bool as blocks."""
    rows, heads, length, keys = allowed.shape

    def given_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return allowed[b, h if heads > 1 else h * 0, q_idx, kv_idx]

    return create_block_mask(given_mask, rows, heads if heads > 1 else None, length, keys, allowed.device)


def _windowed(request: Request, counts: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the blocks that lie wholly outside the window, and call full only those wholly inside it."""
    assert request.window is not None
    query_low, query_high = _block_range(request, request.queries)
    key_low, key_high = _block_range(request, range(request.keys))
    reaches = query_low[:, :, None] - key_high[:, None] < request.window
    inside = query_high[:, :, None] - key_low[:, None] < request.window
    return counts * reaches, full & inside


def _block_range(request: Request, columns: range) -> tuple[Tensor, Tensor]:
    """The smallest and largest position in each block of columns, ``[B, blocks]`` each."""
    positions = request.columns.positions(columns).repeat_interleave(request.repeats, 0).to(request.device)
    short = -positions.shape[1] % BLOCK
    beyond = 2**60  # further than any position
    low, high = (torch.nn.functional.pad(positions, (0, short), value=value) for value in (beyond, -beyond))
    shape = (len(positions), -1, BLOCK)  # [B, blocks, BLOCK]
    return low.view(shape).amin(-1), high.view(shape).amax(-1)


def _and_padding(mask_mod: masks.MaskMod, request: Request) -> masks.MaskMod:
    visible, offset = request.visible_keys(), request.queries.start

    def padded_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx, kv_idx) & (visible[b, kv_idx] | (kv_idx == q_idx + offset))

    return padded_mask


FLEX = Backend("flex", _flex, _refusal, "flex_attention", ("mask", "padding"))
