"""The tape, the cache and the store of one run: which tokens still have to go through the model, and the forward itself."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from leattn.attention.attend import check_token, choose
from leattn.attention.block import Attention, follow, innermost
from leattn.attention.tape import Tape
from leattn.errors import BackendError
from leattn.generation.program import Program
from leattn.kv.node import NodeKV
from leattn.kv.reuse import Reuse
from leattn.kv.store import KVStore
from leattn.model import hf
from leattn.model.cache import Arena


@dataclass(frozen=True)
class Feed:
    """Some next tokens of a unit, and whether they are the last that it has for now."""

    unit: int
    ids: Sequence[int]
    is_last: bool


@contextmanager
def workspace(model: Any, program: Program, *, backend: str, kv_store: KVStore | None) -> Iterator[Workspace]:
    """A model that follows a program, and the room to run it in.

    Raises
    ------
    BackendError
        The model, or the backend, cannot follow a graph; an intervention is going on.
    """
    base, facts = hf.backbone(model), hf.read_facts(model)
    around = innermost(base)
    if around is not None and around.operations:
        raise BackendError(
            "interventions follow the layout of one compiled prompt, and here tokens run in another order; leave the intervene "
            "block first (what a program wrote compiles, as result.realised, to a prompt to intervene on)"
        )
    check_token(*max((max(unit.ids, default=0), unit.name) for unit in program.units), facts)
    reuse = None if kv_store is None else Reuse(model, kv_store)
    attention = Attention(base, Tape(program.visible, facts.device), choose(model, facts, backend), facts)
    with follow(attention), torch.no_grad():
        yield Workspace(model, program, attention, reuse)


class Workspace:
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

    def __init__(self, model: Any, program: Program, attention: Attention, reuse: Reuse | None) -> None:
        assert isinstance(attention.batch, Tape)
        self.model, self.program, self.attention, self.reuse = model, program, attention, reuse
        self.tape = attention.batch
        # Room for all contents and headers and a few tokens of each branch; more comes when it runs out.
        self.arena = Arena(sum(len(unit.ids) + 64 * unit.writes for unit in program.units))
        self.ids: list[tuple[int, ...]] = [unit.ids for unit in program.units]
        self.fed = [0] * len(program.units)
        self.unfed: dict[int, int] = {}
        self.queue: deque[tuple[int, Sequence[int]]] = deque()
        self.computed = self.reused = 0
        self._placed = [False] * len(program.units)
        self._starts: dict[int, int] = {}
        self._keys: dict[int, bytes] = {}
        self._complete: set[int] = set()
        self._keeps_logits = "logits_to_keep" in inspect.signature(hf.unwrapped(model).forward).parameters

    def start(self, i: int) -> int:
        """The first position of a unit whose start is known: everything it sees is complete."""
        if i not in self._starts:
            for j in (*self.program.upwards(i), i):
                if j not in self._starts:
                    ends = (self._starts[k] + len(self.ids[k]) for k in self.program.sees[j])
                    given = self.program.units[j].start
                    self._starts[j] = max(ends, default=0) if given is None else given
        return self._starts[i]

    def demand(self, targets: Sequence[int], *, compute: Collection[int] = ()) -> None:
        """Queue what must go through the model for the targets to stand on the tape with everything they see.

        What the store has is loaded instead, but for units in ``compute``, whose logits are wanted, and written ones.
        """
        feeds: list[int] = []
        loads: list[tuple[int, NodeKV]] = []
        met, stack = set(targets), list(targets)
        while stack:
            i = stack.pop()
            if self._placed[i]:
                if i in self.unfed:
                    feeds.append(i)
                continue
            self._placed[i] = True
            entry = None
            if self.reuse is not None and i not in compute and not self.program.units[i].writes:
                entry = self.reuse.take(self._key(i), self.start(i))
            if entry is not None:
                loads.append((i, entry))
                continue
            feeds.append(i)
            stack += [j for j in self.program.sees[i] if j not in met]
            met.update(self.program.sees[i])
        self._load(loads)
        for i in sorted(feeds):
            ids = [self.unfed.pop(i)] if i in self.unfed else self.ids[i]
            if ids:
                self.queue.append((i, ids))

    def _key(self, i: int) -> bytes:
        """The key of a complete unit in the store."""
        assert self.reuse is not None
        if i not in self._keys:
            for j in (*self.program.upwards(i), i):
                if j not in self._keys:
                    seen = [(self._keys[k], self.start(k)) for k in self.program.sees[j]]
                    self._keys[j] = self.reuse.key(self.ids[j], seen, self.start(j))
        return self._keys[i]

    def _load(self, loads: list[tuple[int, NodeKV]]) -> None:
        """Put entries of the store on the tape."""
        loads.sort(key=lambda load: load[0])
        for i, _ in loads:
            self.tape.append(i, self.ids[i], self.start(i))
            self.reused += len(self.ids[i])
        for layer in range(len(loads[0][1].keys) if loads else 0):
            self.arena.load(layer, [entry.keys[layer] for _, entry in loads], [entry.values[layer] for _, entry in loads])

    def take_all(self) -> list[Feed]:
        """Everything that is queued, for one forward."""
        feeds = [Feed(i, ids, True) for i, ids in self.queue]
        self.queue.clear()
        return feeds

    def feed(self, feeds: Sequence[Feed], rows: Sequence[int], **model_kwargs: Any) -> Any:
        """One forward; the model's output with logits ``[1, rows, V]`` of the fed tokens in ``rows``, or hidden states."""
        ids: list[int] = []
        for feed in feeds:
            self.tape.append(feed.unit, feed.ids, self.start(feed.unit) + self.fed[feed.unit])
            self.fed[feed.unit] += len(feed.ids)
            ids += feed.ids
        device = self.attention.facts.device
        index = torch.tensor(rows or [len(ids) - 1], device=device)
        options = {"logits_to_keep": index} if self._keeps_logits else {}
        input_ids = torch.tensor([ids], device=device)
        output = self.model(input_ids=input_ids, past_key_values=self.arena, use_cache=True, **options, **model_kwargs)
        if not self._keeps_logits:  # an old head, or none: a backbone by itself
            name = "logits" if hasattr(output, "logits") else "last_hidden_state"
            found = getattr(output, name)
            setattr(output, name, found[:, index.to(found.device)])
        self.computed += len(ids)
        for feed in feeds:
            if feed.is_last and (feed.unit in self._complete or not self.program.units[feed.unit].writes):
                self.keep(feed.unit)
        return output

    def complete(self, i: int, new_ids: Sequence[int]) -> None:
        """A written unit is its header and these tokens; what was fed beyond them nobody will see."""
        fed = self.fed[i] - len(self.ids[i])
        self.ids[i] = (*self.ids[i], *new_ids)
        self._complete.add(i)
        if len(new_ids) < fed:
            self.tape.forget(i, fed - len(new_ids))
        elif len(new_ids) > fed:
            self.unfed[i] = new_ids[-1]
        if i not in self.unfed:
            self.keep(i)

    def is_placed(self, i: int) -> bool:
        """Whether a unit stands on the tape, or will by the end of what is queued."""
        return self._placed[i]

    def is_stored(self, i: int) -> bool:
        """Whether the store has a complete unit."""
        return self.reuse is not None and self._key(i) in self.reuse.store

    def keep(self, i: int, cache: Any = None, columns: torch.Tensor | None = None) -> None:
        """Give the store a unit whose tokens all went through the model: from our cache, or from some columns of another."""
        if self.reuse is not None and self.ids[i]:
            cache, columns = (self.arena, self.tape.columns_of(i)) if columns is None else (cache, columns)
            self.reuse.give(self._key(i), cache, columns, self.start(i))

    def forget_all_but(self, units: Collection[int]) -> None:
        """Drop the columns of all other units, if that frees at least half of them."""
        if 2 * sum(len(self.tape.columns_of(i)) for i in units) <= len(self.tape):
            self.arena.keep(self.tape.keep(units))
