"""Transformers' own eager and scaled_dot_product_attention, under a dense mask."""

from __future__ import annotations

from leattn.attention.request import NEEDS, Backend, Request, UnderMask
from leattn.model.record import Model


def _eager(request: Request) -> UnderMask:
    """Under ``[B, 1 or H, Q, K]`` in the model's dtype. A boolean mask would be *added*: silently wrong."""
    return UnderMask("eager", request.additive())


def _sdpa(request: Request) -> UnderMask:
    """Under ``[B, 1 or H, Q, K]``, boolean unless the user's own is additive; none where the model would do the same."""
    if request.is_plain:
        return UnderMask("sdpa", None)
    return UnderMask("sdpa", request.additive() if request.is_additive else request.allowed())


def _sdpa_refusal(record: Model) -> str | None:
    facts = record.facts
    if facts.softcap:
        return "sdpa has no soft-cap on attention scores and would leave it out; use backend='eager' or 'flex'"
    if facts.learned_sinks:
        return "sdpa has no attention sinks and would leave them out; use backend='eager'"
    if not facts.supports_sdpa:
        return f"transformers does not run {facts.family} through sdpa; use backend='eager'"
    return None


EAGER = Backend("eager", _eager, implementation="eager", carries=tuple(NEEDS))
SDPA = Backend("sdpa", _sdpa, _sdpa_refusal, "sdpa", ("scores", "mask", "additive mask", "padding", "dropout"))
