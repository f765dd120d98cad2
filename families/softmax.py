"""A mask in front of every softmax over attention scores, for models that take no mask of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

SOFTMAXES = (torch.softmax, torch.nn.functional.softmax, Tensor.softmax)


class _Masking(TorchFunctionMode):
    """Intercepts softmax over ``[…, S, S]``, or ``[…, S, S + 1]`` where a model appends a sink to the scores."""

    def __init__(self, allowed: Sequence[Tensor]) -> None:
        super().__init__()
        self.allowed, self.layer = allowed, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SOFTMAXES and args:
            scores, size = args[0], len(self.allowed[0])
            if scores.dim() >= 3 and scores.shape[-2] == size and size <= scores.shape[-1] <= size + 1:
                hidden = ~self.allowed[min(self.layer, len(self.allowed) - 1)]
                hidden = nn.functional.pad(hidden, (0, scores.shape[-1] - size), value=False)
                args = (scores.masked_fill(hidden, torch.finfo(scores.dtype).min), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def masked_softmax(allowed: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block layer ``i`` attends where ``allowed[i]``, ``[S, S]``, says so, as far as its own mask lets it."""
    mode = _Masking(allowed)

    def note_layer(module: nn.Module, _: Any) -> None:
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            mode.layer = index

    handle = register_module_forward_pre_hook(note_layer)
    try:
        with mode:
            yield
    finally:
        handle.remove()
