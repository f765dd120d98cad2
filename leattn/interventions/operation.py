"""What an operation is, what it is bound to, and what it is given in every forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from leattn.attention.around import Call
from leattn.errors import LeattnError
from leattn.interventions.where import Where, tokens_at
from leattn.prompt.columns import Columns
from leattn.prompt.slots import Text

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


def checked_rows(rows: Sequence[int] | None, count: int) -> list[int]:
    """Which prompts of a batch; all of them for None."""
    if rows is None:
        return list(range(count))
    for row in rows:
        if not 0 <= row < count:
            raise LeattnError(f"row {row} is not in this batch of {count} prompts, 0 to {count - 1}")
    return list(rows)


@dataclass(frozen=True, eq=False)
class Subject:
    """What an operation is bound to: the texts that will run, and how many layers and heads the model has.

    Attributes
    ----------
    texts
        One for each prompt of a batch, or for each target of a program: ``text.graph`` has its nodes.
    columns
        Where their tokens stand, as far as that is known beforehand.
    grows
        Whether it is a program: its tokens come node by node, in several forwards.
    """

    texts: Sequence[Text]
    columns: Columns
    layers: int
    heads: int
    _seen: dict[tuple[int, range, int, torch.device], Tokens] = field(default_factory=dict)

    @property
    def grows(self) -> bool:
        return any(text.grows for text in self.texts)

    def table(self, what: str, wanted: Sequence[Tensor], nothing: float = 0) -> Tensor:
        """What is wanted in each text, by slot of its row, ``[slots]``, as one table ``[rows, slots + 1]``.

        ``nothing`` stands where nothing is wanted; the last column, for what is no node's token, has it, too. ``what`` is said
        in errors.

        Raises
        ------
        LeattnError
            A node that stands in the sequence once, for several targets of a program that do not want the same of it.
        """
        width = max(text.slots.count for text in self.texts)
        table = wanted[0].new_full((len(self.columns.rows), width + 1), nothing)
        owner = torch.full(table.shape, -1)
        for number, (text, one) in enumerate(zip(self.texts, wanted, strict=True)):
            mine = torch.tensor(text.known + text.new, dtype=torch.long)
            unlike = (owner[text.row, mine] >= 0) & (table[text.row, mine] != one[mine])
            if unlike.any():
                slot = int(mine[unlike][0])
                name = next(name for name in text.names if slot in text.slots_of(name))
                raise LeattnError(
                    f"{what}: node {name!r} stands in the sequence once, for targets {int(owner[text.row, slot])} and "
                    f"{number}, which do not ask the same of it; generate them one at a time"
                )
            table[text.row, mine], owner[text.row, mine] = one[mine], number
        return table

    def tokens(self, forward: int, columns: range, rows: int, device: torch.device) -> Tokens:
        """The tokens in some columns of the model's rows, during its forward of this number."""
        key = (forward, columns, rows, device)
        if key not in self._seen:
            for other in [other for other in self._seen if other[0] != forward]:
                del self._seen[other]
            self._seen[key] = Tokens.at(self, columns, self.columns.repeats(rows), device)
        return self._seen[key]


@dataclass(frozen=True, eq=False)
class Tokens:
    """What stands in some columns of the model's rows. B rows, n columns.

    Attributes
    ----------
    columns
        The columns.
    names
        For each row the name of each token's node; ``""`` for padding, and for what was thrown away.
    indices : LongTensor
        ``[B, n]``, which token of its node it is.
    generated : BoolTensor
        ``[B, n]``, whether the model wrote it: what follows a header, or a prompt.
    slots : LongTensor
        ``[B, n]``, its slot, −1 if it is no node's: what a table of :meth:`Subject.table` is asked with.
    in_prompt : LongTensor or None
        ``[B, n]``, its index in its prompt, generated tokens counting on; None in a program, where a token has none before
        everything is written.
    repeats
        How many rows of the model (beams, return sequences) each row of the columns has.
    """

    columns: range
    indices: Tensor
    generated: Tensor
    slots: Tensor
    in_prompt: Tensor | None
    repeats: int
    _nodes: Sequence[Any]
    _names: Sequence[tuple[str, ...]]

    @classmethod
    def at(cls, subject: Subject, columns: range, repeats: int, device: torch.device) -> Tokens:
        of_row = {text.row: text.slots for text in subject.texts}
        numbered = [of_row[row] for row in range(len(subject.columns.rows))]
        found = [row.tokens(columns) for row in subject.columns.rows]
        slots = np.stack([each.at(*one) for each, one in zip(numbered, found, strict=True)])
        first_new = np.array([[each.known] for each in numbered])
        starts = [each.start_of(nodes) + indices for each, (nodes, indices) in zip(numbered, found, strict=True)]

        def rows(values: Any) -> Tensor:
            return torch.from_numpy(np.asarray(values)).repeat_interleave(repeats, 0).to(device)

        return cls(
            columns,
            rows(np.stack([indices for _, indices in found])),
            rows(slots >= first_new),
            rows(slots),
            None if subject.grows else rows(np.stack(starts)),
            repeats,
            [nodes for nodes, _ in found],
            [(*each.names, "") for each in numbered],
        )

    @cached_property
    def names(self) -> list[list[str]]:
        one = [[names[node] for node in nodes] for nodes, names in zip(self._nodes, self._names, strict=True)]
        return [names for names in one for _ in range(self.repeats)]

    def of(self, table: Tensor) -> Tensor:
        """What a table ``[rows, slots + 1]`` of :meth:`Subject.table` says of each token, ``[B, n]``."""
        rows = torch.arange(len(self.slots), device=self.slots.device) // self.repeats
        return table.to(self.slots.device)[rows[:, None], self.slots]


