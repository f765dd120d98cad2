"""Which backend serves a block: the one that is named, or the best that carries what its forwards need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leattn.attention.backends import automatic, named
from leattn.attention.block import Block, standing_needs
from leattn.attention.probe import route
from leattn.attention.request import Backend, Need
from leattn.errors import BackendError
from leattn.model.record import Model
from leattn.prompt.columns import Columns


def chosen(model: Any, record: Model, columns: Columns, backend: str | Backend, user: Tensor | None = None) -> Block:
    """The block that follows these columns.

    Raises
    ------
    BackendError
        No backend, or not the one that was named, can run the model with this mask of the user's.
    """
    needs: set[Need] = set() if user is None else {"mask"} if user.dtype == torch.bool else {"mask", "additive mask"}
    if columns.readings:
        needs.add("readings")
    is_auto = isinstance(backend, str) and backend == "auto"
    order = automatic(record, plain=columns.is_plain and user is None) if is_auto else [named(backend)]
    checkpoints = record.checkpoints
    if checkpoints:
        order = _that_outlive_the_block(record, order)

    def serves(other: Backend) -> bool:
        return route(model, record, other) == (None, False)

    reasons: list[str] = []
    for one in order:
        lacking = one.lacks(needs)
        if lacking is not None:
            if not is_auto:
                raise BackendError(lacking)
            continue
        reason, native = route(model, record, one)
        native = native or checkpoints
        if reason is None and native and columns.readings:
            reason = NATIVE
        if reason is None:
            backends = [one] if native or not is_auto else [one, *(other for other in order if other is not one)]
            block = Block(record, model, columns, backends, serves=serves, native=native, needs=frozenset(needs), user=user)
            if len(backends) > 1:
                block.backend = block.decide(block.needs | standing_needs(record))
            return block
        if not is_auto:
            raise BackendError(f"backend {one.name!r} cannot run this model: {reason}")
        if one.implementation is not None:
            reasons.append(reason)
    raise BackendError(f"{type(model).__name__} cannot follow a graph: {reasons[0]}")


NATIVE = (
    "a node reads what it sees in another way than as it is (leattn.read), which goes through transformers' attention "
    "interface; this model does not use it, or gradient checkpointing cannot"
)


def _that_outlive_the_block(record: Model, order: Sequence[Backend]) -> list[Backend]:
    """Gradient checkpointing runs the layers again in backward, on what the model has outside of any block."""
    same = [backend for backend in order if backend.implementation == record.implementation]
    if not same:
        raise BackendError(
            "gradient checkpointing runs the layers again in backward, when this block may have ended and the model is back "
            f"on {record.implementation!r}; "
            + (
                f"{order[0].name} cannot be used here"
                if order[0].implementation is None
                else f"call model.set_attn_implementation({order[0].implementation!r}) first"
            )
        )
    return same
