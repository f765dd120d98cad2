"""What is put into transformers' registries while blocks are open, and taken out when the last one closes.

One implementation of our own, ``"leattn"``: what travels through the model as its mask is an object that computes attention
when a layer calls it. For models that keep an implementation of transformers, we stand in front of its mask function instead.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from transformers.integrations.flex_attention import compile_friendly_flex_attention, get_flex_attention_lse_kwargs
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_overlay,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from leattn.errors import BackendError

OURS = "leattn"
"""The name of our implementation."""

HARMLESS = frozenset(
    {
        "is_causal",  # what a mask stands for anyway
        "sliding_window",  # in the mask that was asked for
        "position_ids",
        "position_embeddings",
        "past_key_values",
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "num_items_in_batch",
        "tokenizer",  # of ``generate``, which hands it on
        "assistant_tokenizer",
        "logits_to_keep",
        "deterministic",
        "layer_idx",
    }
)
"""What layers hand to every attention function, and no attention function under a mask has to act on."""

Answer = Callable[..., Any]
"""Called with ``config``, ``plain`` (what transformers answers; for eager, under our own name) and what the mask is for."""

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


def flex_attention(
    module: torch.nn.Module,
    scaling: float | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Any,
    score_mod: Any,
    *,
    with_lse: bool,
) -> tuple[Tensor, Any]:
    """Torch's, compiled as transformers does, under a score function of one's own.

    Output ``[B, H, Q, D]`` and log-sum-exp ``[B, H, Q]`` of query ``[B, H, Q, D]`` over key and value ``[B, G, K, D]``; None in
    its place where it is not asked for.
    """
    # Torch compiles nothing for a CPU that returns the log-sum-exp.
    uncompiled = with_lse and query.device.type == "cpu"
    with torch.compiler.set_stance("force_eager") if uncompiled else nullcontext():
        found: Any = compile_friendly_flex_attention(
            query,
            key,
            value,
            training=module.training,
            score_mod=score_mod,
            block_mask=block_mask,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
            **get_flex_attention_lse_kwargs(with_lse),
        )
    return (found[0], found[1].lse) if with_lse else (found, None)


def check_keywords(kwargs: Mapping[str, Any], known: Collection[str], who: str) -> None:
    """Refuse what a layer hands to its attention and ``who`` would leave out.

    Raises
    ------
    BackendError
        A keyword that is neither harmless nor known.
    """
    unknown = [name for name, value in kwargs.items() if value is not None and name not in HARMLESS and name not in known]
    if unknown:
        raise BackendError(
            f"its layers hand {unknown[0]!r} to their attention, which {who} does not know and would leave out; "
            "use backend='eager'"
        )


def _attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Our attention function: the mask is the attention. Query ``[B, H, Q, D]``, key and value ``[B, G, K, D]``."""
    if not callable(attention_mask):
        raise BackendError(f"{type(module).__name__} runs without the mask that it is to be given")
    return attention_mask(module, query, key, value, **kwargs)


def _parts(mask_function: Any) -> tuple[bool, int | None]:
    """Whether a mask function of transformers is no more than causal attention in a window or a chunk; and the window."""
    code: Any = getattr(mask_function, "__code__", None)
    cells: Any = getattr(mask_function, "__closure__", None)
    if code in (_AND, _OR):
        parts = [_parts(part) for part in cells[0].cell_contents]
        return all(causal for causal, _ in parts), next((window for _, window in parts if window is not None), None)
    if code is _BLOCKS:  # tokens of a picture, which see each other; −1 is text
        return bool((cells[0].cell_contents < 0).all()), None
    if code is _WINDOW:
        return True, int(cells[0].cell_contents)
    if getattr(mask_function, "__qualname__", "") == _REMAPPED:
        return _parts(cells[0].cell_contents)
    # Packed sequences are read off positions, which are the graph's here.
    return code in (_CAUSAL, _CHUNK, _PACKED), None


_AND, _OR, _CAUSAL = and_masks().__code__, or_masks().__code__, causal_mask_function.__code__
_WINDOW, _CHUNK = sliding_window_overlay(1).__code__, chunked_overlay(1, torch.zeros(1)).__code__
_BLOCKS, _PACKED = blockwise_overlay(torch.zeros(1)).__code__, packed_sequence_mask_function(torch.zeros(1)).__code__
_REMAPPED = "remap_positions_for_packed_sequence.<locals>.inner_mask"  # older releases have none


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
            named = {} if mask_function is None else {"mask_function": mask_function}
            sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
            offsets = {"q_offset": q_offset, "kv_offset": kv_offset, "attention_mask": attention_mask}
            function = ALL_MASK_ATTENTION_FUNCTIONS["eager"] if original is None else original
            return function(**sizes, **offsets, **named, **kwargs)

        if original is not None and not any(one is kwargs.get("config") for one in users):
            return plain()  # another model: nothing here that a compiler could not trace
        first, window = int(q_offset), kwargs.get("local_size")
        is_causal, own_window = (True, None) if mask_function is None else _parts(mask_function)
        return answer(
            kwargs.get("config"),
            plain,
            ours=original is None,
            is_causal=is_causal,
            rows=batch_size,
            queries=range(first, first + q_length),
            keys=kv_length + kv_offset,
            window=own_window if window is None else window,
            dtype=kwargs.get("dtype", torch.float32),
            device=torch.device(kwargs.get("device", "cpu")),
            padding=attention_mask,
            may_skip=kwargs.get("allow_is_causal_skip", True),
        )

    return mask_function
