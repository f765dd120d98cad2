"""Average: the states of several phrasings become their mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from leattn.errors import LeattnError, choices
from leattn.interventions.operation import Layers, State, Subject, checked_layers, checked_rows
from leattn.interventions.where import Place, tokens_at


@dataclass(frozen=True)
class Average:
    """Once, at each of the layers, the states of several places become their mean: ``h_k[t_p] := mean_p h_k[t_p]``.

    ``places`` are nodes, ids, indices or spans of one prompt, with equally many tokens: the first tokens become their mean,
    the second theirs. None is the last token of every sink, which are the phrasings of an ensemble. With
    ``across="prompts"`` the phrasings are the prompts of a batch instead: the tokens of all places of a prompt, one after the
    other, are averaged with those of the others.

    Raises
    ------
    LeattnError
        On entering the block: places, or prompts, of which one has more tokens than another.

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
        groups: list[list[tuple[int, int]]] = []  # (prompt, column) of those that become one
        of_prompts: list[list[tuple[int, int]]] = []
        for p in checked_rows(self.rows, len(subject.prompts)):
            prompt = subject.prompts[p]
            places = [prompt.spans[sink][1] - 1 for sink in prompt.graph.sinks] if self.places is None else self.places
            left = subject.columns.width - len(prompt)
            columns = [[(p, left + token) for token in tokens_at(prompt, place)] for place in places]
            if self.across == "places":
                groups += _transposed(columns, f"the places in prompt {p}")
            else:
                of_prompts.append([one for place in columns for one in place])
        return _Average(chosen, groups + _transposed(of_prompts, "the prompts"))


class _Average:
    def __init__(self, layers: frozenset[int], groups: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.layers, self.groups = layers, groups

    def edit(self, state: State, hidden: torch.Tensor) -> torch.Tensor:
        if state.layer not in self.layers:
            return hidden
        edited = hidden
        for group in self.groups:
            if not all(column in state.queries for _, column in group):
                continue  # a step of decoding, whose token is none of the prompt's
            for repeat in range(state.repeats):
                rows = torch.tensor([p * state.repeats + repeat for p, _ in group], device=hidden.device)
                columns = torch.tensor([column - state.queries.start for _, column in group], device=hidden.device)
                mean = hidden[rows, columns].mean(0)
                edited = edited.index_put((rows, columns), mean.expand(len(group), -1))
        return edited


def _transposed(columns: Sequence[Sequence[tuple[int, int]]], what: str) -> list[list[tuple[int, int]]]:
    """The i-th token of every one, for each i."""
    counts = [len(one) for one in columns]
    if len(set(counts)) > 1:
        raise LeattnError(f"Average: {what} name {', '.join(map(str, counts))} tokens; choose equally many")
    return [list(group) for group in zip(*columns, strict=True)]
