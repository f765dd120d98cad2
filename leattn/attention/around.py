"""Around a layer's attention: what interventions and traces see of a call, and how they get between."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from leattn.attention.request import Request
from leattn.errors import BackendError


@dataclass(frozen=True)
class Call:
    """One call of a layer's attention: query ``[B, H, Q, D]``, key and value ``[B, G, K, D]``, mask as the backend takes it.

    ``request`` has the columns, which of them the queries stand in, and the layer's window; the keys are all columns from 0.
    """

    request: Request
    module: torch.nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float
    softcap: float | None

    @property
    def layer(self) -> int:
        """Which layer calls."""
        layer: Any = self.module.layer_idx
        return int(layer)

    @property
    def queries(self) -> range:
        """Columns that the queries stand in."""
        return self.request.queries


def wrapped_attention(
    wrapped: Any,
    inner: Any,
    request: Request,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """A backend's attention, ``inner``, between ``wrapped.before(call)`` and ``wrapped.after(call)``."""
    scaling, mask = kwargs.get("scaling"), getattr(inner, "mask", None)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = Call(request, module, query, key, value, mask, scaling, kwargs.get("softcap"))
    changed = wrapped.before(call)
    if changed is not mask:
        if not is_dataclass(inner):
            raise BackendError(
                f"changed scores become part of a mask, and the attention of this backend, {inner!r}, has none; answer with "
                "a dataclass that has a field 'mask', as leattn.attention.request.UnderMask does"
            )
        inner = replace(cast(Any, inner), mask=changed)
    output: tuple[Tensor, Tensor | None] = inner(module, query, key, value, **kwargs)
    wrapped.after(call)
    return output
