"""Operations that draw: RandomNoise and Shuffle. Every draw is of one token's vector.

After Ben Artzy and Schwartz, *Attend First, Consolidate Later* (arXiv 2409.03621).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from leattn.errors import LeattnError, choices
from leattn.interventions.operation import Layers, State, Subject, checked_layers, checked_rows, selected
from leattn.interventions.where import Where, tokens_at

Seeding: TypeAlias = Literal["own", "published"]


@dataclass(frozen=True)
class RandomNoise:
    """Once, at each of the layers: the tokens' states become random directions of the same norm.

    ``h_k[t] := v / ‖v‖ · ‖h_k[t]‖`` with v standard normal in the model's dtype. The draw depends on the seed, the layer, the
    name of the token's node and its index there, so that it is the same with and without a cache, alone and in a batch, in a
    program and in what that wrote. A ``torch.Generator`` as seed is drawn from once per :func:`intervene`.

    ``angle``, in degrees: the new state stands at this angle to the old one, in a random direction,
    ``h_k[t] := cos(angle) · h_k[t] + sin(angle) · o`` with o a random direction across ``h_k[t]`` of its norm.

    ``seeding="published"`` draws as the published code does: from torch's global generator (``torch.manual_seed``), once per
    token in the order in which ``tokens`` names them, anew in every forward. The seed is then not used. Not in programs, whose
    forwards are others.
    """

    layer: Layers
    tokens: Where | None = None
    seed: int | torch.Generator = 0
    seeding: Seeding = "own"
    angle: float | None = None
    rows: Sequence[int] | None = None
    generated: bool = False

    def bind(self, subject: Subject) -> _PerToken:
        published = _is_published(self.seeding, subject)
        seed = _seed(self.seed)
        turn = None if self.angle is None else math.radians(self.angle)

        def noise(layer: int, token: _Token, vector: torch.Tensor) -> torch.Tensor:
            if published:
                v = torch.randn_like(vector)
            else:
                v = torch.randn(len(vector), generator=_generator(seed, layer, token)).to(vector)
            if turn is None:
                return _as_long(v, vector)
            across = v - torch.dot(vector, v) / vector.norm() ** 2 * vector
            return math.cos(turn) * vector + math.sin(turn) * _as_long(across, vector)

        chosen = checked_layers("RandomNoise", self.layer, subject.layers)
        keys = _keys(subject, "RandomNoise", self.tokens, self.rows, self.generated)
        return _PerToken(chosen, keys, noise, _turns(subject, self.tokens, self.rows) if published else None)


@dataclass(frozen=True)
class Shuffle:
    """Once, at each of the layers: the **channels** of each token's state are permuted, a fresh permutation per token.

    ``seeding="published"`` uses the CPU ``randperm(d)`` of a generator seeded with ``layer · t``, t the token's index in
    its prompt, which a program's tokens have not before everything is written.
    """

    layer: Layers
    tokens: Where | None = None
    seed: int | torch.Generator = 0
    seeding: Seeding = "own"
    rows: Sequence[int] | None = None
    generated: bool = False

    def bind(self, subject: Subject) -> _PerToken:
        published = _is_published(self.seeding, subject)
        seed = _seed(self.seed)

        def shuffle(layer: int, token: _Token, vector: torch.Tensor) -> torch.Tensor:
            if token.in_prompt is not None and published:
                generator = torch.Generator().manual_seed(layer * token.in_prompt)
            else:
                generator = _generator(seed, layer, token)
            return vector[torch.randperm(len(vector), generator=generator).to(vector.device)]

        chosen = checked_layers("Shuffle", self.layer, subject.layers)
        return _PerToken(chosen, _keys(subject, "Shuffle", self.tokens, self.rows, self.generated), shuffle)


class _Token(NamedTuple):
    """Where a token stands in the model's input, the key of its node's name, its place there, and its index in its prompt."""

    row: int
    column: int
    node: int
    place: int
    in_prompt: int | None


class _PerToken:
    """Applies ``change(layer, token, vector [d]) → vector`` to the chosen tokens of the chosen layers.

    ``keys`` ``[rows, slots + 1]`` has that of its node's name for each of them, and 0 for the others. ``turns``: for each
    prompt whose turn it is when, by token index; in ascending order for None.
    """

    def __init__(
        self, layers: frozenset[int], keys: torch.Tensor, change: Any, turns: Sequence[Mapping[int | None, int]] | None = None
    ) -> None:
        self.layers, self.keys, self.change, self.turns = layers, keys, change, turns

    def edit(self, state: State, hidden: torch.Tensor) -> torch.Tensor:
        if state.layer not in self.layers:
            return hidden
        queries = state.queries
        keys = queries.of(self.keys)
        rows, columns = where = keys.nonzero(as_tuple=True)
        if not len(rows):
            return hidden
        in_prompt = [None] * len(rows) if queries.in_prompt is None else queries.in_prompt[where].tolist()
        facts = (rows.tolist(), columns.tolist(), keys[where].tolist(), queries.indices[where].tolist(), in_prompt)
        tokens = [_Token(*one) for one in zip(*facts, strict=True)]
        if self.turns is not None:
            turns = self.turns
            tokens.sort(key=lambda one: (one.row, turns[one.row // queries.repeats].get(one.in_prompt, one.in_prompt or 0)))
        changed = [self.change(state.layer, token, hidden[token.row, token.column]) for token in tokens]
        where = tuple(torch.tensor([one[:2] for one in tokens], device=hidden.device).T)
        return hidden.index_put(where, torch.stack(changed))


def _seed(seed: int | torch.Generator) -> int:
    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**62, (1,), generator=seed, device=seed.device))
    return seed


def _is_published(seeding: str, subject: Subject) -> bool:
    if seeding not in ("own", "published"):
        raise LeattnError(choices("seeding", seeding, ("own", "published")))
    if seeding == "published" and subject.grows:
        raise LeattnError(
            "seeding='published' goes by the order of tokens in one forward over a prompt, and a program has several forwards "
            "in another order; use seeding='own', or run result.realised as a prompt"
        )
    return seeding == "published"


def _keys(subject: Subject, what: str, tokens: Where | None, rows: Sequence[int] | None, generated: bool) -> torch.Tensor:
    """For each chosen slot a number made of its node's name, 0 for the others, ``[rows, slots + 1]``."""
    wanted = []
    for text, chosen in zip(subject.texts, selected(subject, tokens, rows, generated=generated), strict=True):
        keys = torch.zeros(len(chosen), dtype=torch.long)
        for name in text.names:
            slots = torch.tensor(text.slots_of(name), dtype=torch.long)
            keys[slots] = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest()) + 1
        wanted.append(keys * chosen)
    return subject.table(what, wanted)


def _turns(subject: Subject, tokens: Where | None, rows: Sequence[int] | None) -> list[dict[int | None, int]]:
    """For each prompt the place of every token in ``tokens``; nothing where they come in ascending order."""
    turns: list[dict[int | None, int]] = [{} for _ in subject.texts]
    if tokens is None:
        return turns
    for p in checked_rows(rows, len(subject.texts)):
        turns[p] = {token: turn for turn, token in enumerate(tokens_at(subject.texts[p], tokens))}
    return turns


def _as_long(v: torch.Tensor, as_this: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = v / v.norm() * as_this.norm()
    return scaled


def _generator(seed: int, layer: int, token: _Token) -> torch.Generator:
    return torch.Generator().manual_seed(hash((seed, layer, token.node, token.place)) % 2**63)
