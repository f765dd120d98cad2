"""Attention weights of one layer, recomputed from queries and keys in tiles and folded to nodes. Knows no model.

Shapes: H heads, G key/value heads, S tokens, N nodes, T queries of a tile, C keys that some query of the tile sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from leattn.attention.reading import read_scores, scaled_scores
from leattn.dag.reading import Reading
from leattn.prompt.columns import Columns

WHOLE = 512
"""Up to this many tokens, a side of a pair of nodes is kept token by token."""


@dataclass(frozen=True)
class RowReading:
    """Queries that read some columns ``[n]`` in another way than as they are.

    ``moved`` ``[H, q, D]`` are those queries as they meet columns that are read elsewhere, and ``visible`` ``[q, n]`` what a
    window leaves of them there; None where that changes nothing.
    """

    queries: range
    columns: torch.Tensor
    reading: Reading
    moved: torch.Tensor | None = None
    visible: torch.Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """What the attention of a layer is computed from, for one prompt.

    Attributes
    ----------
    query, key : Tensor
        ``[H, S, D]`` and ``[G, S, D]``, as they meet: rotated, normalised.
    scaling, softcap
        Of the scores; no soft-cap is None.
    added : Tensor or None
        What an intervention adds to the scores, ``[1 or H, S, S]``.
    sinks : Tensor or None
        A learned score per head that takes part in the softmax and is no token (gpt_oss), ``[H]``.
    readings
        Groups that some queries read in another way than as they are.
    """

    query: torch.Tensor
    key: torch.Tensor
    scaling: float
    softcap: float | None
    added: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    readings: Sequence[RowReading] = ()

    def raw(self, queries: slice, keys: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Scores of some queries and the keys ``[C]`` before the softmax, ``[H, T, C]``; −inf unless ``visible`` ``[T, C]``."""
        exact = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        query, key = self.query[:, queries].to(exact), self.key[:, keys].to(exact)
        scores = scaled_scores(query[None], key[None], self.scaling, self.softcap)[0]
        added = 0.0 if self.added is None else self.added[:, queries][..., keys].to(exact)
        scores += added
        scores.masked_fill_(~visible, -torch.inf)
        for one in self.readings:
            low, high = max(one.queries.start, queries.start), min(one.queries.stop, queries.stop)
            at = torch.isin(keys, one.columns).nonzero()[:, 0]
            if low >= high or not len(at):
                continue
            rows = slice(low - queries.start, high - queries.start)
            part = scores[:, rows][..., at]
            if one.moved is not None:
                moved = one.moved[:, low - one.queries.start : high - one.queries.start].to(exact)
                part = scaled_scores(moved[None], key[None, :, at], self.scaling, self.softcap)[0]
                part += added if isinstance(added, float) else added[:, rows][..., at]
            of_rows = scores[:, rows]  # a view
            of_rows[..., at] = read_scores(part, visible[rows][:, at], one.reading)
        return scores

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        """Attention of some queries: :meth:`raw` after the softmax."""
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.to(scores)[:, None, None].expand(-1, scores.shape[1], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


@dataclass(frozen=True)
class Pair:
    """The tokens of a query node and of a key node, whose weights are kept one by one, or as maxima of tiles of them."""

    query: range
    key: range

    @property
    def pool(self) -> tuple[int, int]:
        """Query and key tokens per cell: 1 up to :data:`WHOLE` of them."""
        return -(-len(self.query) // WHOLE), -(-len(self.key) // WHOLE)

    @property
    def shape(self) -> tuple[int, int]:
        return -(-len(self.query) // self.pool[0]), -(-len(self.key) // self.pool[1])


@dataclass(frozen=True)
class Folded:
    """One layer: ``mass`` ``[H, N, N]``, ``first_tokens`` ``[H, N]`` (see :class:`Trace`), ``pairs`` ``[H, Q, K]`` each.

    ``scores`` are as large as the pairs that they were asked for.
    """

    mass: torch.Tensor
    first_tokens: torch.Tensor
    pairs: tuple[torch.Tensor, ...]
    scores: tuple[torch.Tensor, ...]


def fold(
    scores: Scores,
    offsets: Sequence[int],
    prompt_columns: Columns,
    *,
    window: int | None,
    pairs: Sequence[Pair] = (),
    scored: Sequence[Pair] = (),
    tile_bytes: int,
) -> Folded:
    """Go over the queries in tiles of at most ``tile_bytes`` of weights (at least one query) and sum them up by node.

    Parameters
    ----------
    scores
        Of one layer, on the device where everything is computed.
    offsets
        Node i holds the tokens ``offsets[i]`` to ``offsets[i + 1]``.
    prompt_columns
        Who sees whom, on the same device; one prompt without padding.
    window
        Of the layer, in positions.
    pairs, scored
        Whose weights, and whose scores before the softmax, are kept by token.
    """
    heads, length, _ = scores.query.shape
    device, nodes = scores.query.device, len(offsets) - 1
    exact = torch.float64 if scores.query.dtype == torch.float64 else torch.float32
    bounds = torch.tensor(offsets, device=device)
    node_of = torch.repeat_interleave(torch.arange(nodes, device=device), bounds.diff())
    is_first = torch.zeros(length, dtype=torch.bool, device=device)
    is_first[bounds[:-1]] = True
    mass = torch.zeros(nodes, nodes, heads, dtype=exact, device=device)  # key node, query node, head
    given = torch.zeros(heads, nodes, dtype=exact, device=device)
    seen_by = torch.zeros(nodes, dtype=exact, device=device)
    kept = tuple(torch.zeros(heads, *pair.shape, dtype=exact, device=device) for pair in pairs)
    raw = tuple(torch.full((heads, *pair.shape), -torch.inf, dtype=exact, device=device) for pair in scored)

    step = max(1, tile_bytes // (heads * length * 4))
    for start in range(0, length, step):
        stop = min(start + step, length)
        queries = torch.arange(start, stop, device=device)
        # The layout is topological: nobody sees a later token.
        visible = prompt_columns.dense(range(start, stop), stop, window)[0].to(device)
        for one in scores.readings:
            low, high = max(one.queries.start, start), min(one.queries.stop, stop)
            if one.visible is not None and low < high:
                rows = visible[low - start : high - start]  # a view
                rows[:, one.columns] = one.visible[low - one.queries.start : high - one.queries.start]
        columns = visible.any(0).nonzero()[:, 0]
        visible = visible[:, columns]
        tile = scores.raw(slice(start, stop), columns, visible)
        for pair, into in zip(scored, raw, strict=True):
            _keep(pair, into, tile, range(start, stop), columns)
        weights = scores.weights(tile)

        # Queries first: neighbours in memory, and far fewer rows are left for the keys.
        present, lengths = torch.unique_consecutive(node_of[start:stop], return_counts=True)
        by_query = torch.stack([part.sum(1) for part in torch.split(weights, lengths.tolist(), 1)], 1)  # [H, n, C]
        rows = torch.zeros(nodes, len(present), heads, dtype=exact, device=device)
        rows.index_add_(0, node_of[columns], by_query.permute(2, 1, 0).contiguous())
        mass[:, present] += rows

        at = is_first[columns].nonzero()[:, 0]
        others = visible[:, at] & (queries[:, None] != columns[at])
        given[:, node_of[columns[at]]] += (weights[..., at] * others).sum(1)
        seen_by[node_of[columns[at]]] += others.sum(0)
        for pair, into in zip(pairs, kept, strict=True):
            _keep(pair, into, weights, range(start, stop), columns)

    mass.div_(bounds.diff()[:, None])
    return Folded(mass.permute(2, 1, 0), given / torch.where(seen_by > 0, seen_by, torch.nan), kept, raw)


def _keep(pair: Pair, into: torch.Tensor, tile: torch.Tensor, queries: range, columns: torch.Tensor) -> None:
    """Take what a tile has of a pair of nodes: the maximum in each cell of ``into`` ``[H, Q, K]``."""
    low, high = max(pair.query.start, queries.start), min(pair.query.stop, queries.stop)
    if low >= high:
        return
    at = ((columns >= pair.key.start) & (columns < pair.key.stop)).nonzero()[:, 0]
    part = tile[:, low - queries.start : high - queries.start][..., at]
    cells = part.new_full((*part.shape[:2], pair.shape[1]), -torch.inf)
    cell = (columns[at] - pair.key.start) // pair.pool[1]
    cells.scatter_reduce_(2, cell.expand_as(part), part, "amax")
    row = (torch.arange(low, high, device=part.device) - pair.query.start) // pair.pool[0]
    into.scatter_reduce_(1, row[:, None].expand_as(cells), cells, "amax")
