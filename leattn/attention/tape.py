"""One sequence whose columns are filled in the order in which tokens are computed, whatever node they belong to.

The layout of a prompt is fixed before it runs. A program's is not: branches grow side by side, nodes start when what they see
is complete, and a node's tokens may lie apart. So each column remembers its node and position, and the mask follows from that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from leattn.attention.batch import Batch, MaskRequest
from leattn.attention.plan import Stretch
from leattn.prompt.masks import MaskTable, packed_rows
from leattn.prompt.visible import Run, Visible, merge


class Tape(Batch):
    """A batch of one row that grows. K columns so far, N nodes.

    Parameters
    ----------
    visible
        Which nodes each node sees. Its indices are only names here: nodes may be computed in any order in which whatever a
        node sees is there before it.
    device
        Where the model takes its inputs.
    """

    def __init__(self, visible: Visible, device: torch.device) -> None:
        self.prompts = ()
        self.user_mask, self.mask_mode = None, "combine"
        self.visible = visible
        # Beside the nodes of a program, MaskTable knows a continuation, unused here, and one that nobody sees.
        self._dead = len(visible) + 1
        self._seen = packed_rows(Visible((*visible.runs, (), ())), len(visible) + 2)[None].to(device)
        self._columns = torch.zeros(3, 1024, dtype=torch.long, device=device)  # id, position and node of each column
        self._length = 0
        self._runs: list[list[Run]] = [[] for _ in visible.runs]
        self._nodes: list[int] = []

    def __len__(self) -> int:
        return self._length

    def append(self, node: int, ids: Sequence[int], start: int) -> None:
        """Columns for the next tokens of a node, the first of them at position ``start``."""
        stop = self._length + len(ids)
        if stop >= self._columns.shape[1]:
            room = torch.zeros(3, max(stop + 1, 2 * self._columns.shape[1]), dtype=torch.long, device=self._columns.device)
            room[:, : self._length] = self._columns[:, : self._length]
            self._columns = room
        self._columns[:, self._length : stop] = torch.tensor(
            [list(ids), list(range(start, start + len(ids))), [node] * len(ids)]
        )
        runs = self._runs[node]
        if runs and runs[-1][1] == self._length:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((self._length, stop))
        self._nodes += [node] * len(ids)
        self._length = stop

    def forget(self, node: int, count: int) -> None:
        """Nobody sees the last ``count`` tokens of a node any more."""
        for _ in range(count):
            start, stop = self._runs[node].pop()
            if stop - 1 > start:
                self._runs[node].append((start, stop - 1))
            self._columns[2, stop - 1] = self._dead
            self._nodes[stop - 1] = self._dead

    def columns_of(self, node: int) -> torch.Tensor:
        """The columns that hold a node's tokens, ``[n]``."""
        parts = [torch.arange(start, stop) for start, stop in self._runs[node]]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)

    def keep(self, nodes: Collection[int]) -> torch.Tensor:
        """Drop the columns of all other nodes; the columns that stay, ``[n]`` ascending, as they were numbered before."""
        wanted = set(nodes)
        kept = [column for column, node in enumerate(self._nodes) if node in wanted]
        index = torch.tensor(kept, dtype=torch.long, device=self._columns.device)
        self._columns[:, : len(kept)] = self._columns[:, index]
        self._nodes = [self._nodes[column] for column in kept]
        self._length = len(kept)
        self._runs = [[] for _ in self.visible.runs]
        for column, node in enumerate(self._nodes):
            self._runs[node].append((column, column + 1))
        self._runs = [list(merge(runs)) for runs in self._runs]
        return index

    @property
    def input_ids(self) -> torch.Tensor:  # type: ignore[override]
        """``[1, K]``."""
        return self._columns[0, None, : self._length]

    @property
    def attention_mask(self) -> torch.Tensor:  # type: ignore[override]
        """``[1, K]``, all ones."""
        return torch.ones_like(self.input_ids)

    @property
    def table(self) -> MaskTable:  # type: ignore[override]
        """Who sees whom among the columns so far."""
        columns = self._columns[:, None]
        return MaskTable(columns[2, :, : self._length + 1], self._seen, columns[1, :, : self._length], (0,))

    @property
    def is_plain(self) -> bool:
        return False

    def repeats(self, rows: int) -> int:
        """One row, always."""
        assert rows == 1, rows
        return 1

    def block_counts(self, request: MaskRequest, block: int) -> torch.Tensor:
        """Allowed pairs per block, ``[1, Q blocks, K blocks]``, counted: columns of one node may lie anywhere."""
        queries = torch.arange(request.queries.start, request.queries.stop, device=request.device)
        rows = self.table.rows(queries, request.keys)
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[2] % block, 0, -rows.shape[1] % block))
        _, queries_up, keys_up = rows.shape
        return rows.view(1, queries_up // block, block, keys_up // block, block).sum((2, 4))

    def stretches(self, request: MaskRequest) -> list[list[Stretch]]:
        """The queries node by node, each with the columns that it sees."""
        found = []
        start = request.queries.start
        while start < request.queries.stop:
            node = self._nodes[start]
            stop = start + 1
            while stop < request.queries.stop and self._nodes[stop] == node:
                stop += 1
            runs = [run for other in self.visible.nodes_seen(node) for run in self._runs[other]]
            own = [(first, min(last, start)) for first, last in self._runs[node] if first < start]
            found.append(Stretch(start, stop, merge([*runs, *own])))
            start = stop
        return [found]
