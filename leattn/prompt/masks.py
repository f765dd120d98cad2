"""Masks from spans: dense, additive, ``mask_mod`` and ``BlockMask``, for one prompt or a left-padded batch.

Shapes: P prompts, B batch rows (B is a multiple of P), Q queries, K keys, S tokens, N nodes. ``True`` may attend.

A batch row holds padding, then the prompt, then what is generated. Beside its N nodes it has two more: node N is the
continuation, which sees the last node and what that one sees, and node N + 1 is padding, which sees itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention.flex_attention import BlockMask

from leattn.prompt.visible import Visible

MaskMod: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
IntArray: TypeAlias = npt.NDArray[np.int64]


def dense_mask(visible: Visible, offsets: Sequence[int]) -> torch.Tensor:
    """Boolean mask of one prompt, ``[S, S]``. Node i holds the tokens ``offsets[i]`` to ``offsets[i + 1]``."""
    total = offsets[-1]
    mask = torch.zeros(total, total, dtype=torch.bool)
    for i, runs in enumerate(visible.runs):
        start, end = offsets[i], offsets[i + 1]
        for a, b in runs:
            mask[start:end, offsets[a] : offsets[b]] = True
        mask[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    return mask


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where ``mask`` is true and the smallest number of ``dtype`` elsewhere: what eager attention adds to its scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def packed_rows(visible: Visible, width: int) -> torch.Tensor:
    """Row i holds one bit per node that node i sees: ``[N, ceil(width / 32)]`` int32, lowest bit first."""
    words = -(-width // 32)
    node, start, stop = visible.flat()
    packed = np.zeros((len(visible), words * 4), np.uint8)
    chunk = max(1, (1 << 21) // (words * 32 + 1))  # at most 2 MB of unpacked rows at a time
    first = np.searchsorted(node, np.arange(len(visible) + 1))
    for low in range(0, len(visible), chunk):
        high = min(low + chunk, len(visible))
        steps = np.zeros((high - low, words * 32 + 1), np.int8)
        part = slice(first[low], first[high])
        # Runs of one node never touch, so no cell is written twice.
        steps[node[part] - low, start[part]] = 1
        steps[node[part] - low, stop[part]] = -1
        packed[low:high] = np.packbits(steps[:, :-1].cumsum(1, dtype=np.int8).astype(bool), axis=1, bitorder="little")
    return torch.from_numpy(packed.view(np.int32))


@dataclass(frozen=True)
class MaskTable:
    """What each token of a batch may attend to, in memory linear in tokens plus one bit per pair of nodes.

    Attributes
    ----------
    node_of
        ``[P, S + 1]`` int64, the node of every column of the padded batch; the last column stands for all later ones.
    seen
        ``[P, N + 2, ceil((N + 2) / 32)]`` int32, one bit per pair of nodes.
    positions
        ``[P, S]`` int64; a padding column has 0.
    padding
        ``[P]``, columns of padding before each prompt.
    """

    node_of: torch.Tensor
    seen: torch.Tensor
    positions: torch.Tensor
    padding: tuple[int, ...]

    @classmethod
    def build(
        cls, visibles: Sequence[Visible], offsets: Sequence[Sequence[int]], positions: Sequence[torch.Tensor]
    ) -> MaskTable:
        """The table of prompts side by side, shorter ones padded on the left. ``positions[p]`` is ``[S_p]``."""
        columns = max(offset[-1] for offset in offsets)
        nodes = max(len(visible) for visible in visibles)
        node_of = torch.full((len(visibles), columns + 1), nodes + 1)
        seen = torch.zeros(len(visibles), nodes + 2, -(-(nodes + 2) // 32), dtype=torch.int32)
        table_positions = torch.zeros(len(visibles), columns, dtype=torch.long)
        for p, (visible, offset) in enumerate(zip(visibles, offsets, strict=True)):
            pad = columns - offset[-1]
            lengths = torch.as_tensor(offset[1:]) - torch.as_tensor(offset[:-1])
            node_of[p, pad:columns] = torch.repeat_interleave(torch.arange(len(visible)), lengths)
            node_of[p, columns] = nodes
            rows = packed_rows(visible.continued(), nodes + 2)
            seen[p, : len(visible)] = rows[:-1]
            seen[p, nodes] = rows[-1]
            table_positions[p, pad:] = positions[p]
        return cls(node_of, seen, table_positions, tuple(columns - offset[-1] for offset in offsets))

    def to(self, device: torch.device | str) -> MaskTable:
        return MaskTable(self.node_of.to(device), self.seen.to(device), self.positions.to(device), self.padding)

    @property
    def columns(self) -> int:
        """Tokens of the longest prompt, which is the width of the padded batch."""
        return self.positions.shape[1]

    def positions_at(self, start: int, length: int) -> torch.Tensor:
        """Positions of the columns ``start`` to ``start + length``, ``[P, length]``; generated tokens count on."""
        return self._positions(torch.arange(start, start + length, device=self.positions.device))

    def rows(self, queries: torch.Tensor, keys: int, *, window: int | None = None) -> torch.Tensor:
        """Boolean mask ``[P, Q, keys]`` of the query columns ``[Q]`` over the first ``keys`` columns."""
        key_index = torch.arange(keys, device=queries.device)
        causal = queries[:, None] >= key_index
        masks = []
        for p in range(len(self.padding)):
            query_nodes = self.node_of[p, queries.clamp(max=self.columns)]
            key_nodes = self.node_of[p, key_index.clamp(max=self.columns)]
            distinct, back = torch.unique(query_nodes, return_inverse=True)
            seen = _unpack(self.seen[p, distinct])  # [distinct, N + 2]
            own = query_nodes[:, None] == key_nodes
            mask = torch.where(own, causal, seen[back][:, key_nodes])
            if self.padding[p]:
                is_padding = (queries < self.padding[p])[:, None]
                mask = torch.where(is_padding, queries[:, None] == key_index, mask)
            masks.append(mask)
        mask = torch.stack(masks)
        return mask if window is None else mask & self._within(queries, key_index, window)

    def causal_continuation(self, queries: torch.Tensor, keys: int, *, window: int | None = None) -> torch.Tensor:
        """Where a mask that replaces the graph's leaves the choice open: all of the prompt, and causally what follows it."""
        key_index = torch.arange(keys, device=queries.device)
        mask = (key_index < self.columns) | (queries[:, None] >= key_index)
        padding = torch.tensor(self.padding, device=queries.device)[:, None, None]
        mask = mask & (key_index >= padding) | (queries[:, None] == key_index)
        return mask if window is None else mask & self._within(queries, key_index, window)

    def _within(self, queries: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
        """Whether a key is nearer than ``window`` in positions, ``[P, Q, K]``; keys at later positions always are."""
        return self._positions(queries)[:, :, None] - self._positions(keys)[:, None] < window

    def _positions(self, index: torch.Tensor) -> torch.Tensor:
        return self.positions[:, index.clamp(max=self.columns - 1)] + (index - self.columns + 1).clamp(min=0)

    def mask_mod(self, *, rows_per_prompt: int = 1, query_offset: int = 0, window: int | None = None) -> MaskMod:
        """The same relation as a function of indices, for flex_attention. Its state lives in tensors."""
        node_of, seen, positions, last = self.node_of, self.seen, self.positions, self.columns
        padding = torch.tensor(self.padding, device=node_of.device)

        def dag_mask(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
            row = b // rows_per_prompt
            q = q_idx + query_offset
            q_node = node_of[row, q.clamp(max=last)]
            k_node = node_of[row, kv_idx.clamp(max=last)]
            sees = ((seen[row, q_node, k_node >> 5] >> (k_node & 31)) & 1) == 1
            own = (q_node == k_node) & (kv_idx <= q) & ((q >= padding[row]) | (kv_idx == q))
            allowed = sees | own
            if window is not None:
                q_position = positions[row, q.clamp(max=last - 1)] + (q - (last - 1)).clamp(min=0)
                k_position = positions[row, kv_idx.clamp(max=last - 1)] + (kv_idx - (last - 1)).clamp(min=0)
                allowed = allowed & (q_position - k_position < window)
            return allowed

        return dag_mask


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """``[…, W]`` int32 to ``[…, 32 W]`` bool, lowest bit first."""
    bits = torch.arange(32, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> bits) & 1).flatten(-2).bool()


def block_counts(visible: Visible, offsets: Sequence[int], queries: range, keys: int, block: int) -> IntArray:
    """Allowed pairs in each block of ``block`` queries × ``block`` keys, ``[ceil(Q / block), ceil(K / block)]``.

    Only the query columns in ``queries`` count, the first of them in the first row of the first block. Each visible
    interval adds a trapezoid to the running count along the keys, so its second difference has four entries and nothing
    depends on how many keys it covers.
    """
    bounds = np.asarray(offsets, np.int64)
    low, high = queries.start, queries.stop
    height, width = -(-(high - low) // block), -(-keys // block)

    # Rectangles: the part of a node in one block row × one run of what the node sees.
    first = np.maximum(bounds[:-1], low)
    last = np.minimum(bounds[1:], high)
    block_first = (first - low) // block
    pieces = np.where(last > first, (last - 1 - low) // block - block_first + 1, 0)
    piece_node = np.repeat(np.arange(len(visible)), pieces)
    piece_row = np.repeat(block_first, pieces) + _ranks(pieces)
    piece_rows = np.minimum(last[piece_node], low + (piece_row + 1) * block) - np.maximum(
        first[piece_node], low + piece_row * block
    )
    run_node, run_start, run_stop = visible.flat()
    runs_of = np.bincount(run_node, minlength=len(visible))
    run_first = np.concatenate([[0], np.cumsum(runs_of)[:-1]]).astype(np.int64)
    repeats = runs_of[piece_node]
    run = np.repeat(run_first[piece_node], repeats) + _ranks(repeats)
    rectangles = (np.repeat(piece_row, repeats), np.repeat(piece_rows, repeats), bounds[run_start[run]], bounds[run_stop[run]])

    # Triangles on the diagonal, one row of tokens at a time: a token sees its node up to itself.
    token = np.arange(low, min(high, int(bounds[-1])), dtype=np.int64)
    own_start = bounds[np.searchsorted(bounds, token, side="right") - 1]
    triangles = ((token - low) // block, np.ones_like(token), own_start, token + 1)

    steps = np.zeros(height * (width + 2), np.int64)
    for row, weight, start, stop in (rectangles, triangles):
        for at, sign in ((np.minimum(start, keys), 1), (np.minimum(stop, keys), -1)):
            inside = at % block
            cell = row * (width + 2) + at // block
            np.add.at(steps, cell, sign * weight * (block - inside))
            np.add.at(steps, cell + 1, sign * weight * inside)
    counts: IntArray = steps.reshape(height, width + 2).cumsum(1)[:, :width]
    return counts


def _ranks(counts: IntArray) -> IntArray:
    """0, 1, …, counts[0] − 1, 0, 1, …, counts[1] − 1, and so on."""
    starts = np.cumsum(counts) - counts
    return np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(starts, counts)


def block_mask_from_counts(
    counts: torch.Tensor, lengths: tuple[int, int], block: int, mask_mod: MaskMod, full: torch.Tensor | None = None
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


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of each row of ``[B, M, N]`` are set, ``[B, 1, M]``, and which, first in ``[B, 1, M, N]``; int32 both."""
    counts = blocks.sum(-1)
    b, row, column = blocks.nonzero(as_tuple=True)
    flat = counts.flatten()
    rank = torch.arange(len(column), device=blocks.device) - torch.repeat_interleave(flat.cumsum(0) - flat, flat)
    indices = torch.zeros(blocks.shape, dtype=torch.int32, device=blocks.device)
    indices[b, row, rank] = column.to(torch.int32)
    return counts[:, None].to(torch.int32), indices[:, None]
