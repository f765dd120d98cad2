"""What an operation is, before and after it knows its prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from leattn.attention.batch import Batch
from leattn.errors import LeattnError
from leattn.interventions.where import Where, all_but_the_last, as_mask, tokens_at
from leattn.prompt.compile import CompiledPrompt

Layers: TypeAlias = int | Collection[int]


def checked_layers(what: str, layers: Layers | None, count: int) -> frozenset[int]:
    """Layer numbers; all of them for None.

    Raises
    ------
    LeattnError
        A layer that the model does not have.
    """
    if layers is None:
        return frozenset(range(count))
    chosen = {layers} if isinstance(layers, int) else set(layers)
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
            raise LeattnError(f"{what} names layer {layer!r}; this model has layers 0 to {count - 1}")
    return frozenset(chosen)


@dataclass(frozen=True)
class Selection:
    """Tokens of a batch: ``prompt_columns`` ``[P, S]`` bool, and which rows' generated tokens count too, ``[P]`` bool."""

    prompt_columns: torch.Tensor
    generated: torch.Tensor

    @classmethod
    def build(cls, batch: Batch, where: Where | None, rows: Sequence[int] | None, *, generated: bool = False) -> Selection:
        """``where`` in each prompt of ``rows`` (all of them for None); None is every token but the last of every sink."""
        prompts = range(len(batch.prompts))
        chosen = checked_rows(rows, len(prompts))
        columns = torch.zeros(len(prompts), batch.table.columns, dtype=torch.bool)
        for p in chosen:
            prompt: CompiledPrompt = batch.prompts[p]
            tokens = all_but_the_last(prompt) if where is None else tokens_at(prompt, where)
            columns[p] = as_mask(tokens, prompt, batch.table.columns)
        new = torch.tensor([generated and p in chosen for p in prompts])
        return cls(columns, new)

    def at(self, columns: range, rows_per_prompt: int, device: torch.device) -> torch.Tensor:
        """The selection in some columns of the model's rows, ``[B, len(columns)]`` bool."""
        width = self.prompt_columns.shape[1]
        index = torch.arange(columns.start, columns.stop)
        prompt_part = self.prompt_columns[:, index.clamp(max=width - 1)] & (index < width)
        selected = prompt_part | (self.generated[:, None] & (index >= width))
        return selected.repeat_interleave(rows_per_prompt, 0).to(device)


def checked_rows(rows: Sequence[int] | None, count: int) -> list[int]:
    """Which prompts of a batch; all of them for None."""
    if rows is None:
        return list(range(count))
    for row in rows:
        if not 0 <= row < count:
            raise LeattnError(f"row {row} is not in this batch of {count} prompts, 0 to {count - 1}")
    return list(rows)


@dataclass(frozen=True)
class State:
    """The input of one layer in one forward: which layer, which columns, and how rows map to prompts."""

    layer: int
    columns: range
    batch: Batch
    rows_per_prompt: int

    def token_index(self, row: int, column: int) -> int:
        """The index of a column within its prompt, generated tokens counting on."""
        return column - self.batch.table.padding[row // self.rows_per_prompt]


class Editor(Protocol):
    """A hidden-state operation that knows its prompts. May hold what it saw between layers of one forward."""

    def edit(self, state: State, hidden: torch.Tensor) -> torch.Tensor:
        """The input of ``state.layer``, ``[B, Q, d]``, edited; the same tensor where there is nothing to do."""
