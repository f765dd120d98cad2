"""A prompt's cache from the store: what is there is loaded, what is missing is computed and given to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from leattn.attention.attend import check_positions
from leattn.attention.block import innermost
from leattn.generation.program import build
from leattn.generation.workspace import Feed, Workspace, workspace
from leattn.kv.store import KVStore
from leattn.model import hf
from leattn.model.cache import Arena
from leattn.prompt.compile import CompiledPrompt, compile_prompt
from leattn.prompt.positions import Positions
from leattn.prompt.visible import Visibility


def is_intervened(model: Any) -> bool:
    """Whether an ``intervene`` block is around, in which a store is neither read nor written."""
    around = innermost(hf.backbone(model))
    return around is not None and bool(around.operations)


@dataclass
class Filled:
    """Keys and values of a prompt up to its sink, in layout order, and what they cost."""

    prompt: CompiledPrompt
    work: Workspace
    forwards: int

    @property
    def computed(self) -> int:
        return self.work.computed

    @property
    def reused(self) -> int:
        return self.work.reused

    def cache_of(self, rows: int) -> Any:
        """The cache of all columns before the sink, each row ``rows`` times. Columns that the sink does not see hold zeros."""
        sink = self.prompt.offsets[-2]
        if not self.work.arena.layers:  # nothing is seen
            return Arena(len(self.prompt) + 64)
        columns = [self.work.tape.columns_of(i) for i in range(len(self.prompt.graph) - 1)]
        arena = self.work.arena
        if not torch.equal(torch.cat(columns) if columns else torch.arange(0), torch.arange(sink)):
            arena = Arena(len(self.prompt) + 64)
            for layer, source in enumerate(self.work.arena.layers):
                parts = [
                    [
                        x[0][:, at] if len(at) else x.new_zeros(x.shape[1], length, x.shape[3])
                        for at, length in self._sizes(columns)
                    ]
                    for x in (source.keys, source.values)
                ]
                arena.load(layer, *parts)
        if rows > 1 and sink:
            arena.batch_repeat_interleave(rows)
        return arena

    def _sizes(self, columns: list[torch.Tensor]) -> Iterable[tuple[torch.Tensor, int]]:
        offsets = self.prompt.offsets
        return ((at, offsets[i + 1] - offsets[i]) for i, at in enumerate(columns))

    def keep_sink(self, cache: Any) -> None:
        """Give the store the sink as well, now that the model's own ``generate`` computed it in this cache."""
        self.work.keep(len(self.prompt.graph) - 1, cache, torch.arange(self.prompt.offsets[-2], self.prompt.offsets[-1]))


def fill(model: Any, prompt: CompiledPrompt, *, backend: str, kv_store: KVStore) -> Filled:
    """What the one sink of a prompt sees, from the store or computed in one forward."""
    program, _ = build([prompt], prompt.tokenizer, positions="after_parents", visibility="parents")
    with workspace(model, program, backend=backend, kv_store=kv_store) as work:
        work.demand(program.sees[len(prompt.graph) - 1])
        if work.queue:
            work.feed(work.take_all(), [])
        return Filled(prompt, work, work.attention.forwards)


WARM = 2048
"""Tokens that one forward computes at most while a store is warmed."""


def warm(
    store: KVStore,
    model: Any,
    nodes: Any,
    tokenizer: Any,
    *,
    positions: Positions,
    visibility: Visibility,
    progress: bool,
) -> None:
    """Put nodes and everything they see into a store: see :meth:`KVStore.warm`."""
    prompt = (
        nodes
        if isinstance(nodes, CompiledPrompt)
        else compile_prompt(nodes, tokenizer, positions=positions, visibility=visibility)
    )
    check_positions([prompt], hf.read_facts(model))
    program, _ = build([prompt], prompt.tokenizer, positions=positions, visibility=visibility)
    count = len(prompt.graph)
    with (
        workspace(model, program, backend="auto", kv_store=store) as work,
        tqdm(total=count, unit="node", disable=not progress) as bar,
    ):
        missing = [i for i in range(count) if not work.is_stored(i)]
        bar.update(count - len(missing))
        work.demand(missing, compute=missing)
        while work.queue:
            feeds = [_next(work)]
            while work.queue and sum(len(feed.ids) for feed in feeds) + len(work.queue[0][1]) <= WARM:
                feeds.append(_next(work))
            work.feed(feeds, [])
            bar.update(len(feeds))


def _next(work: Workspace) -> Feed:
    i, ids = work.queue.popleft()
    return Feed(i, ids, True)
