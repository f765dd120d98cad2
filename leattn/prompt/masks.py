"""Masks made of columns: additive, ``mask_mod``, block counts and ``BlockMask``.

Shapes: P rows, B rows of a model's input (a multiple of P), Q queries, K keys, N nodes. ``True`` may attend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from leattn.prompt.columns import Columns
from leattn.prompt.stretch import Stretch

MaskMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
IntArray: TypeAlias = npt.NDArray[np.int64]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``mask`` is true and the smallest number of ``dtype`` elsewhere: what eager attention adds to its scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def column_mask_mod(columns: Columns, queries: range, keys: int, *, repeats: int = 1, window: int | None = None) -> MaskMod:
    """Who sees whom as a function ``(b, h, q_idx, kv_idx)`` for flex_attention.

    Its state lives in tensors: the node of each column, and one bit per pair of nodes. ``q_idx`` counts from the first of
    ``queries``; ``repeats`` rows of the input belong to each row of the columns.
    """
    width = max(keys, queries.stop) + 1
    node_of = torch.from_numpy(np.stack([row.nodes(width) for row in columns.rows])).to(columns.device)  # [P, width]
    seen = columns.seen_bits
    nobody = torch.tensor([len(row.visible) for row in columns.rows], device=columns.device)
    positions = columns.positions(range(width))
    first, last = queries.start, width - 1

    def dag_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        row = b // repeats
        q, k = (q_idx + first).clamp(max=last), kv_idx.clamp(max=last)
        q_node, k_node = node_of[row, q], node_of[row, k]
        sees = ((seen[row, q_node, k_node >> 5] >> (k_node & 31)) & 1) == 1
        own = (q_node == k_node) & (q_node != nobody[row]) & (kv_idx <= q_idx + first)
        allowed = sees | own | (kv_idx == q_idx + first)
        if window is not None:
            allowed = allowed & (positions[row, q] - positions[row, k] < window)
        return allowed

    return dag_mask


def block_counts(stretches: Sequence[Stretch], queries: range, keys: int, block: int, *, own: bool = True) -> IntArray:
    """Allowed pairs in each block of ``block`` queries × ``block`` keys, ``[ceil(Q / block), ceil(K / block)]``.

    Not ``own``: of what stretches see whole only, without themselves; then one may stand there several times.

    Each interval that a stretch sees adds a trapezoid to the running count along the keys, so its second difference has four
    entries and nothing depends on how many keys it covers.
    """
    low, high = queries.start, queries.stop
    height, width = -(-(high - low) // block), -(-keys // block)
    first = np.array([stretch.start for stretch in stretches], np.int64)
    last = np.array([stretch.stop for stretch in stretches], np.int64)
    seen = [stretch.seen for stretch in stretches]
    runs_of = np.fromiter(map(len, seen), np.int64, len(seen))
    bounds = np.array([bound for runs in seen for run in runs for bound in run], np.int64).reshape(-1, 2)

    # Rectangles: the part of a stretch in one block row × one interval of what it sees.
    block_first = (first - low) // block
    pieces = (last - 1 - low) // block - block_first + 1
    stretch = np.repeat(np.arange(len(stretches)), pieces)
    row = np.repeat(block_first, pieces) + _ranks(pieces)
    rows = np.minimum(last[stretch], low + (row + 1) * block) - np.maximum(first[stretch], low + row * block)
    repeats = runs_of[stretch]
    run = np.repeat((np.cumsum(runs_of) - runs_of)[stretch], repeats) + _ranks(repeats)
    rectangles = (np.repeat(row, repeats), np.repeat(rows, repeats), bounds[run, 0], bounds[run, 1])

    # Triangles on the diagonal, one row of tokens at a time: a token sees its stretch up to itself, and itself in any case.
    token = np.arange(low, high, dtype=np.int64)
    own_start = token.copy()
    of_stretches = np.repeat(first, last - first) + _ranks(last - first)
    own_start[of_stretches - low] = np.repeat(first, last - first)
    triangles = ((token - low) // block, np.ones_like(token), own_start, token + 1)

    steps = np.zeros(height * (width + 2), np.int64)
    for at_row, weight, start, stop in (rectangles, triangles) if own else (rectangles,):
        for at, sign in ((np.minimum(start, keys), 1), (np.minimum(stop, keys), -1)):
            inside = at % block
            cell = at_row * (width + 2) + at // block
            np.add.at(steps, cell, sign * weight * (block - inside))
            np.add.at(steps, cell + 1, sign * weight * inside)
    counts: IntArray = steps.reshape(height, width + 2).cumsum(1)[:, :width]
    return counts


def _ranks(counts: IntArray) -> IntArray:
    """0, 1, …, counts[0] − 1, 0, 1, …, counts[1] − 1, and so on."""
    starts = np.cumsum(counts) - counts
    return np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(starts, counts)


def block_mask_from_counts(
    counts: Tensor, lengths: tuple[int, int], block: int, mask_mod: MaskMod, full: Tensor | None = None
) -> BlockMask:
    """A ``BlockMask`` of ``[B, Q blocks, K blocks]`` counts. Blocks at an edge of the sequence are never called full."""
    is_full = counts == block * block if full is None else full
    partial = (counts > 0) & ~is_full
    (kv_num, kv), (full_kv_num, full_kv) = (_listed(blocks) for blocks in (partial, is_full))
    (q_num, q), (full_q_num, full_q) = (_listed(blocks.transpose(1, 2)) for blocks in (partial, is_full))
    # What BlockMask.from_kv_blocks does, without its sorting, which takes most of the time.
    return BlockMask(
        seq_lengths=lengths,
        kv_num_blocks=kv_num,
        kv_indices=kv,
        full_kv_num_blocks=full_kv_num,
        full_kv_indices=full_kv,
        q_num_blocks=q_num,
        q_indices=q,
        full_q_num_blocks=full_q_num,
        full_q_indices=full_q,
        BLOCK_SIZE=(block, block),
        mask_mod=mask_mod,
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row of ``[B, M, N]`` are set, ``[B, 1, M]``, and which, first in ``[B, 1, M, N]``; int32 both."""
    counts = blocks.sum(-1)
    b, row, column = blocks.nonzero(as_tuple=True)
    flat = counts.flatten()
    rank = torch.arange(len(column), device=blocks.device) - torch.repeat_interleave(flat.cumsum(0) - flat, flat)
    indices = torch.zeros(blocks.shape, dtype=torch.int32, device=blocks.device)
    indices[b, row, rank] = column.to(torch.int32)
    return counts[:, None].to(torch.int32), indices[:, None]
