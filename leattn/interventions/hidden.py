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
from leattn.interventions.where import Place, Where, tokens_at


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
        return _Freeze(self, Selection.build(subject, self.tokens, self.rows, generated=self.generated))


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
        selected = self.selection.at(state.queries, state.repeats, hidden.device)
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

    def attended(self, layer: int, output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output) if layer in self.layers else output


@dataclass(frozen=True, eq=False)
class Inject:
    """Once, at each of the layers, tokens get other states: ``h_k[t] := v``.

    ``states`` maps a place (node, id, index, span) to a tensor ``[n, d]``, n being its tokens, or ``[d]`` for one token. They
    usually come from :func:`capture`.
    """

    layer: Layers
    states: Mapping[Place, torch.Tensor]
    rows: Sequence[int] | None = None

    def bind(self, subject: Subject) -> _Inject:
        chosen = checked_layers("Inject", self.layer, subject.layers)
        prompts, width = subject.prompts, subject.columns.width
        entries = []
        for p in checked_rows(self.rows, len(prompts)):
            prompt = prompts[p]
            for place, value in self.states.items():
                tokens = tokens_at(prompt, place)
                vectors = value[None] if value.dim() == 1 else value
                if vectors.dim() != 2 or len(vectors) != len(tokens):
                    raise LeattnError(
                        f"Inject at {_name(place)} has states {list(value.shape)} for {len(tokens)} tokens; "
                        f"give [{len(tokens)}, hidden size]"
                    )
                order = torch.tensor(tokens) + width - len(prompt)
                entries.append((p, order, vectors))
        return _Inject(chosen, entries, len(prompts), width)


class _Inject:
    def __init__(
        self, layers: frozenset[int], entries: Sequence[tuple[int, torch.Tensor, torch.Tensor]], prompts: int, columns: int
    ) -> None:
        self.layers = layers
        self.mask = torch.zeros(prompts, columns, dtype=torch.bool)
        width = entries[0][2].shape[1] if entries else 0
        self.values = torch.zeros(prompts, columns, width, dtype=entries[0][2].dtype if entries else torch.float32)
        for p, order, vectors in entries:
            if vectors.shape[1] != width:
                raise LeattnError(f"Inject has states of {width} and of {vectors.shape[1]} channels; give one model's")
            self.mask[p, order] = True
            self.values[p, order] = vectors.detach().to(self.values)

    def edit(self, state: State, hidden: torch.Tensor) -> torch.Tensor:
        if state.layer not in self.layers or state.queries.start >= self.mask.shape[1]:
            return hidden
        if self.values.shape[2] not in (0, hidden.shape[-1]):
            raise LeattnError(f"Inject has states of {self.values.shape[2]} channels, the model has {hidden.shape[-1]}")
        stop = min(state.queries.stop, self.mask.shape[1])
        part = slice(state.queries.start, stop)
        mask = self.mask[:, part].repeat_interleave(state.repeats, 0).to(hidden.device)
        values = self.values[:, part].repeat_interleave(state.repeats, 0).to(hidden)
        if not mask.any():
            return hidden
        edited = torch.where(mask[..., None], values, hidden[:, : mask.shape[1]])
        return torch.cat([edited, hidden[:, mask.shape[1] :]], 1)


def _name(place: Place) -> str:
    return repr(str(place)) if isinstance(place, (str, ICLNode)) else str(place)
