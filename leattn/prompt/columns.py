"""Which columns see which: prompts side by side, padded on the left, or one sequence that grows as its tokens are computed.

A column holds one token of one node. *Stretches* are the only form of the mask: dense rows, block counts, plans of the sparse
backend are all made of them. Columns of no node (padding, tokens that were thrown away) see themselves, and nobody sees them.

Shapes: P rows, Q queries, K keys, S columns of the prompts, N nodes. ``True`` may attend.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from leattn.dag.reading import Reading
from leattn.errors import BackendError
from leattn.prompt.stretch import Stretch, clipped, columns_in, fill, fused
from leattn.prompt.visible import Readings, Run, Visible, merge

if TYPE_CHECKING:
    from leattn.prompt.compiled import CompiledPrompt


class Row:
    """One sequence of columns: nodes laid out side by side, and after them what comes token by token.

    Parameters
    ----------
    visible
        Which nodes each node sees.
    offsets
        Node i is laid out in the columns ``offsets[i]`` to ``offsets[i + 1]``; before the first of them there is padding. The
        other nodes of ``visible`` are appended as they are computed, in any order in which what a node sees is there before it.
    positions
        Of the columns laid out, ``[offsets[-1]]``; 0 for padding.
    continuation
        The node that columns past the last belong to: what is generated after a prompt. None where every column is appended.
    ids
        The tokens laid out, ``[offsets[-1] - offsets[0]]``, where they are known beforehand.
    """

    def __init__(
        self,
        visible: Visible,
        offsets: Sequence[int] = (0,),
        positions: npt.NDArray[Any] | None = None,
        continuation: int | None = None,
        ids: Tensor | None = None,
    ) -> None:
        self.visible, self.offsets, self.continuation, self.ids = visible, offsets, continuation, ids
        self.length = offsets[-1]
        self._positions: npt.NDArray[Any] = np.zeros(0, np.int64) if positions is None else positions
        self._pieces: list[tuple[int, int, int]] = []  # start, stop, node: what was appended, in order of columns
        self._runs: dict[int, list[Run]] = {}  # the columns of appended nodes
        self._seen: dict[int, tuple[Run, ...]] = {}
        self._readings: dict[int, Readings] = {}

    @property
    def padding(self) -> int:
        """Columns before the first node."""
        return self.offsets[0]

    def append(self, node: int, positions: npt.NDArray[Any]) -> None:
        """Columns for the next tokens of a node, which stand at these positions, ``[n]``."""
        stop = self.length + len(positions)
        if stop > len(self._positions):
            self._positions = np.resize(self._positions, max(1024, 2 * stop))
        self._positions = self._positions.astype(np.result_type(self._positions, positions), copy=False)
        self._positions[self.length : stop] = positions
        self._pieces.append((self.length, stop, node))
        runs = self._runs.setdefault(node, [])
        if runs and runs[-1][1] == self.length:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((self.length, stop))
        self.length = stop

    def forget(self, node: int, count: int) -> None:
        """Nobody sees the last ``count`` tokens of an appended node any more."""
        runs = self._runs[node]
        while count:
            start, stop = runs.pop()
            if stop - start > count:
                runs.append((start, stop - count))
            count -= min(count, stop - start)

    def columns_of(self, node: int) -> npt.NDArray[np.int64]:
        """The columns that hold an appended node's tokens, ``[n]``."""
        return columns_in(self._runs.get(node, ()))

    def keep(self, nodes: Collection[int]) -> npt.NDArray[np.int64]:
        """Drop the columns of all other appended nodes; those that stay, ``[n]`` ascending, as they were numbered before."""
        pieces = sorted((start, stop, node) for node in nodes for start, stop in self._runs.get(node, ()))
        columns = columns_in([(start, stop) for start, stop, _ in pieces])
        positions = self._positions[columns]
        self._pieces, self._runs, self._seen, self._readings, self.length = [], {}, {}, {}, 0
        for start, stop, node in pieces:
            self.append(node, positions[self.length : self.length + stop - start])
        return columns

    def positions(self, columns: range) -> npt.NDArray[Any]:
        """Positions of some columns; generated ones count on."""
        held = self._positions[columns.start : min(columns.stop, self.length)]
        new = range(max(columns.start, self.length), columns.stop)
        if not len(new):
            return held
        return np.concatenate([held, np.arange(new.start, new.stop) + (self._positions[self.length - 1] + 1 - self.length)])

    def seen(self, node: int) -> tuple[Run, ...]:
        """The columns that a node sees whole. They stay the same from its first token on."""
        if node not in self._seen:
            self._seen[node] = self._columns(self.visible.runs[node])
        return self._seen[node]

    def readings(self, node: int) -> Readings:
        """The groups of columns that a node reads in another way. They, too, stay the same from its first token on."""
        if node not in self.visible.readings:
            return ()
        if node not in self._readings:
            self._readings[node] = tuple((self._columns(runs), how) for runs, how in self.visible.readings[node])
        return self._readings[node]

    def _columns(self, nodes: Sequence[Run]) -> tuple[Run, ...]:
        """The columns of some nodes."""
        laid_out = len(self.offsets) - 1
        runs: list[Run] = []
        for first, last in nodes:
            if first < laid_out:
                runs.append((self.offsets[first], self.offsets[min(last, laid_out)]))
            for other in range(max(first, laid_out), last):
                runs += self._runs.get(other, ())
        return merge(runs)

    def stretches(self, queries: range) -> list[Stretch]:
        """Some columns as stretches that see the same keys, in order; columns of no node are in none of them."""
        found = clipped(self._laid_out, queries)
        if queries.stop > self.offsets[-1]:
            later = range(max(queries.start, self.offsets[-1]), queries.stop)
            found[-1:] = fused([*found[-1:], *self._appended(later)])
        return found

    @cached_property
    def _laid_out(self) -> list[Stretch]:
        parts: list[Stretch] = []
        last_runs: tuple[Run, ...] | None = None
        for i in range(len(self.offsets) - 1):
            runs = self.visible.runs[i]
            if runs is not last_runs:  # siblings share what they see
                last_runs, seen = runs, merge([(self.offsets[a], self.offsets[b]) for a, b in runs])
            parts.append(Stretch(self.offsets[i], self.offsets[i + 1], seen, self.readings(i)))
        return fused(parts)

    def _appended(self, queries: range) -> Iterator[Stretch]:
        first = max(0, bisect_right(self._pieces, queries.start, key=lambda piece: piece[0]) - 1)
        pieces = self._pieces[first:]
        if self.continuation is not None:
            pieces = [(self.length, queries.stop, self.continuation)]
        for start, stop, node in pieces:
            begin, end = max(start, queries.start), min(stop, queries.stop)
            if begin < end:
                earlier = [(a, min(b, begin)) for a, b in self._runs.get(node, [(start, stop)]) if a < begin]
                seen = merge([*self.seen(node), *earlier]) if earlier else self.seen(node)
                yield Stretch(begin, end, seen, self.readings(node))

    def nodes(self, width: int) -> npt.NDArray[np.int64]:
        """The node of each of ``width`` columns, ``[width]``; N where it is none's."""
        return self.tokens(range(width))[0]

    def tokens(self, columns: range) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The node of each of some columns, N where it is none's, and which of its tokens stands there; ``[n]`` each."""
        first, last = columns.start, columns.stop
        at = np.arange(first, last)
        nodes = np.full(len(at), len(self.visible), np.int64)
        indices = np.zeros(len(at), np.int64)
        offsets = np.asarray(self.offsets)
        held = (at >= offsets[0]) & (at < offsets[-1])
        nodes[held] = np.searchsorted(offsets, at[held], side="right") - 1
        indices[held] = at[held] - offsets[nodes[held]]
        if self.continuation is not None:
            new = at >= self.length
            nodes[new], indices[new] = self.continuation, at[new] - self.length
        for node, runs in self._runs.items():
            before = 0
            for start, stop in runs:
                if start < last and stop > first:
                    here = slice(max(start, first) - first, min(stop, last) - first)
                    nodes[here], indices[here] = node, before + at[here] - start
                before += stop - start
        return nodes, indices