@dataclass(frozen=True, eq=False)
class State:
    """One layer in one forward: what an operation is given beside the numbers.

    Attributes
    ----------
    layer : int
    queries : Tokens
        The tokens that go through the layer: all of a prompt, one that is being generated, or a program's next few.
    keys : Tokens
        All tokens that there are so far, those before the queries too.
    call : Call or None
        The call of the layer's attention, for an operation on scores: query, key and value.
    """

    layer: int
    queries: Tokens
    call: Call | None
    _keys: Callable[[], Tokens]

    @property
    def keys(self) -> Tokens:
        return self._keys()


@dataclass(frozen=True, eq=False)
class Selection:
    """Tokens that an operation names, found again in every forward: ``table`` is ``[rows, slots + 1]`` bool."""

    table: Tensor

    @classmethod
    def build(
        cls,
        subject: Subject,
        where: Where | None,
        rows: Sequence[int] | None = None,
        *,
        generated: bool = False,
        what: str = "the selection",
    ) -> Selection:
        """``where`` in each text of ``rows`` (all of them for None), and with ``generated`` all that is written there.

        None is every token that is known beforehand but the last of every sink. Naming a node that the model writes names its
        header and what is written. ``what`` is said in errors.
        """
        return cls(subject.table(what, selected(subject, where, rows, generated=generated)))

    def at(self, tokens: Tokens) -> Tensor:
        """Which of these tokens are among them, ``[B, n]`` bool."""
        return tokens.of(self.table)


def selected(subject: Subject, where: Where | None, rows: Sequence[int] | None, *, generated: bool) -> list[Tensor]:
    """For each text its slots that are named, ``[slots]`` bool."""
    chosen = checked_rows(rows, len(subject.texts))
    found = [torch.zeros(text.slots.count, dtype=torch.bool) for text in subject.texts]
    for p in chosen:
        text = subject.texts[p]
        slots = all_but_the_last(text) if where is None else tokens_at(text, where)
        found[p][torch.tensor(slots + text.new if generated else slots, dtype=torch.long)] = True
    return found


def all_but_the_last(text: Text) -> list[int]:
    """Every token but the last of every sink: what Ben Artzy and Schwartz (arXiv 2409.03621) manipulate."""
    lasts = set(text.lasts)
    return [slot for slot in text.known if slot not in lasts]


class Operation(Protocol):
    """Something to do to a model while it runs a prompt or a program.

    One of your own is any object with this method; see docs/extending.md.
    """

    def bind(self, subject: Subject) -> Any:
        """The operation once it knows what will run: names are resolved and everything is checked, before anything runs.

        What comes back has one or more of these methods, each of which gets a :class:`State`:

        ``edit(state, hidden)``
            The input of ``state.layer``, ``[B, Q, d]``, edited.
        ``scores(state, scores, visible)``
            The scaled (and soft-capped) scores of ``state.layer``, ``[B, H, Q, K]``, changed; ``visible`` broadcasts to them.
            With a method ``touches(layer)``, only in layers for which it is true.
        ``attended(state, output)``
            What the attention sublayer of ``state.layer`` adds to the residual stream, ``[B, Q, d]``, changed.
        """


def doing(bound: Sequence[Any], method: str) -> list[Any]:
    """The bound operations that have a method."""
    return [operation for operation in bound if hasattr(operation, method)]
