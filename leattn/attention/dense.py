"""Transformers' own eager and scaled_dot_product_attention, under a dense mask."""

from __future__ import annotations

import torch

from leattn.attention.request import LayerAttention, Need, Request, UnderMask
from leattn.model.facts import Facts


class Eager:
    """Scores plus an additive mask; the one that returns attention weights. A boolean mask would be *added*."""

    name = "eager"
    implementation = "eager"
    carries: tuple[Need, ...] = ("weights", "scores", "mask", "additive mask", "padding", "dropout")

    def refusal(self, facts: Facts, device: torch.device) -> str | None:
        del facts, device  # every model that can be served at all runs eager
        return None

    def attention(self, request: Request) -> LayerAttention:
        """Under ``[B, 1 or H, Q, K]`` in the model's dtype."""
        return UnderMask("eager", request.additive())


class Sdpa:
    """A boolean mask, or an additive one where the user's own is; none where the model would do the same without."""

    name = "sdpa"
    implementation = "sdpa"
    carries: tuple[Need, ...] = ("scores", "mask", "additive mask", "padding", "dropout")

    def refusal(self, facts: Facts, device: torch.device) -> str | None:
        del device
        if facts.softcap:
            return "sdpa has no soft-cap on attention scores and would leave it out; use backend='eager' or 'flex'"
        if facts.sinks:
            return "sdpa has no attention sinks and would leave them out; use backend='eager'"
        if not facts.supports_sdpa:
            return f"transformers does not run {facts.family} through sdpa; use backend='eager'"
        return None

    def attention(self, request: Request) -> LayerAttention:
        """Under ``[B, 1 or H, Q, K]``, or None for plain text."""
        if request.is_plain:
            return UnderMask("sdpa", None)
        is_additive = request.user is not None and not request.user.is_boolean
        return UnderMask("sdpa", request.additive() if is_additive else request.allowed())
