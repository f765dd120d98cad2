"""HF's own scaled_dot_product_attention with a boolean mask."""

from __future__ import annotations

import torch

from leattn.attention.batch import Batch, MaskRequest
from leattn.attention.kinds import ModelFacts


class Sdpa:
    name = "sdpa"
    implementation = "sdpa"
    function = None

    def refusal(self, facts: ModelFacts) -> str | None:
        if facts.softcap:
            return "sdpa has no soft-cap on attention scores and would leave it out; use backend='eager' or 'flex'"
        if facts.sinks:
            return "sdpa has no attention sinks and would leave them out; use backend='eager'"
        if not facts.supports_sdpa:
            return f"transformers does not run {facts.family} through sdpa; use backend='eager'"
        return None

    def mask(self, batch: Batch, request: MaskRequest) -> torch.Tensor:
        """``[B, 1 or H, Q, K]`` bool, or additive where the user's own mask is."""
        if batch.user_mask is not None and batch.user_mask.dtype != torch.bool:
            return batch.additive(request)
        return batch.allowed(request)
