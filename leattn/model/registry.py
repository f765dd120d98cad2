"""What is put into transformers' registries while blocks are open, and taken out when the last one closes.

One implementation of our own, ``"leattn"``: what travels through the model as its mask is an object that computes attention
when a layer calls it. For models that keep an implementation of transformers, we stand in front of its mask function instead.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from leattn.errors import BackendError

OURS = "leattn"
"""The name of our implementation."""

Answer = Callable[..., Any]
"""Called with ``config``, ``plain`` (what transformers would answer; None under our own name) and what the mask is for."""

_lock = threading.Lock()
_users: dict[str, list[Any]] = {}
_originals: dict[str, Callable[..., Any]] = {}


def acquire(implementation: str, answer: Answer, config: Any) -> None:
    """Have masks for models of a config answered by ``answer``; goes with one :func:`release`.

    Raises
    ------
    BackendError
        Transformers has no such implementation; nothing was changed.
    """
    with _lock:
        if implementation not in (OURS, *ALL_MASK_ATTENTION_FUNCTIONS):
            known = ", ".join(map(repr, sorted(ALL_MASK_ATTENTION_FUNCTIONS)))
            raise BackendError(f"transformers has no masks for the implementation {implementation!r}; it has them for {known}")
        users = _users.setdefault(implementation, [])
        users.append(config)
        if len(users) > 1:
            return
        if implementation == OURS:
            AttentionInterface.register(OURS, _attention)
            AttentionMaskInterface.register(OURS, _mask_function(None, answer, users))
        else:
            original = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
            _originals[implementation] = original
            AttentionMaskInterface.register(implementation, _mask_function(original, answer, users))


def release(implementation: str, config: Any) -> None:
    """Undo one :func:`acquire`; the last one leaves the registries as they were."""
    with _lock:
        users = _users[implementation]
        del users[next(i for i, one in enumerate(users) if one is config)]
        if users:
            return
        del _users[implementation]
        if implementation == OURS:
            del AttentionInterface._global_mapping[OURS], AttentionMaskInterface._global_mapping[OURS]
        else:
            AttentionMaskInterface.register(implementation, _originals.pop(implementation))


def attention_function(module: torch.nn.Module, implementation: str) -> Callable[..., Any]:
    """What transformers would call for an attention module on this implementation.

    Raises
    ------
    BackendError
        A family without the function that others have for eager attention.
    """
    if implementation != "eager":
        return cast(Callable[..., Any], ALL_ATTENTION_FUNCTIONS[implementation])
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return cast(Callable[..., Any], function)
    raise BackendError(f"{type(module).__name__} has no eager attention function of its own; use backend='sdpa'")


def _attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Our attention function: the mask is the attention. Query ``[B, H, Q, D]``, key and value ``[B, G, K, D]``."""
    if not callable(attention_mask):
        raise BackendError(f"{type(module).__name__} runs without the mask that it is to be given")
    return attention_mask(module, query, key, value, **kwargs)


def _mask_function(original: Callable[..., Any] | None, answer: Answer, users: list[Any]) -> Callable[..., Any]:
    def mask_function(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        def plain() -> Any:
            assert original is not None
            named = {} if mask_function is None else {"mask_function": mask_function}
            sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
            offsets = {"q_offset": q_offset, "kv_offset": kv_offset, "attention_mask": attention_mask}
            return original(**sizes, **offsets, **named, **kwargs)

        if original is not None and not any(one is kwargs.get("config") for one in users):
            return plain()  # another model: nothing here that a compiler could not trace
        first = int(q_offset)
        return answer(
            kwargs.get("config"),
            None if original is None else plain,
            rows=batch_size,
            queries=range(first, first + q_length),
            keys=kv_length + kv_offset,
            window=kwargs.get("local_size"),
            dtype=kwargs.get("dtype", torch.float32),
            device=torch.device(kwargs.get("device", "cpu")),
            padding=attention_mask,
        )

    return mask_function
