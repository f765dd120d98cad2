"""Transformers' own eager and scaled_dot_product_attention, under a dense mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leattn.attention.group import select
from leattn.attention.reading import active, in_window, moved_query, read_scores, scaled_scores
from leattn.attention.request import NEEDS, Backend, Request, UnderMask
from leattn.errors import BackendError
from leattn.model.record import Model
from leattn.prompt.masks import additive
from leattn.prompt.stretch import Stretch, columns_in


@dataclass(frozen=True)
class ReadUnderMask(UnderMask):
    """The same where nodes read groups in other ways: what their scores change by is added to the mask, layer by layer."""

    request: Request

    def __call__(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        readings = active(self.request.columns.readings, module)
        mask = self.mask
        if readings:
            scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap")
            mask = self._mask(module, query, key, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
        return UnderMask(self.implementation, mask)(module, query, key, value, **kwargs)

    def _mask(self, module: torch.nn.Module, query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """``[B, H, Q, K]`` to add to the scores."""
        request, heads = self.request, query.shape[1]
        plain = self.mask if self.mask.is_floating_point() else additive(self.mask, query.dtype)
        mask = plain.expand(-1, heads, -1, -1).clone()
        readings, repeats = active(request.columns.readings, module), request.repeats
        for p, stretches in enumerate(request.columns.stretches(request.queries)):
            rows = slice(p * repeats, (p + 1) * repeats)
            for stretch in stretches:
                queries = slice(stretch.start - request.queries.start, stretch.stop - request.queries.start)
                asking = query[rows, :, queries]
                for runs, reading in stretch.readings:
                    if reading not in readings:
                        continue
                    index = select(columns_in(runs), query.device)
                    met = key[rows][:, :, index]
                    added = plain[rows, :, queries][..., index].float()
                    visible = added >= torch.finfo(plain.dtype).min / 2
                    added = added.masked_fill(~visible, 0)
                    if reading.shift and request.window is not None:
                        visible = self._in_shifted_window(p, stretch, index, reading.shift).expand(visible.shape)
                    scores = scaled_scores(asking, met, scaling, softcap).float()
                    moved = moved_query(asking, reading, request.turns, module)
                    read = scores if moved is asking else scaled_scores(moved, met, scaling, softcap).float()
                    read = read_scores(read + added, visible, reading)
                    change = torch.where(visible, read - scores, -torch.inf).clamp(min=torch.finfo(mask.dtype).min)
                    part = mask[rows, :, queries]
                    part[..., index] = change.to(mask.dtype)
                    mask[rows, :, queries] = part
        return mask

    def _in_shifted_window(self, p: int, stretch: Stretch, index: Any, shift: float) -> Tensor:
        """Which keys of a group are in the window ``[Q, C]``, measured to where they are read."""
        request = self.request
        if request.user is not None or request.padding is not None:
            raise BackendError(
                "a reading with a shift, in layers with a sliding window, goes with no other mask; leave mask= or the shift out"
            )
        assert request.window is not None
        return in_window(request.columns, p, range(stretch.start, stretch.stop), index, request.window, shift)


def _under(implementation: str, mask: Any, request: Request) -> UnderMask:
    return ReadUnderMask(implementation, mask, request) if request.columns.readings else UnderMask(implementation, mask)


def _eager(request: Request) -> UnderMask:
    """Under ``[B, 1 or H, Q, K]`` in the model's dtype. A boolean mask would be *added*: silently wrong."""
    return _under("eager", request.additive(), request)


def _sdpa(request: Request) -> UnderMask:
    """Under ``[B, 1 or H, Q, K]``, boolean unless the user's own is additive; none where the model would do the same."""
    if request.is_plain:
        return UnderMask("sdpa", None)
    return _under("sdpa", request.additive() if request.is_additive else request.allowed(), request)


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
SDPA = Backend("sdpa", _sdpa, _sdpa_refusal, "sdpa", ("scores", "mask", "additive mask", "padding", "dropout", "readings"))
