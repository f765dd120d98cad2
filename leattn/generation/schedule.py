"""A program as it runs: one sequence, one cache, one forward per step.

A step feeds one token of every branch that is being written, and all tokens of what the branches that can start now still need:
their headers, and whatever those see that is neither in the cache nor in the store. Nothing is computed twice, and nothing that
no branch needs.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from leattn.generation.branch import Branch, Decode
from leattn.generation.sampling import Sampling, Streamer
from leattn.generation.session import Feed, Session

COMPACT = 4096
"""Columns from which on it is worth looking whether half of them are still needed."""


class Schedule:
    """The schedule of a program. ``branches`` are what is being or was written, by unit; ``decode`` reads each unit's ids."""

    def __init__(
        self,
        work: Session,
        sampling: Sampling,
        *,
        seed: int,
        decode: Mapping[int, Decode],
        token_budget: int | None,
        streamer: Streamer | None,
        on_finished: Callable[[str, str], None],
    ) -> None:
        self.work, self.program, self.sampling = work, work.program, sampling
        self.seed, self.decode, self.budget = seed, decode, token_budget
        self.streamer, self.on_finished = streamer, on_finished
        self.branches: dict[int, Branch] = {}
        self._running: list[int] = []
        self._compact_at = COMPACT
        written = self.program.written
        self._waits = {i: len(self.program.waits_for[i]) for i in written}
        self._dependents: dict[int, list[int]] = {i: [] for i in written}
        for i in written:
            for j in self.program.waits_for[i]:
                self._dependents[j].append(i)
        self._can_start = [i for i in written if not self._waits[i]]

    def steps(self) -> Iterator[None]:
        """Run to the end; yields after every forward."""
        while feeds := self._next_feeds():
            self._step(feeds)
            self._compact()
            yield

    def break_off(self) -> None:
        """Leave every branch with what it has."""
        for i in self._running:
            self.branches[i].finish()

    def _next_feeds(self) -> list[Feed]:
        """Branches first, then as much of the queue as the budget lets in; branches that can start fill the queue."""
        feeds = [Feed(i, [self.branches[i].ids[-1]], False) for i in self._running]
        room = float("inf") if self.budget is None else self.budget - len(feeds)
        begun = len(feeds)
        queue = self.work.queue
        while room > 0:
            if not queue:
                if not self._can_start:
                    break
                self.work.place([heapq.heappop(self._can_start)], compute=self.program.followers)
                continue
            unit, ids = queue[0]
            new = len(self._starting(unit))
            if self.budget is not None and new and begun and begun + new > self.budget:
                break
            if len(ids) <= room:
                queue.popleft()
                feeds.append(Feed(unit, ids, True))
                begun += new
            else:
                take = int(room)
                queue[0] = (unit, ids[take:])
                feeds.append(Feed(unit, ids[:take], False))
            room -= len(feeds[-1].ids)
        return feeds

    def _starting(self, unit: int) -> list[int]:
        """The branches that begin when the last queued token of a unit was fed: itself, or what continues it."""
        own = (unit,) if self.program.units[unit].writes else ()
        return [i for i in (*own, *self.program.followers.get(unit, ())) if i not in self.branches]

    def _step(self, feeds: list[Feed]) -> None:
        rows: list[int] = []
        speaking: list[list[int]] = []
        last = -1
        for feed in feeds:
            last += len(feed.ids)
            branches = self._starting(feed.unit) if feed.is_last else [feed.unit] if self._is_running(feed.unit) else []
            if branches:
                rows.append(last)
                speaking.append(branches)
        logits = self.work.step(feeds, rows).logits[0]
        likeliest = logits.argmax(-1).tolist()
        for row, branches in enumerate(speaking):
            for i in branches:
                self._go_on(i, logits[row], likeliest[row])

    def _is_running(self, i: int) -> bool:
        return i in self.branches and not self.branches[i].finished

    def _go_on(self, i: int, logits: Tensor, likeliest: int) -> None:
        """The next token of a branch, from logits ``[V]``."""
        branch = self.branches.get(i) or self._begin(i)
        if not branch.finished:
            branch.choose(logits, likeliest)
        if self.streamer is not None and (piece := branch.new_text()):
            self.streamer(branch.name, piece)
        if branch.finished:
            self._finish(i)

    def _begin(self, i: int) -> Branch:
        """A branch whose first token comes now."""
        unit = self.program.units[i]
        before = [token for j in (*self.program.upwards(i), i) for token in self.work.ids[j]]
        limit = unit.max_new_tokens
        self.branches[i] = self.sampling.branch(
            unit.name,
            unit.sampling,
            before,
            limit=self.sampling.limit(unit.sampling, len(before)) if limit is None else limit,
            stop=(*unit.stop, *self.sampling.stop),
            decode=self.decode[i],
            seed=self.seed,
        )
        self._running.append(i)
        return self.branches[i]

    def _finish(self, i: int) -> None:
        """A branch is complete: what waited for it alone can start."""
        branch = self.branches[i]
        self._running.remove(i)
        self.work.complete(i, branch.ids)
        self.on_finished(branch.name, branch.text)
        for j in self._dependents[i]:
            self._waits[j] -= 1
            if not self._waits[j]:
                heapq.heappush(self._can_start, j)

    def _compact(self) -> None:
        """Drop what no unfinished branch can still see, once that is most of the cache."""
        if self.work.row.length < self._compact_at or self.work.queue:
            return
        unfinished = {i for i in self.program.written if i not in self.branches or not self.branches[i].finished}
        to_come = unfinished | {j for i in unfinished for j in self.program.upwards(i) if not self.work.is_placed(j)}
        needed = to_come | {j for i in to_come for j in self.program.sees[i]}
        self.work.forget_all_but(needed)
        self._compact_at = max(COMPACT, 2 * self.work.row.length)
