"""Equal stretches side by side: what one batched call computes, and which keys it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from leattn.prompt.stretch import columns_in
from leattn.prompt.visible import Run

LONG = 1024
"""Keys seen whole from which on a stretch by itself computes them apart from its own, without any mask."""

Ints: TypeAlias = npt.NDArray[np.int64]


def select(columns: Ints, device: torch.device) -> slice | Tensor:
    """Columns ``[n]`` as an index: an interval, which copies nothing, or a tensor."""
    if (np.diff(columns) != 1).any():
        return torch.from_numpy(columns).to(device)
    return slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 0)


def picked(x: Tensor, index: slice | Tensor) -> Tensor:
    """Some columns of ``[B, G, K, D]``, ``[B, G, n, D]``."""
    return x[:, :, index] if isinstance(index, slice) else x.index_select(2, index)


@dataclass(frozen=True)
class Group:
    """``count`` adjacent stretches of ``length`` queries from column ``start`` on.

    ``seen`` are the columns that all of them see whole; with ``window``, instead, each stretch sees the ``window`` columns
    before its own start.
    """

    start: int
    length: int
    count: int
    seen: tuple[Run, ...]
    window: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.length * self.count

    @property
    def seen_keys(self) -> int:
        return self.window or sum(stop - start for start, stop in self.seen)

    @property
    def is_apart(self) -> bool:
        """Whether what is seen is computed apart from what the stretches see of themselves."""
        return self.count > 1 or self.window > 0 or (self.length > 1 and self.seen_keys > LONG)

    def index(self, device: torch.device) -> slice | Tensor:
        """Where the keys to pick out for it are."""
        return select(self.keys(), device)

    def keys(self) -> Ints:
        """The columns to pick out for it, ascending."""
        return columns_in(self.seen if self.is_apart else [*self.seen, (self.start, self.stop)])

    def pieces(self, most: int) -> Iterator[Group]:
        """The group in parts of at most ``most`` queries, but of whole stretches."""
        step = max(1, most // self.length)
        for first in range(0, self.count, step):
            yield replace(self, start=self.start + first * self.length, count=min(step, self.count - first))

    def run(self, kernel: Any, index: slice | Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Query ``[B, H, Q, D]`` over key and value ``[B, G, K, D]`` of all columns, into output ``[B, Q, H, D]``."""
        seen = picked(key, index), picked(value, index)
        if self.is_apart:
            kernel.group(query, key, value, self, seen, output)
        elif self.length > 1:
            kernel.stairs(query, *seen, output[:, None])
        else:
            output.copy_(kernel.masked(query, *seen, None))
