"""Operations that draw: RandomNoise and Shuffle. Every draw is of one token's vector.

After Ben Artzy and Schwartz, *Attend First, Consolidate Later* (arXiv 2409.03621).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from leattn.errors import LeattnError, choices
from leattn.interventions.operation import Layers, Selection, State, Subject, checked_layers, checked_rows
from leattn.interventions.where import Where, tokens_at

Seeding: TypeAlias = Literal["own", "published"]


@dataclass(frozen=True)
class RandomNoise:
    """Once, at each of the layers: the tokens' states become random directions of the same norm.

    ``h_k[t] := v / ‖v‖ · ‖h_k[t]‖`` with v standard normal in the model's dtype. The draw depends on the seed, the layer and
    the token's index in its prompt, so that it is the same with and without a cache, alone and in a batch. A
    ``torch.Generator`` as seed is drawn from once per :func:`intervene`.

    ``angle``, in degrees: the new state stands at this angle to the old one, in a random direction,
    ``h_k[t] := cos(angle) · h_k[t] + sin(angle) · o`` with o a random direction across ``h_k[t]`` of its norm.

    ``seeding="published"`` draws as the published code does: from torch's global generator (``torch.manual_seed``), once per
    token in the order in which ``tokens`` names them, anew in every forward. The seed is then not used.
    """

    layer: Layers
    tokens: Where | None = None
    seed: int | torch.Generator = 0
    seeding: Seeding = "own"
    angle: float | None = None
    rows: Sequence[int] | None = None
    generated: bool = False

    def bind(self, subject: Subject) -> _PerToken:
        published = _is_published(self.seeding)
        seed = _seed(self.seed)
        turn = None if self.angle is None else math.radians(self.angle)

        def noise(state: State, token: int, vector: torch.Tensor) -> torch.Tensor:
            if published:
                v = torch.randn_like(vector)
            else:
                v = torch.randn(len(vector), generator=_generator(seed, state.layer, token)).to(vector)
            if turn is None:
                return _as_long(v, vector)
            across = v - torch.dot(vector, v) / vector.norm() ** 2 * vector
            return math.cos(turn) * vector + math.sin(turn) * _as_long(across, vector)

        chosen = checked_layers("RandomNoise", self.layer, subject.layers)
        selection = Selection.build(subject, self.tokens, self.rows, generated=self.generated)
        return _PerToken(chosen, selection, noise, _turns(subject, self.tokens, self.rows) if published else None)


@dataclass(frozen=True)
class Shuffle:
    """Once, at each of the layers: the **channels** of each token's state are permuted, a fresh permutation per token.

    ``seeding="published"`` uses the CPU ``randperm(d)`` of a generator seeded with ``layer · t``, t the token's index.
    """

    layer: Layers
    tokens: Where | None = None
    seed: int | torch.Generator = 0
    seeding: Seeding = "own"
    rows: Sequence[int] | None = None
    generated: bool = False

    def bind(self, subject: Subject) -> _PerToken:
        published = _is_published(self.seeding)
        seed = _seed(self.seed)

        def shuffle(state: State, token: int, vector: torch.Tensor) -> torch.Tensor:
            if published:
                generator = torch.Generator().manual_seed(state.layer * token)
            else:
                generator = _generator(seed, state.layer, token)
            return vector[torch.randperm(len(vector), generator=generator).to(vector.device)]

        chosen = checked_layers("Shuffle", self.layer, subject.layers)
        return _PerToken(chosen, Selection.build(subject, self.tokens, self.rows, generated=self.generated), shuffle)


class _PerToken:
    """Applies ``change(state, token index, vector [d]) → vector`` to the selected tokens of the chosen layers.

    ``turns``: for each prompt whose turn it is when, by token index; in ascending order for None.
    """

    def __init__(
        self, layers: frozenset[int], selection: Selection, change: Any, turns: Sequence[Mapping[int, int]] | None = None
    ) -> None:
        self.layers, self.selection, self.change, self.turns = layers, selection, change, turns

    def edit(self, state: State, hidden: torch.Tensor) -> torch.Tensor:
        if state.layer not in self.layers:
            return hidden
        selected = self.selection.at(state.queries, state.repeats, hidden.device).nonzero().tolist()
        if not selected:
            return hidden
        tokens = [(row, i, state.token_index(row, state.queries.start + i)) for row, i in selected]
        if self.turns is not None:
            turns = self.turns
            tokens.sort(key=lambda one: (one[0], turns[one[0] // state.repeats].get(one[2], one[2])))
        changed = [self.change(state, token, hidden[row, i]) for row, i, token in tokens]
        where = tuple(torch.tensor([one[:2] for one in tokens], device=hidden.device).T)
        return hidden.index_put(where, torch.stack(changed))


def _seed(seed: int | torch.Generator) -> int:
    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**62, (1,), generator=seed, device=seed.device))
    return seed


def _is_published(seeding: str) -> bool:
    if seeding not in ("own", "published"):
        raise LeattnError(choices("seeding", seeding, ("own", "published")))
    return seeding == "published"


def _turns(subject: Subject, tokens: Where | None, rows: Sequence[int] | None) -> list[dict[int, int]]:
    """For each prompt the place of every token in ``tokens``; nothing where they come in ascending order."""
    turns: list[dict[int, int]] = [{} for _ in subject.prompts]
    if tokens is None:
        return turns
    for p in checked_rows(rows, len(subject.prompts)):
        turns[p] = {token: turn for turn, token in enumerate(tokens_at(subject.prompts[p], tokens))}
    return turns


def _as_long(v: torch.Tensor, as_this: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = v / v.norm() * as_this.norm()
    return scaled


def _generator(seed: int, layer: int, token: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash((seed, layer, token)) % 2**63)
