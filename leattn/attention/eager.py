"""HF's own eager attention: scores plus an additive mask, and the one that returns attention weights."""

from __future__ import annotations

import torch

from leattn.attention.batch import Batch, MaskRequest
from leattn.attention.kinds import ModelFacts


class Eager:
    name = "eager"
    implementation = "eager"
    function = None

    def refusal(self, facts: ModelFacts) -> str | None:
        del facts  # every model that can be served at all runs eager
        return None

    def mask(self, batch: Batch, request: MaskRequest) -> torch.Tensor:
        """``[B, 1 or H, Q, K]`` in the model's dtype. A boolean mask would be *added*: silently wrong."""
        return batch.additive(request)