class Columns:
    """Rows side by side on one device: P prompts as one left-padded batch, or a single row that grows.

    Attributes
    ----------
    input_ids, attention_mask : LongTensor
        ``[P, S]``, what to give the model for prompts. Padding holds id 0 and mask 0.
    width : int
        S, the columns of the longest prompt.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self.rows, self.device = tuple(rows), device
        self.width = max(row.offsets[-1] for row in rows)
        self.input_ids = torch.zeros(len(rows), self.width, dtype=torch.long, device=device)
        self.attention_mask = torch.zeros_like(self.input_ids)
        for i, row in enumerate(rows):
            if row.ids is not None:
                self.input_ids[i, row.padding :] = row.ids.to(device)
                self.attention_mask[i, row.padding :] = 1

    @cached_property
    def padding(self) -> tuple[int, ...]:
        """Columns of padding before each prompt."""
        return tuple(row.padding for row in self.rows)

    @cached_property
    def is_plain(self) -> bool:
        """Whether this is what the model would do anyway: causal, unpadded, positions that count by one."""
        return self.width > 0 and not any(self.padding) and all(map(_is_plain, self.rows))

    @cached_property
    def readings(self) -> tuple[Reading, ...]:
        """All ways in which something is read otherwise than as it is, each once."""
        groups = (group for row in self.rows for groups in row.visible.readings.values() for group in groups)
        return tuple(dict.fromkeys(reading for _, reading in groups))

    @property
    def are_whole(self) -> bool:
        """Whether all positions are whole numbers."""
        return all(row.positions(range(row.length)).dtype.kind == "i" for row in self.rows)

    @cached_property
    def seen_bits(self) -> Tensor:
        """One bit per pair of nodes, ``[P, N, ceil(N / 32)]`` int32: row i has those that node i sees, lowest bit first."""
        nodes = max(len(row.visible) for row in self.rows) + 1
        bits = np.zeros((len(self.rows), nodes, -(-nodes // 32)), np.int32)
        for packed, row in zip(bits, self.rows, strict=True):
            packed[: len(row.visible)] = row.visible.packed(nodes)
        return torch.from_numpy(bits).to(self.device)

    def repeats(self, rows: int) -> int:
        """How many rows of a model's input (beams, return sequences) each row has.

        Raises
        ------
        BackendError
            Rows in unequal numbers.
        """
        if rows % len(self.rows):
            raise BackendError(
                f"the model was called with {rows} rows for {len(self.rows)} prompts; rows come in equal numbers per prompt"
            )
        return rows // len(self.rows)

    def positions(self, columns: range) -> Tensor:
        """Positions of some columns, ``[P, n]``: whole numbers, or float64."""
        return torch.from_numpy(np.stack([row.positions(columns) for row in self.rows])).to(self.device)

    def position_ids(self, columns: range) -> Tensor:
        """Positions of some columns as a model takes them, ``[P, n]``: whole numbers, or float32."""
        positions = self.positions(columns)
        return positions.float() if positions.is_floating_point() else positions

    def stretches(self, queries: range) -> list[list[Stretch]]:
        """Those of each row."""
        return [row.stretches(queries) for row in self.rows]

    def most_seen(self, queries: range) -> int:
        """How many columns one of these queries sees at most, its own among them."""
        every = [stretch for stretches in self.stretches(queries) for stretch in stretches]
        return max((each.stop - each.start + sum(stop - start for start, stop in each.seen) for each in every), default=1)

    def dense(self, queries: range, keys: int, window: int | None = None) -> Tensor:
        """Who may attend, ``[P, Q, K]`` bool. Windows are measured in positions, ``pos_q − pos_k < window``."""
        mask = torch.zeros(len(self.rows), len(queries), keys, dtype=torch.bool)
        for row, stretches in zip(mask, self.stretches(queries), strict=True):
            fill(row, stretches, queries.start)
        mask = mask.to(self.device)
        return mask if window is None else mask & self.within(queries, keys, window)

    def within(self, queries: range, keys: int, window: int) -> Tensor:
        """Whether a key is nearer than ``window``, ``[P, Q, K]``; keys at later positions always are."""
        return self.positions(queries)[:, :, None] - self.positions(range(keys))[:, None] < window


def _is_plain(row: Row) -> bool:
    return row.visible.is_causal and bool((np.diff(row.positions(range(row.length))) == 1).all())


def columns_of(prompts: Sequence[CompiledPrompt], device: torch.device) -> Columns:
    """Prompts as one batch on a device, shorter ones padded on the left.

    What is generated after each is one more node, which sees its last one and what that sees.
    """
    width = max(len(prompt) for prompt in prompts)
    rows = []
    for prompt in prompts:
        padding = width - len(prompt)
        positions = np.pad(prompt.position_ids[0].cpu().numpy(), (padding, 0))
        offsets = [padding + offset for offset in prompt.offsets] if padding else prompt.offsets
        rows.append(Row(prompt.visible.continued(), offsets, positions, len(prompt.graph), prompt.input_ids[0]))
    return Columns(rows, device)
