"""Stretches that read groups of what they see in other ways: parts computed apart, each as it is read, and merged.

Shapes: B rows of one prompt, H query heads, G key heads, Q queries of a step, K keys, D head size, P parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from leattn.attention.group import Group, Ints, picked, select
from leattn.attention.kernels import TEMPORARY, Kernel, needs_gradient
from leattn.attention.reading import numbers, read_parts, read_scores, scaled_scores
from leattn.dag.reading import Reading
from leattn.prompt.stretch import Stretch, columns_in
from leattn.prompt.visible import Run

PIECES = 4
"""Intervals up to which a group is read piece by piece, which copies nothing; more are put side by side."""
FEW = 4
"""Queries up to which scores are made at once, where what is seen is one interval: most of the time is then spent on calls."""
QUERIES = 256
"""Queries whose scores are held at once where no kernel returns the log-sum-exp."""


@dataclass(frozen=True, eq=False)
class Part:
    """Columns ``[n]`` that are read in one go, and the ``group`` of ``readings`` that they are of; None as they are.

    ``mask`` ``[Q, n]`` says which of them each query sees, where a window hides some.
    """

    columns: Ints
    group: int | None
    mask: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, eq=False)
class Reader:
    """``count`` adjacent stretches of ``length`` queries from column ``start`` on, which see the same parts in the same way."""

    start: int
    length: int
    count: int
    parts: tuple[Part, ...]
    readings: tuple[Reading, ...]
    own_mask: npt.NDArray[np.bool_] | None = None

    @property
    def stop(self) -> int:
        return self.start + self.length * self.count

    def index(self, device: torch.device) -> list[slice | Tensor]:
        """Where the keys of its parts are; of its groups, counted from ``span`` on, where all scores are made at once."""
        if self.span is None or self.own_mask is not None:
            return [select(part.columns, device) for part in self.parts]
        groups = ([part.columns for part in self.parts if part.group == group] for group in range(len(self.readings)))
        return [select(np.concatenate(columns) - self.span, device) for columns in groups]

    @cached_property
    def span(self) -> int | None:
        """Where what a few queries see begins, if they see everything from there on: one product has all their scores."""
        if self.count > 1 or self.length > FEW:
            return None
        first = min((int(part.columns[0]) for part in self.parts), default=self.start)
        return first if sum(len(part.columns) for part in self.parts) == self.start - first else None

    def run(
        self, kernel: Kernel, index: list[slice | Tensor], query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> None:
        """Query ``[B, H, Q, D]`` over key and value ``[B, G, K, D]`` of all columns, into output ``[B, Q, H, D]``."""
        span = self.span
        if span is not None and self.own_mask is None:
            output.copy_(self._at_once(kernel, index, query, key[:, :, span : self.stop], value[:, :, span : self.stop]))
            return
        seen = [(picked(key, at), picked(value, at)) for at in index]
        if not kernel.with_lse or self.own_mask is not None:
            for start, stop in self._cuts():
                columns = slice(start - self.start, stop - self.start)
                first = self.start + (start - self.start) // self.length * self.length
                own = key[:, :, first:stop], value[:, :, first:stop]
                output[:, columns] = self._by_scores(kernel, query[:, :, columns], columns, own, seen)
            return
        most = max(1, TEMPORARY // (query[:, :, 0].nbytes * (1 + len(seen))))
        for piece in Group(self.start, self.length, self.count, ()).pieces(most):
            columns = slice(piece.start - self.start, piece.stop - self.start)
            self._by_parts(kernel, query[:, :, columns], key, value, piece, seen, output[:, columns])

    def _at_once(self, kernel: Kernel, index: list[slice | Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All scores of a few queries, over the columns from ``span`` on; ``[B, Q, H, D]``."""
        scores = scaled_scores(query, key, kernel.scaling).float()
        if self.length > 1:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(key.shape[2] - self.length + 1)
            scores = scores.masked_fill(later, -torch.inf)
        for at, reading in zip(index, self.readings, strict=True):
            moved = kernel.moved(query, reading)
            part = scores[..., at] if moved is query else scaled_scores(moved, key[:, :, at], kernel.scaling).float()
            scores = scores.clone() if needs_gradient(scores) else scores
            scores[..., at] = read_scores(part, None, reading)
        return weighted(scores.softmax(-1).to(query.dtype), value)

    def _by_parts(
        self,
        kernel: Kernel,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        piece: Group,
        seen: Sequence[tuple[Tensor, Tensor]],
        output: Tensor,
    ) -> None:
        """Each part by itself; the log-sum-exps say how to put them together."""
        own, own_lse = kernel.own(query, key, value, piece)
        found, logs = [own], [own_lse[..., 0]]
        groups: dict[int | None, list[Tensor]] = {}
        for part, (keys, values) in zip(self.parts, seen, strict=True):
            asking, scaling = query, kernel.scaling
            if part.group is not None:
                reading = self.readings[part.group]
                temperature, _, _ = numbers(reading, query.shape[1], query.device)
                asking = kernel.moved(query, reading)
                if isinstance(temperature, Tensor):
                    asking = asking / temperature.to(asking.dtype)
                else:
                    scaling /= temperature
            result, lse = kernel.over(asking, keys, values, scaling)
            found.append(result)
            groups.setdefault(part.group, []).append(lse[..., 0])
        for group, parts in groups.items():  # in the order of parts, which stand together by group
            lses = torch.stack(parts)  # [P, B, Q, H]
            logs += list(lses if group is None else read_parts(lses, self.readings[group]))
        shares = torch.stack(logs).softmax(0)[..., None]
        total = found[0] * shares[0]
        for result, share in zip(found[1:], shares[1:], strict=True):
            total.addcmul_(result, share)
        output.copy_(total)

    def _by_scores(
        self,
        kernel: Kernel,
        query: Tensor,
        queries: slice,
        own: tuple[Tensor, Tensor],
        seen: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """All scores of some queries of one stretch, side by side; ``[B, Q, H, D]``."""
        device, length = query.device, query.shape[2]
        first, keys = queries.start % self.length, own[0].shape[2]
        mask = torch.ones(length, keys, dtype=torch.bool, device=device).tril_(keys - length)
        if self.own_mask is not None:
            mask &= torch.from_numpy(self.own_mask[first : first + length, :keys]).to(device)
        scores = [scaled_scores(query, own[0], kernel.scaling).float().masked_fill(~mask, -torch.inf)]
        for group, members in groupby(zip(self.parts, seen, strict=True), lambda member: member[0].group):
            asking = query if group is None else kernel.moved(query, self.readings[group])
            several, masks = [], []
            for part, (part_keys, _) in members:
                several.append(scaled_scores(asking, part_keys, kernel.scaling).float())
                seen_of = np.ones((length, len(part.columns)), np.bool_) if part.mask is None else part.mask[queries]
                masks.append(torch.from_numpy(seen_of).to(device))
            of_group, visible = torch.cat(several, -1), torch.cat(masks, -1)
            if group is None:
                scores.append(of_group.masked_fill(~visible, -torch.inf))
            else:
                scores.append(read_scores(of_group, visible, self.readings[group]))
        weights = torch.cat(scores, -1).softmax(-1).to(query.dtype)
        return weighted(weights, torch.cat([own[1], *(each for _, each in seen)], 2))

    def _cuts(self) -> Iterator[tuple[int, int]]:
        """Columns of as many queries as are computed at once; each cut within one stretch."""
        for first in range(self.start, self.stop, self.length):
            for start in range(first, first + self.length, QUERIES):
                yield start, min(start + QUERIES, first + self.length)


def weighted(weights: Tensor, value: Tensor) -> Tensor:
    """Values ``[B, G, K, D]`` by weights ``[B, H, Q, K]``, ``[B, Q, H, D]``."""
    rows, heads, length, keys = weights.shape
    groups = value.shape[1]
    folded = weights.reshape(rows, groups, heads // groups * length, keys) @ value
    return folded.view(rows, groups, heads // groups, length, -1).flatten(1, 2).transpose(1, 2)


def readers(stretches: Sequence[Stretch], positions: Ints | None, window: int | None) -> Iterator[Reader]:
    """Steps for stretches that read in other ways; adjacent ones of one length that read the same are one.

    ``positions`` ``[K]`` are given where the ``window`` may hide something. It is measured to where keys are read.
    """
    made: Reader | None = None
    for stretch in stretches:
        new = _reader(stretch) if positions is None or window is None else _windowed(stretch, positions, window)
        if made is not None and new.own_mask is None and made.own_mask is None and _alike(made, new):
            made = Reader(made.start, made.length, made.count + 1, made.parts, made.readings)
            continue
        if made is not None:
            yield made
        made = new
    if made is not None:
        yield made


def _alike(made: Reader, new: Reader) -> bool:
    if (made.stop, made.length, made.readings) != (new.start, new.length, new.readings) or len(made.parts) != len(new.parts):
        return False
    pairs = zip(made.parts, new.parts, strict=True)
    return all(a.group == b.group and np.array_equal(a.columns, b.columns) for a, b in pairs)


def _reader(stretch: Stretch) -> Reader:
    grouped = [run for runs, _ in stretch.readings for run in runs]
    rest = _between(stretch.seen, sorted(grouped))
    parts = [Part(columns, None) for columns in _pieces(rest)]
    for group, (runs, _) in enumerate(stretch.readings):
        parts += [Part(columns, group) for columns in _pieces(runs)]
    return Reader(stretch.start, stretch.stop - stretch.start, 1, tuple(parts), tuple(how for _, how in stretch.readings))


def _windowed(stretch: Stretch, positions: Ints, window: int) -> Reader:
    reader = _reader(stretch)
    queries = positions[stretch.start : stretch.stop, None]
    parts = []
    for part in reader.parts:
        shift = 0 if part.group is None else reader.readings[part.group].shift
        parts.append(Part(part.columns, part.group, queries - (positions[part.columns] + shift) < window))
    own = queries - positions[stretch.start : stretch.stop] < window
    if all(part.mask is not None and part.mask.all() for part in parts) and own.all():
        return reader
    return Reader(reader.start, reader.length, 1, tuple(parts), reader.readings, own)


def _pieces(runs: Sequence[Run]) -> list[Ints]:
    if len(runs) > PIECES:
        return [columns_in(runs)]
    return [np.arange(start, stop) for start, stop in runs]


def _between(seen: Sequence[Run], taken: Sequence[Run]) -> list[Run]:
    """What is seen and not taken; both are sorted, and what is taken is seen."""
    left: list[Run] = []
    for start, stop in seen:
        at = start
        for first, last in taken:
            if start <= first < stop:
                if at < first:
                    left.append((at, first))
                at = last
        if at < stop:
            left.append((at, stop))
    return left
