"""One sequence on one model: what stands in its cache, what is missing, and the forwards that compute it.

``place`` what is wanted, ``run`` what is queued, or ask for ``logits`` of nodes: what a store has is loaded, the rest is
computed together, each token once. A program feeds its branches step by step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leattn.attention.attend import block_for, entered
from leattn.attention.block import Block, innermost
from leattn.attention.request import Backend
from leattn.attention.roots import warn_of
from leattn.attention.turning import check_real_positions
from leattn.dag.node import Position
from leattn.errors import BackendError, LeattnError
from leattn.generation.program import Program
from leattn.kv.certify import certificate
from leattn.kv.entry import NodeKV, node_kv
from leattn.kv.fingerprint import fingerprint, in_this_context
from leattn.kv.keys import node_key
from leattn.kv.rotary import shifted
from leattn.kv.store import KVStore
from leattn.model.cache import Arena
from leattn.model.record import Model
from leattn.prompt.columns import Columns, Row
from leattn.prompt.positions import Place, after_seen


@dataclass(frozen=True)
class Feed:
    """Some next tokens of a unit, and whether they are the last that it has for now."""

    unit: int
    ids: Sequence[int]
    is_last: bool


def is_intervened(record: Model) -> bool:
    """Whether an ``intervene`` block is around, in which a store is neither read nor written."""
    around = innermost(record)
    return around is not None and bool(around.operations)


@contextmanager
def session(
    model: Any, record: Model, program: Program, *, backend: str | Backend, kv_store: KVStore | None, room: int | None = None
) -> Iterator[Session]:
    """A model that follows a program, and a cache of ``room`` columns at first: enough for all that is known, if None.

    Inside ``intervene`` it does those operations, and has no store.

    Raises
    ------
    BackendError
        The model, or the backend, cannot follow a graph, or not with these operations.
    """
    if is_intervened(record):
        kv_store = None
    columns = Columns([Row(program.visible)], record.device)
    block = block_for(model, record, columns, backend)  # a model that follows no graph at all says so first
    if not program.is_whole:
        check_real_positions(model, record)
    beside = record.facts.cached_beside
    if beside is not None:
        which = "a program" if kv_store is None else "kv_store"
        raise BackendError(f"{which} cannot serve {type(model).__name__}: {beside}; generate from one sink, without kv_store")
    record.facts.check_token(*max((max(unit.ids, default=0), unit.name) for unit in program.units))
    if kv_store is not None:
        check_store(model, kv_store)
    parents = np.array([len(seen) for seen in program.sees])
    warn_of(model, record, program.visible, parents, lambda i: program.units[i].name)
    block.texts = program.texts
    with entered(block), torch.no_grad():
        yield Session(model, program, block, kv_store, room)


def check_store(model: Any, store: KVStore) -> None:
    """Refuse what is no store, and a model whose keys and values cannot be used again."""
    if not isinstance(store, KVStore):
        raise LeattnError(f"kv_store is a leattn.KVStore, not {store!r}; make one with leattn.KVStore(max_bytes=...)")
    devices = {str(weight.device) for weight in Model.of(model).base.parameters() if not weight.is_meta}
    if len(devices) > 1:
        raise BackendError(
            f"kv_store cannot serve {type(model).__name__}: its layers are on several devices ({', '.join(sorted(devices))}): "
            "what is stored of a node goes to one; put it on one device, or leave kv_store out"
        )
    reason = certificate(model).reuse
    if reason is not None:
        raise BackendError(f"kv_store cannot serve {type(model).__name__}: {reason}")


class Session:
    """What is computed already, what is queued, and where everything stands. N units, K columns.

    Attributes
    ----------
    ids : list of tuple of int
        The tokens of every unit; a written one's are its header until it is complete.
    fed : list of int
        How many tokens of each unit went through the model.
    unfed : dict of int to int
        The last token of a complete written unit, if it did not go through the model: that is only done if somebody sees it.
    queue : deque of (unit, ids)
        What is to be fed, in an order in which everything comes after what it sees.
    computed, reused : int
        Tokens that went through the model, and tokens whose keys and values came from the store.
    """

    def __init__(self, model: Any, program: Program, block: Block, store: KVStore | None, room: int | None) -> None:
        self.model, self.program, self.block, self.store = model, program, block, store
        if store is not None:
            self._fingerprint = in_this_context(fingerprint(model), block.columns.device)
            self._shifts = certificate(model).shift is None
        (self.row,) = block.columns.rows
        # Room for all contents and headers and a few tokens of each branch; more comes when it runs out.
        self.arena = Arena(sum(len(unit.ids) + 64 * unit.writes for unit in program.units) if room is None else room)
        self.ids: list[tuple[int, ...]] = [unit.ids for unit in program.units]
        self.fed = [0] * len(program.units)
        self.unfed: dict[int, int] = {}
        self.queue: deque[tuple[int, Sequence[int]]] = deque()
        self.computed = self.reused = 0
        self._placed = [False] * len(program.units)
        self._places: dict[int, Place] = {}
        self._keys: dict[int, bytes] = {}
        self._complete: set[int] = set()

    def place_of(self, i: int) -> Place:
        """Where a unit stands whose start is known: everything it sees is complete."""
        for j in (*self.program.upwards(i), i) if i not in self._places else ():
            if j not in self._places:
                place = self.program.units[j].place
                if place is None:
                    start = after_seen(self._places[k].end(len(self.ids[k])) for k in self.program.sees[j])
                    assert start is not None
                    place = Place(start)
                self._places[j] = place
        return self._places[i]

    def start(self, i: int) -> Position:
        """The first position of a unit whose start is known."""
        return self.place_of(i).start

    def place(self, units: Sequence[int], *, compute: Collection[int] = ()) -> None:
        """Queue what must go through the model for the units to stand in the cache with everything they see.

        What the store has is loaded instead, but for units in ``compute``, whose logits are wanted, and written ones.
        """
        missing: list[int] = []
        loads: list[tuple[int, NodeKV]] = []
        met, stack = set(units), list(units)
        while stack:
            i = stack.pop()
            if self._placed[i]:
                if i in self.unfed:
                    missing.append(i)
                continue
            self._placed[i] = True
            entry = None
            if self.store is not None and i not in compute and not self.program.units[i].writes:
                entry = self.store.get(self._key(i))
            if entry is not None:
                loads.append((i, shifted(self.model, entry.to(self.block.columns.device), self.start(i))))
                continue
            missing.append(i)
            stack += [j for j in self.program.sees[i] if j not in met]
            met.update(self.program.sees[i])
        self._load(sorted(loads, key=lambda load: load[0]))
        for i in sorted(missing):
            ids = [self.unfed.pop(i)] if i in self.unfed else self.ids[i]
            if ids:
                self.queue.append((i, ids))

    def run(self, most: int | None = None, last: Mapping[int, int] = MappingProxyType({})) -> Iterator[dict[int, Tensor]]:
        """Compute what is queued, ``most`` tokens per forward (at least one unit).

        Yields, for each forward, the units that it fed, and of each the logits ``[n, V]`` of the ``last`` n tokens asked for.
        """
        while self.queue:
            feeds: list[Feed] = []
            room = most
            while self.queue and (not feeds or room is None or len(self.queue[0][1]) <= room):
                feeds.append(Feed(*self.queue.popleft(), True))
                room = None if room is None else room - len(feeds[-1].ids)
            ends = accumulate(len(feed.ids) for feed in feeds)
            asked = [last.get(feed.unit, 0) for feed in feeds]
            rows = [row for end, n in zip(ends, asked, strict=True) for row in range(end - n, end)]
            output = self.step(feeds, rows)
            logits = output.logits[0, : len(rows)] if rows else torch.zeros(0)
            yield {feed.unit: part for feed, part in zip(feeds, logits.split(asked), strict=True)}

    def logits(self, last: Mapping[int, int]) -> Any:
        """The model's output for the last n tokens of each unit, side by side in the order given: ``logits`` ``[1, rows, V]``.

        Everything that they need and that is missing is computed in one forward.
        """
        self.place(list(last), compute=last)
        feeds = [Feed(i, ids, True) for i, ids in self.queue]
        self.queue.clear()
        ends = dict(zip((feed.unit for feed in feeds), accumulate(len(feed.ids) for feed in feeds), strict=True))
        return self.step(feeds, [row for i, n in last.items() for row in range(ends[i] - n, ends[i])])

    def step(self, feeds: Sequence[Feed], rows: Sequence[int]) -> Any:
        """One forward; the model's output with logits ``[1, rows, V]`` of the fed tokens in ``rows``, or hidden states."""
        ids: list[int] = []
        for feed in feeds:
            fed = self.fed[feed.unit]
            self.fed[feed.unit] += len(feed.ids)
            self.row.append(feed.unit, self.place_of(feed.unit).of(range(fed, fed + len(feed.ids))))
            ids += feed.ids
        record = self.block.record
        input_ids = torch.tensor([ids], device=self.block.columns.device)
        index = rows or [len(ids) - 1]
        output = record.run(self.model, input_ids, index, past_key_values=self.arena, use_cache=True)
        self.computed += len(ids)
        for feed in feeds:
            if feed.is_last and (feed.unit in self._complete or not self.program.units[feed.unit].writes):
                self.remember(feed.unit)
        return output

    def complete(self, i: int, new_ids: Sequence[int]) -> None:
        """A written unit is its header and these tokens; what was fed beyond them nobody will see."""
        fed = self.fed[i] - len(self.ids[i])
        self.ids[i] = (*self.ids[i], *new_ids)
        self._complete.add(i)
        if len(new_ids) < fed:
            self.row.forget(i, fed - len(new_ids))
        elif len(new_ids) > fed:
            self.unfed[i] = new_ids[-1]
        if i not in self.unfed:
            self.remember(i)

    def is_placed(self, i: int) -> bool:
        """Whether a unit stands in the cache, or will by the end of what is queued."""
        return self._placed[i]

    def is_stored(self, i: int) -> bool:
        """Whether the store has a complete unit."""
        return self.store is not None and self._key(i) in self.store

    def remember(self, i: int, cache: Any = None, columns: Tensor | None = None) -> None:
        """Give the store a unit whose tokens all went through the model: from our cache, or from some columns of another."""
        if self.store is not None and self.ids[i] and self._key(i) not in self.store:
            if columns is None:
                cache, columns = self.arena, torch.from_numpy(self.row.columns_of(i))
            self.store.put(self._key(i), node_kv(cache, columns, self.start(i)))

    def forget_all_but(self, units: Collection[int]) -> None:
        """Drop the columns of all other units, if that frees at least half of them."""
        if 2 * sum(len(self.row.columns_of(i)) for i in units) <= self.row.length:
            self.arena.keep(torch.from_numpy(self.row.keep(units)).to(self.block.columns.device))

    def cache_of(self, units: Sequence[int], rows: int) -> Any:
        """A cache of units one after another, each row ``rows`` times; zeros where one was not placed, for nobody sees it."""
        lengths = [len(self.ids[i]) for i in units]
        if not self.arena.layers:  # nothing is seen
            return Arena(sum(lengths) + 64)
        columns = [torch.from_numpy(self.row.columns_of(i)) for i in units]
        arena = self.arena
        if not torch.equal(torch.cat(columns), torch.arange(sum(lengths))):
            arena = Arena(sum(lengths) + 64)
            for layer, source in enumerate(self.arena.layers):
                pieces = [
                    [_columns(x[0], at, length) for at, length in zip(columns, lengths, strict=True)]
                    for x in (source.keys, source.values)
                ]
                arena.load(layer, *pieces)
        if rows > 1:
            arena.batch_repeat_interleave(rows)
        return arena

    def _key(self, i: int) -> bytes:
        """The key of a complete unit in the store."""
        for j in (*self.program.upwards(i), i) if i not in self._keys else ():
            if j not in self._keys:
                place = self.place_of(j)
                seen = [(self._keys[k], self.start(k) - place.start) for k in self.program.sees[j]]
                index = {k: i for i, k in enumerate(self.program.sees[j])}
                groups = [
                    ([index[k] for first, last in runs for k in range(first, last)], reading)
                    for runs, reading in self.program.visible.readings.get(j, ())
                ]
                self._keys[j] = node_key(self._fingerprint, self.ids[j], seen, place, absolute=not self._shifts, groups=groups)
        return self._keys[i]

    def _load(self, loads: Sequence[tuple[int, NodeKV]]) -> None:
        """Put entries of the store into the cache."""
        for i, _ in loads:
            self.row.append(i, self.place_of(i).of(range(len(self.ids[i]))))
            self.reused += len(self.ids[i])
        for layer in range(len(loads[0][1].keys) if loads else 0):
            self.arena.load(layer, [entry.keys[layer] for _, entry in loads], [entry.values[layer] for _, entry in loads])


def _columns(x: Tensor, at: Tensor, length: int) -> Tensor:
    """Some columns of ``[G, K, D]``, ``[G, length, D]``: zeros if there are none."""
    return x[:, at.to(x.device)] if len(at) else x.new_zeros(x.shape[0], length, x.shape[2])
