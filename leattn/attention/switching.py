"""What is bound to a model while blocks are open on it, in any thread: two hooks and, if need be, another implementation.

A model runs one implementation at a time. A block that wants another switches the model, and back when it ends; under
``"auto"``, a block may move to another backend later. Where other threads use the model, nothing is switched under them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from leattn.errors import BackendError
from leattn.model import hf

if TYPE_CHECKING:
    from leattn.attention.block import Attention


@dataclass
class _Binding:
    """Hooks that are shared by all blocks on a model; ``switches`` undo changes of the implementation, newest last."""

    loaded_with: str
    handles: tuple[Any, ...]
    blocks: int = 0
    switches: list[tuple[Attention, Callable[[], None]]] = field(default_factory=list)


_bindings: WeakKeyDictionary[Any, _Binding] = WeakKeyDictionary()
_lock = threading.RLock()


def bind(attention: Attention, outer: tuple[Attention, ...], before: Callable[..., Any], after: Callable[..., Any]) -> None:
    """Open a block inside of the ``outer`` ones: the first on a model hooks ``before`` and ``after`` to its backbone.

    Raises
    ------
    BackendError
        The block wants another implementation than the model runs on, and the model cannot be switched now.
    """
    base = attention.base
    with _lock:
        binding = _bindings.get(base)
        current = base.config._attn_implementation
        if binding is None:
            handles = (
                base.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
                base.register_forward_hook(after, always_call=True),
            )
            binding = _bindings[base] = _Binding(current, handles)
        try:
            if current != attention.implementation and _others_use(binding, base, outer):
                # Under "auto", what another thread runs on is as good if it serves.
                same = (other for other in attention.alternatives if other.implementation == current)
                attention.backend = next(same, attention.backend)
            if current != attention.implementation:
                _check_switch(attention, binding, outer)
                binding.switches.append((attention, hf.switch(base, attention.implementation)))
        except BaseException:
            if not binding.blocks:
                _release(base, binding)
            raise
        binding.blocks += 1


def _others_use(binding: _Binding, base: Any, around: tuple[Attention, ...]) -> bool:
    """Whether blocks on the model are open in other threads, given those around the current code."""
    return binding.blocks > sum(block.base is base for block in around)


def elsewhere(base: Any, around: tuple[Attention, ...]) -> str | None:
    """What the model runs on if blocks on it are open in other threads, given those around the current code, else None."""
    with _lock:
        binding = _bindings.get(base)
        if binding is None or not _others_use(binding, base, around):
            return None
        return str(base.config._attn_implementation)


def move(attention: Attention, around: tuple[Attention, ...]) -> None:
    """Go on with another backend: ``"auto"`` took sparse, and the model is called with what sparse does not serve.

    ``around`` are the blocks around the current code, this one included.

    Raises
    ------
    BackendError
        The model cannot be switched now.
    """
    base = attention.base
    with _lock:
        attention.backend, attention.alternatives = attention.alternatives[0], ()
        if base.config._attn_implementation != attention.implementation:
            binding = _bindings[base]
            _check_switch(attention, binding, around)
            binding.switches.append((attention, hf.switch(base, attention.implementation)))


def _check_switch(attention: Attention, binding: _Binding, outer: tuple[Attention, ...]) -> None:
    base, implementation = attention.base, attention.implementation
    if _others_use(binding, base, outer):
        raise BackendError(
            f"another thread is using this model with {base.config._attn_implementation!r}; "
            f"one model runs one implementation at a time, so use the same backend in both, not {implementation!r}"
        )
    if base.training and getattr(base, "is_gradient_checkpointing", False) and implementation != binding.loaded_with:
        raise BackendError(
            "gradient checkpointing runs the layers again in backward, when this block may have ended and the model is back "
            f"on {binding.loaded_with!r}; call model.set_attn_implementation({implementation!r}) first"
        )


def unbind(attention: Attention, outer: tuple[Attention, ...]) -> None:
    """Close a block: undo its switches and, if it was the last on its model, unhook."""
    with _lock:
        binding = _bindings[attention.base]
        binding.blocks -= 1
        # Where another thread still runs on what this block switched to, the last block on the model switches back.
        around = sum(other.base is attention.base for other in outer)
        while binding.switches and binding.switches[-1][0] is attention and binding.blocks == around:
            binding.switches.pop()[1]()
        if not binding.blocks:
            _release(attention.base, binding)


def _release(base: Any, binding: _Binding) -> None:
    for handle in binding.handles:
        handle.remove()
    for _, restore in reversed(binding.switches):
        restore()
    del _bindings[base]
