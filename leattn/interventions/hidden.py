"""Operations on hidden states: Freeze, SkipAttention, Inject.

After Ben Artzy and Schwartz, *Attend First, Consolidate Later* (arXiv 2409.03621). ``h_l[t]`` is the input of layer l at token
t; layers count from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from leattn.dag.node import ICLNode
from leattn.errors import LeattnError, choices
from leattn.interventions.operation import Layers, Selection, State, Subject, checked_layers, checked_rows
from leattn.interventions.where import Place, Where, known_tokens_at


@dataclass(frozen=True)
class Freeze:
    """From a layer on, the tokens keep the state they had: ``h_l[t] := c_t`` before every layer l ≥ ``layer``.

    ``source="input"`` holds ``c_t = h_layer[t]``; ``"previous"`` holds ``h_{layer−1}[t]``, as the published code does. A
    layer past the last changes nothing.
    """

    layer: int
    tokens: Where | None = None
    source: Literal["input", "previous"] = "input"
    rows: Sequence[int] | None = None
    generated: bool = False

    def bind(self, subject: Subject) -> _Freeze:
        if self.source not in ("input", "previous"):
            raise LeattnError(choices("source", self.source, ("input", "previous")))
        if self.layer < 0:
            raise LeattnError(f"Freeze names layer {self.layer}; layers count from 0")
        if self.source == "previous" and self.layer == 0:
            raise LeattnError("Freeze(layer=0, source='previous') has no layer before; use source='input' or a later layer")
        return _Freeze(self, Selection.build(subject, self.tokens, self.rows, generated=self.generated, what="Freeze"))


class _Freeze:
    def __init__(self, operation: Freeze, selection: Selection) -> None:
        self.operation, self.selection = operation, selection
        self.held: torch.Tensor | None = None

    def edit(self, state: State, hidden: torch.Tensor) -> torch.Tensor:
        start = self.operation.layer
        if state.layer == (start if self.operation.source == "input" else start - 1):
            self.held = hidden
        if state.layer < start or self.held is None:
            return hidden
        selected = self.selection.at(state.queries)
        return torch.where(selected[..., None], self.held.to(hidden.device), hidden)


@dataclass(frozen=True)
class SkipAttention:
    """In each of the layers the attention sublayer adds nothing to the residual stream, for all tokens, at every step.

    In LLaMA ``h_{l+1} = h_l + MLP(norm(h_l))``. Keys and values are still written.
    """

    layers: Layers

    def bind(self, subject: Subject) -> _Skip:
        return _Skip(checked_layers("SkipAttention", self.layers, subject.layers))


class _Skip:
    def __init__(self, layers: frozenset[int]) -> None:
        self.layers = layers

    def attended(self, state: State, output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output) if state.layer in self.layers else output


@dataclass(frozen=True, eq=False)
class Inject:
    """Once, at each of the layers, tokens get other states: ``h_k[t] := v``.

    ``states`` maps a place (node, id, index, span) to a tensor ``[n, d]``, n being its tokens, or ``[d]`` for one token. They
    usually come from :func:`capture`. Of a node that the model writes only the header's tokens are known beforehand: give
    states for those.
    """

    layer: Layers
    states: Mapping[Place, torch.Tensor]
    rows: Sequence[int] | None = None

    def bind(self, subject: Subject) -> _Inject:
        chosen = checked_layers("Inject", self.layer, subject.layers)
        vectors: dict[Place, torch.Tensor] = {}
        first: dict[Place, int] = {}
        count = 1  # entry 0 is nothing
        for place, value in self.states.items():
            vectors[place], first[place] = value[None] if value.dim() == 1 else value, count
            count += len(vectors[place]) if value.dim() else 0
        entries = [torch.zeros(text.slots.count, dtype=torch.long) for text in subject.texts]
        for p in checked_rows(self.rows, len(subject.texts)):
            for place, given in vectors.items():
                slots = known_tokens_at(subject.texts[p], place)
                if given.dim() != 2 or len(given) != len(slots):
                    raise LeattnError(
                        f"Inject at {_name(place)} has states {list(self.states[place].shape)} for {len(slots)} tokens; "
                        f"give [{len(slots)}, hidden size]"
                    )
                entries[p][torch.tensor(slots, dtype=torch.long)] = torch.arange(first[place], first[place] + len(given))
        channels = {given.shape[1] for given in vectors.values()}
        if len(channels) > 1:
            raise LeattnError(f"Inject has states of {' and of '.join(map(str, sorted(channels)))} channels; give one model's")
        return _Inject(chosen, subject.table("Inject", entries), [given.detach() for given in vectors.values()])


class _Inject:
    """``entries`` ``[rows, slots + 1]``: which of the vectors each token gets, counted from 1; 0 for none."""

    def __init__(self, layers: frozenset[int], entries: torch.Tensor, vectors: Sequence[torch.Tensor]) -> None:
        self.layers, self.entries = layers, entries
        self.vectors = torch.cat([one.to(vectors[0]) for one in vectors]) if vectors else None

    def edit(self, state: State, hidden: torch.Tensor) -> torch.Tensor:
        if state.layer not in self.layers or self.vectors is None:
            return hidden
        if self.vectors.shape[1] != hidden.shape[-1]:
            raise LeattnError(f"Inject has states of {self.vectors.shape[1]} channels, the model has {hidden.shape[-1]}")
        entries = state.queries.of(self.entries)
        if not entries.any():
            return hidden
        values = self.vectors.to(hidden)[(entries - 1).clamp(min=0)]
        return torch.where((entries > 0)[..., None], values, hidden)


def _name(place: Place) -> str:
    return repr(str(place)) if isinstance(place, (str, ICLNode)) else str(place)
