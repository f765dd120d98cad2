"""Who sees whom as a ``BlockMask`` for flex_attention, straight from stretches: all of it, or what some groups are of it.

Shapes: P prompts, B rows, Q queries, K keys, W columns, N nodes. ``True`` may attend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask

from leattn.attention.request import Request
from leattn.dag.reading import Reading
from leattn.prompt import masks
from leattn.prompt.stretch import Stretch
from leattn.prompt.visible import Readings, Run

BLOCK = 128

Label: TypeAlias = tuple[Reading, int]
"""A reading, and which of the groups that one reader reads so."""
GroupMod: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""As ``(b, q_idx, kv_idx)`` → the number of the group that a query reads a key in, 0 where it is in none."""


def labelled(readings: Readings) -> Iterator[tuple[tuple[Run, ...], Label]]:
    """The groups of one reader; two that are read alike have a sum each."""
    counts: Counter[Reading] = Counter()
    for runs, reading in readings:
        yield runs, (reading, counts[reading])
        counts[reading] += 1


class Groups:
    """The groups that the queries of a request read, each with its ``numbers`` from 1 on.

    Nothing is of size Q × K: every column has its node and the kind of reader that it is, and a table says for a kind and a
    node in which group that is.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.spans: dict[Label, range] = {}
        """From the first to the last of its readers."""
        for stretches in request.columns.stretches(request.queries):
            for stretch in stretches:
                for _, label in labelled(stretch.readings):
                    old = self.spans.get(label, range(stretch.start, stretch.stop))
                    self.spans[label] = range(min(old.start, stretch.start), max(old.stop, stretch.stop))
        self.numbers = {label: i + 1 for i, label in enumerate(self.spans)}

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """The node of each column ``[P, W]``, its kind ``[P, W]``, and groups ``[P, kinds, N + 1]``; kind 0 reads none."""
        columns, width = self.request.columns, max(self.request.keys, self.request.queries.stop) + 1
        nodes = max(len(row.visible) for row in columns.rows) + 1
        kinds = [dict.fromkeys(row.visible.readings.values()) for row in columns.rows]
        node_of = np.stack([row.nodes(width) for row in columns.rows])
        kind_of = np.zeros((len(columns.rows), nodes), np.int32)
        groups = np.zeros((len(columns.rows), 1 + max(map(len, kinds)), nodes), np.int32)
        for p, row in enumerate(columns.rows):
            number = {readings: i + 1 for i, readings in enumerate(kinds[p])}
            for node, readings in row.visible.readings.items():
                kind_of[p, node] = number[readings]
            for readings, kind in number.items():
                for runs, label in labelled(readings):
                    for first, last in runs:
                        groups[p, kind, first:last] = self.numbers.get(label, 0)
        found = (node_of, np.take_along_axis(kind_of, node_of, 1), groups)
        of_nodes, of_kinds, table = (torch.from_numpy(each).to(self.request.device) for each in found)
        return of_nodes, of_kinds, table

    def group_mod(self, first: int) -> GroupMod:
        """``q_idx`` counts from column ``first``."""
        node_of, kind_of, groups = self._tables
        repeats, last = self.request.repeats, node_of.shape[1] - 1

        def group_of(b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            row = b // repeats
            q, k = (q_idx + first).clamp(max=last), kv_idx.clamp(max=last)
            return groups[row, kind_of[row, q], node_of[row, k]]

        return group_of


@dataclass(frozen=True, eq=False)
class Part:
    """Of what is seen, what is in some groups; or else, as the ``rest``, what is in none of them."""

    groups: Groups
    labels: frozenset[Label]
    rest: bool = False

    def mask_mod(self, queries: range) -> masks.MaskMod:
        """Which pairs are of this part."""
        held = torch.full((len(self.groups.numbers) + 1,), self.rest)
        held[[self.groups.numbers[label] for label in self.labels]] = not self.rest
        held, group_of = held.to(self.groups.request.device), self.groups.group_mod(queries.start)

        def of_part(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            del h
            return held[group_of(b, q_idx, kv_idx)]

        return of_part

    def counts(self, stretches: Sequence[Stretch], queries: range, keys: int) -> masks.IntArray:
        """Seen pairs of this part in each block."""
        read = [
            Stretch(stretch.start, stretch.stop, runs)
            for stretch in stretches
            for runs, label in labelled(stretch.readings)
            if label in self.labels
        ]
        grouped = masks.block_counts(read, queries, keys, BLOCK, own=False)
        return masks.block_counts(stretches, queries, keys, BLOCK) - grouped if self.rest else grouped


def block_mask(request: Request, part: Part | None = None) -> BlockMask:
    """``[B, 1 or H, Q blocks, K blocks]``; blocks that nobody sees are skipped."""
    queries, keys, columns = request.queries, request.keys, request.columns
    of_part = None if part is None else part.mask_mod(queries)
    if request.user is not None:
        return _of_dense(request.allowed(), of_part)
    mask_mod = masks.column_mask_mod(columns, queries, keys, repeats=request.repeats, window=request.window)
    found = [
        masks.block_counts(each, queries, keys, BLOCK) if part is None else part.counts(each, queries, keys)
        for each in columns.stretches(queries)
    ]
    counts = torch.from_numpy(np.stack(found)).repeat_interleave(request.repeats, 0).to(request.device)
    full = counts == BLOCK * BLOCK
    if request.window is not None:
        counts, full = _windowed(request, counts, full)
    if request.padding is not None:
        mask_mod, full = _and_padding(mask_mod, request), torch.zeros_like(full)
    if of_part is not None:
        mask_mod = and_masks(mask_mod, of_part)
    return masks.block_mask_from_counts(counts, (len(queries), keys), BLOCK, mask_mod, full)


def _of_dense(allowed: Tensor, of_part: masks.MaskMod | None) -> BlockMask:
    """A mask ``[B, 1 or H, Q, K]`` bool as blocks, or a part of it."""
    rows, heads, length, keys = allowed.shape

    def given_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return allowed[b, h if heads > 1 else h * 0, q_idx, kv_idx]

    mask_mod = given_mask if of_part is None else and_masks(given_mask, of_part)
    return create_block_mask(mask_mod, rows, heads if heads > 1 else None, length, keys, allowed.device)


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
