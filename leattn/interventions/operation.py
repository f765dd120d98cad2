"""What an operation is, before and after it knows its prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from leattn.errors import LeattnError
from leattn.interventions.where import Where, all_but_the_last, as_mask, tokens_at
from leattn.prompt.columns import Columns
from leattn.prompt.compiled import CompiledPrompt

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
    def build(cls, subject: Subject, where: Where | None, rows: Sequence[int] | None, *, generated: bool = False) -> Selection:
        """``where`` in each prompt of ``rows`` (all of them for None); None is every token but the last of every sink."""
        prompts, width = range(len(subject.prompts)), subject.columns.width
        chosen = checked_rows(rows, len(prompts))
        selected = torch.zeros(len(prompts), width, dtype=torch.bool)
        for p in chosen:
            prompt = subject.prompts[p]
            tokens = all_but_the_last(prompt) if where is None else tokens_at(prompt, where)
            selected[p] = as_mask(tokens, prompt, width)
        new = torch.tensor([generated and p in chosen for p in prompts])
        return cls(selected, new)

    def at(self, queries: range, repeats: int, device: torch.device) -> torch.Tensor:
        """The selection in some columns of the model's rows, ``[B, Q]`` bool."""
        width = self.prompt_columns.shape[1]
        index = torch.arange(queries.start, queries.stop)
        prompt_part = self.prompt_columns[:, index.clamp(max=width - 1)] & (index < width)
        selected = prompt_part | (self.generated[:, None] & (index >= width))
        return selected.repeat_interleave(repeats, 0).to(device)


def checked_rows(rows: Sequence[int] | None, count: int) -> list[int]:
    """Which prompts of a batch; all of them for None."""
    if rows is None:
        return list(range(count))
    for row in rows:
        if not 0 <= row < count:
            raise LeattnError(f"row {row} is not in this batch of {count} prompts, 0 to {count - 1}")
    return list(rows)


@dataclass(frozen=True)
class Subject:
    """What an operation is bound to: prompts, the columns they stand in, and how many layers and heads the model has."""

    prompts: Sequence[CompiledPrompt]
    columns: Columns
    layers: int
    heads: int


@dataclass(frozen=True)
class State:
    """The input of one layer in one forward: which layer, which columns its tokens stand in, and how rows map to prompts."""

    layer: int
    queries: range
    columns: Columns
    repeats: int

    def token_index(self, row: int, column: int) -> int:
        """The index of a column within its prompt, generated tokens counting on."""
        return column - self.columns.padding[row // self.repeats]


class Operation(Protocol):
    """Something to do to a model while it runs a prompt.

    One of your own is any object with this method; see docs/extending.md.
    """

    def bind(self, subject: Subject) -> Any:
        """The operation once it knows its prompts: names are resolved and everything is checked, before anything runs.

        What comes back has one or more of these methods:

        ``edit(state, hidden)``
            The input of ``state.layer``, ``[B, Q, d]``, edited.
        ``scores(call, scores, visible)``
            The scaled (and soft-capped) scores of ``call.layer``, ``[B, H, Q, K]``, changed; ``visible`` broadcasts to them.
            With a method ``touches(layer)``, only in layers for which it is true.
        ``attended(layer, output)``
            What the attention sublayer of a layer adds to the residual stream, ``[B, Q, d]``, changed.
        """


def doing(bound: Sequence[Any], method: str) -> list[Any]:
    """The bound operations that have a method."""
    return [operation for operation in bound if hasattr(operation, method)]
