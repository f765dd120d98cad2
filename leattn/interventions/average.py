"""Average: the states of several phrasings become their mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from leattn.errors import BackendError, LeattnError, choices
from leattn.interventions.operation import Layers, State, Subject, checked_layers, checked_rows
from leattn.interventions.where import Place, known_tokens_at

Slot: TypeAlias = tuple[int, int]
"""A row, and a slot in it."""


@dataclass(frozen=True)
class Average:
    """Once, at each of the layers, the states of several places become their mean: ``h_k[t_p] := mean_p h_k[t_p]``.

    ``places`` are nodes, ids, indices or spans of one prompt, with equally many tokens: the first tokens become their mean,
    the second theirs. None is the last token of every sink, which are the phrasings of an ensemble. With
    ``across="prompts"`` the phrasings are the prompts of a batch instead: the tokens of all places of a prompt, one after the
    other, are averaged with those of the others. Of a node that the model writes it is the header's tokens.

    Raises
    ------
    LeattnError
        On entering the block: places, or prompts, of which one has more tokens than another.
    BackendError
        In a program, or a prefill in chunks: tokens of one mean that go through the model in different forwards.

    Examples
    --------
    >>> import leattn
    >>> from leattn.interventions import Average, capture, intervene
    >>> model, tokenizer = leattn.tiny.load()
    >>> asks = [leattn.ICLNode(text) for text in ("What is the capital of Zarvia?", "Name the capital of Zarvia.")]
    >>> prompt = leattn.compile_prompt(asks, tokenizer)
    >>> with intervene(model, prompt, [Average(2)]):
    ...     states = capture(model, prompt, layer=2)
    >>> bool((states[asks[0]][-1] == states[asks[1]][-1]).all())
    True
    """

    layer: Layers
    places: Sequence[Place] | None = None
    across: Literal["places", "prompts"] = "places"
    rows: Sequence[int] | None = None

    def bind(self, subject: Subject) -> _Average:
        if self.across not in ("places", "prompts"):
            raise LeattnError(choices("across", self.across, ("places", "prompts")))
        chosen = checked_layers("Average", self.layer, subject.layers)
        groups: list[list[Slot]] = []  # those that become one
        of_prompts: list[list[Slot]] = []
        for p in checked_rows(self.rows, len(subject.texts)):
            text = subject.texts[p]
            named = (
                [[last] for last in text.lasts] if self.places is None else [known_tokens_at(text, at) for at in self.places]
            )
            slots = [[(text.row, slot) for slot in place] for place in named]
            if self.across == "places":
                groups += _transposed(slots, f"the places in prompt {p}")
            else:
                of_prompts.append([one for place in slots for one in place])
        groups += _transposed(of_prompts, "the prompts")
        return _Average(chosen, groups, max(text.slots.count for text in subject.texts))


class _Average:
    """``groups`` of slots by row, those of each mean; a row has ``slots`` at most."""

    def __init__(self, layers: frozenset[int], groups: Sequence[Sequence[Slot]], slots: int) -> None:
        self.layers, self.groups, self.slots = layers, groups, slots

    def edit(self, state: State, hidden: torch.Tensor) -> torch.Tensor:
        if state.layer not in self.layers:
            return hidden
        edited, repeats = hidden, state.queries.repeats
        here = torch.full((len(hidden), self.slots + 1), -1)  # the place of each slot among the queries
        here.scatter_(1, state.queries.slots.cpu() % (self.slots + 1), torch.arange(hidden.shape[1]).expand(len(hidden), -1))
        for group in self.groups:
            found = [int(here[row * repeats, slot]) for row, slot in group]
            if max(found) < 0:
                continue  # a step whose tokens are others
            if min(found) < 0:
                present = state.queries.names[group[found.index(max(found))][0] * repeats][max(found)]
                raise BackendError(
                    f"Average: a token of {present!r} goes through the model in another forward than those it is to be "
                    "averaged with (one waits for the other, a token_budget, a prefill in chunks); let all of them go in one, "
                    "as in one forward over a compiled prompt"
                )
            for repeat in range(repeats):
                rows = torch.tensor([row * repeats + repeat for row, _ in group], device=hidden.device)
                columns = torch.tensor(found, device=hidden.device)
                mean = hidden[rows, columns].mean(0)
                edited = edited.index_put((rows, columns), mean.expand(len(group), -1))
        return edited


def _transposed(columns: Sequence[Sequence[Slot]], what: str) -> list[list[Slot]]:
    """The i-th token of every one, for each i."""
    counts = [len(one) for one in columns]
    if len(set(counts)) > 1:
        raise LeattnError(f"Average: {what} name {', '.join(map(str, counts))} tokens; choose equally many")
    return [list(group) for group in zip(*columns, strict=True)]
