"""Operations on attention scores, in the manner of AtMan (Deiseroth et al., arXiv 2301.08110): Suppress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from leattn.attention.around import Call
from leattn.attention.reading import scaled_scores
from leattn.errors import BackendError, LeattnError, choices
from leattn.interventions.operation import Layers, Selection, State, Subject, checked_layers, checked_rows
from leattn.interventions.where import Where, tokens_at

Mode = Literal["multiplicative", "additive", "weight"]
MODES = ("multiplicative", "additive", "weight")
Shift = Literal["visible", "all"]
SHIFTS = ("visible", "all")
CACHED = "shift='all' lets later tokens change earlier rows, which a cache cannot follow; use_cache=False, and no program"


@dataclass(frozen=True)
class Suppress:
    """Change how much attention key tokens get, before the softmax, for chosen layers, heads and queries.

    Parameters
    ----------
    tokens
        The key tokens: nodes, ids, indices, spans. A node that the model writes is its header and what is written.
    factor
        One number for all of them, or, where all of them are known beforehand, one per token in the order of ``tokens``.
    mode
        ``"multiplicative"``: ``S'[q,j] = f_j · S[q,j] + (1 − f_j) · m_q`` with ``m_q`` the smallest score that q sees: f < 1
        suppresses, f > 1 amplifies. ``"additive"``: the factor is added to the scaled score. ``"weight"``: the un-normalised
        attention weight is multiplied by f; 0 cuts.
    shift
        ``"visible"``: ``m_q`` over the keys that q sees. ``"all"``: over masked ones too, as published; a future token then
        changes earlier rows, so it is only for reproducing published numbers and is refused with a cache, and so in programs.
    layers, heads
        All of them for None.
    queries
        The query tokens it holds for; all of them, generated ones included, for None.
    generated
        Where ``queries`` are named: whether it holds for generated tokens, too. ``queries=[]`` is those alone.
    rows
        Prompts of a batch; all of them for None.
    """

    tokens: Where
    factor: float | Sequence[float]
    mode: Mode = "multiplicative"
    shift: Shift = "visible"
    layers: Layers | None = None
    heads: int | Sequence[int] | None = None
    queries: Where | None = None
    generated: bool = False
    rows: Sequence[int] | None = None

    def bind(self, subject: Subject) -> BoundSuppress:
        heads = subject.heads
        if self.mode not in MODES:
            raise LeattnError(choices("mode", self.mode, MODES))
        if self.shift not in SHIFTS:
            raise LeattnError(choices("shift", self.shift, SHIFTS))
        chosen = None if self.heads is None else [self.heads] if isinstance(self.heads, int) else list(self.heads)
        for head in chosen or ():
            if not 0 <= head < heads:
                raise LeattnError(f"Suppress names head {head}; this model has heads 0 to {heads - 1}")
        neutral = 0.0 if self.mode == "additive" else 1.0
        if self.shift == "all" and subject.grows:
            raise BackendError(CACHED)
        wanted = [torch.full((text.slots.count,), neutral) for text in subject.texts]
        for p in checked_rows(self.rows, len(subject.texts)):
            text = subject.texts[p]
            tokens = tokens_at(text, self.tokens)
            if not isinstance(self.factor, (int, float)) and any(map(text.is_written, tokens)):
                raise LeattnError(
                    "Suppress has a factor per token, and how many tokens will be written is not known; give one number"
                )
            given = [float(self.factor)] * len(tokens) if isinstance(self.factor, (int, float)) else list(self.factor)
            if len(given) != len(tokens):
                raise LeattnError(
                    f"Suppress has {len(given)} factors for {len(tokens)} tokens; give one number, or one per token"
                )
            if self.mode == "weight" and min(given, default=0.0) < 0:
                raise LeattnError(f"a weight is multiplied by {min(given)}; weights stay positive, so give a factor >= 0")
            wanted[p][torch.tensor(tokens, dtype=torch.long)] = torch.tensor(given, dtype=torch.float)
        factors = subject.table("Suppress", wanted, neutral)
        queries = None
        if self.queries is not None:
            queries = Selection.build(subject, self.queries, self.rows, generated=self.generated, what="Suppress")
        named = checked_layers("Suppress", self.layers, subject.layers)
        return BoundSuppress(self, named, chosen, factors, neutral, queries)


@dataclass(frozen=True, eq=False)
class BoundSuppress:
    """A :class:`Suppress` that knows what runs: ``factors`` ``[rows, slots + 1]``, ``neutral`` where nothing is asked."""

    operation: Suppress
    layers: frozenset[int]
    heads: list[int] | None
    factors: torch.Tensor
    neutral: float
    queries: Selection | None

    def touches(self, layer: int) -> bool:
        """Whether anything changes in a layer; its scores are not computed twice for nothing."""
        return layer in self.layers and bool((self.factors != self.neutral).any())

    def scores(self, state: State, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Scaled (and soft-capped) scores ``[B, H, Q, K]``, changed where asked; ``visible`` broadcasts to them."""
        if self.operation.shift == "all" and state.queries.columns.start > 0:
            raise BackendError(CACHED)
        factors = state.keys.of(self.factors).to(scores)[:, None, None]  # [B, 1, 1, K]
        if self.operation.mode == "multiplicative":
            everything = scores if self.operation.shift == "all" else scores.masked_fill(~visible, torch.inf)
            least = everything.amin(-1, keepdim=True)
            changed = factors * scores + (1 - factors) * least
        elif self.operation.mode == "additive":
            changed = scores + factors
        else:
            changed = scores + factors.log().clamp(min=torch.finfo(scores.dtype).min / 4)
        asked = factors != self.neutral
        if self.queries is not None:
            asked = asked & self.queries.at(state.queries)[:, None, :, None]
        if self.heads is not None:
            of_heads = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
            of_heads[self.heads] = True
            asked = asked & of_heads[:, None, None]
        return torch.where(asked, changed, scores)


class ChangedScores:
    """All score operations of a block, around a backend's attention: what they change becomes part of its mask."""

    def __init__(self, operations: Sequence[Any], state: Callable[[Call], State]) -> None:
        self.operations, self.state = operations, state

    def before(self, call: Call) -> torch.Tensor | None:
        mask: torch.Tensor | None = call.mask
        operations = [one for one in self.operations if not hasattr(one, "touches") or one.touches(call.layer)]
        if not operations:
            return mask
        scores = raw_scores(call)
        if mask is None:  # plain text
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(
                scores.shape[-1] - scores.shape[-2]
            )
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        changed, state = scores, self.state(call)
        for operation in operations:
            changed = operation.scores(state, changed, visible)
        if torch.equal(changed, scores):
            return mask if call.mask is not None else None
        added = torch.zeros_like(mask, dtype=call.query.dtype).masked_fill(~visible, torch.finfo(call.query.dtype).min)
        added = added if mask.dtype == torch.bool else mask
        return (added + (changed - scores).to(added.dtype)).clamp(min=torch.finfo(added.dtype).min)

    def after(self, call: Call) -> None:
        """Nothing to look at."""


def raw_scores(call: Call) -> torch.Tensor:
    """Scaled scores of a call before mask and softmax, soft-capped where the model does so, ``[B, H, Q, K]``."""
    return scaled_scores(call.query, call.key, call.scaling, call.softcap)
