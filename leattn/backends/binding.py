"""What happens to a model while it follows a graph, and how every bit of it is undone.

A pre-hook on the model's backbone fills in positions and remembers, in a ``ContextVar``, which prompts this very forward
follows; transformers then asks our mask function (backends/hf.py), which answers from the prompts. Contexts are per thread, so
two graphs can run on one model at once; a thread that knows of no prompt raises.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from leattn.backends import BACKENDS, hf
from leattn.backends.batch import Batch, MaskRequest
from leattn.backends.kinds import Backend, ModelFacts
from leattn.compile import CompiledPrompt
from leattn.errors import BackendError


class NotAsked(BackendError):
    """A forward ended without any mask having been asked for."""


@dataclass(eq=False)
class Attention:
    """What ``with attend(...) as attention`` gives: the prompts as the model is to be called with them.

    ``attention.inputs`` are the keyword arguments for the model: ``input_ids``, ``attention_mask`` and ``position_ids``,
    ``[P, S]`` each, padded on the left where there are several prompts. ``forwards`` and ``computed`` count the model's
    forward passes in the block, and the tokens they computed (padding and every beam's row included).
    """

    base: Any
    batch: Batch
    backend: Backend
    facts: ModelFacts
    forwards: int = 0
    computed: int = 0
    masks_asked: int = field(default=0, repr=False)
    made_ahead: Any = field(default=None, repr=False)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.batch.input_ids,
            "attention_mask": self.batch.attention_mask,
            "position_ids": self.batch.position_ids,
        }


_attentions: ContextVar[tuple[Attention, ...]] = ContextVar("leattn_attentions", default=())
"""The blocks around the current code, outermost first."""
_forwards: ContextVar[tuple[Attention, ...]] = ContextVar("leattn_forwards", default=())
"""The forward passes around the current code, each with the block it follows."""


@contextmanager
def follow(attention: Attention) -> Iterator[Attention]:
    """The block itself, without any check of whether the model can do it."""
    hf.install([backend.implementation for backend in BACKENDS.values()], _answer)
    outer, running = _attentions.get(), _forwards.get()
    _bind(attention, outer)
    try:
        _attentions.set((*outer, attention))
        yield attention
    finally:
        _attentions.set(outer)
        _forwards.set(running)
        _unbind(attention)


# What is bound to a model while blocks are open: two hooks on its backbone and, if need be, another implementation.


@dataclass
class _Binding:
    """Hooks that are shared by all blocks on a model; ``switches`` undo changes of the implementation, newest last."""

    loaded_with: str
    handles: tuple[Any, ...]
    blocks: int = 0
    switches: list[tuple[Attention, Callable[[], None]]] = field(default_factory=list)


_bindings: WeakKeyDictionary[Any, _Binding] = WeakKeyDictionary()
_lock = threading.RLock()


def _bind(attention: Attention, outer: tuple[Attention, ...]) -> None:
    base, backend = attention.base, attention.backend
    with _lock:
        binding = _bindings.get(base)
        current = base.config._attn_implementation
        if binding is None:
            handles = (
                base.register_forward_pre_hook(_before, with_kwargs=True, prepend=True),
                base.register_forward_hook(_after, always_call=True),
            )
            binding = _bindings[base] = _Binding(current, handles)
        try:
            if current != backend.implementation:
                _check_switch(base, backend, binding, outer)
                binding.switches.append((attention, hf.switch(base, backend.implementation)))
        except BaseException:
            if not binding.blocks:
                _release(base, binding)
            raise
        binding.blocks += 1


def _check_switch(base: Any, backend: Backend, binding: _Binding, outer: tuple[Attention, ...]) -> None:
    if binding.blocks > sum(attention.base is base for attention in outer):
        raise BackendError(
            f"another thread is using this model with {base.config._attn_implementation!r}; "
            f"one model runs one implementation at a time, so use the same backend in both, not {backend.name!r}"
        )
    if base.training and getattr(base, "is_gradient_checkpointing", False):
        raise BackendError(
            "gradient checkpointing runs the layers again in backward, when this block may have ended and the model is back "
            f"on {binding.loaded_with!r}; call model.set_attn_implementation({backend.implementation!r}) first"
        )


def _unbind(attention: Attention) -> None:
    with _lock:
        binding = _bindings[attention.base]
        binding.blocks -= 1
        # Where another thread still runs on what this block switched to, the last block on the model switches back.
        around = sum(other.base is attention.base for other in _attentions.get())
        if binding.switches and binding.switches[-1][0] is attention and binding.blocks == around:
            binding.switches.pop()[1]()
        if not binding.blocks:
            _release(attention.base, binding)


def _release(base: Any, binding: _Binding) -> None:
    for handle in binding.handles:
        handle.remove()
    for _, restore in reversed(binding.switches):
        restore()
    del _bindings[base]


def _before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the backbone runs: find the block this call belongs to, check its input and fill in positions."""
    attention = next((attention for attention in reversed(_attentions.get()) if attention.base is module), None)
    if attention is None:
        raise BackendError(
            "this model is following a graph in another thread or context, and this call belongs to none; it would run plain "
            "causal. Use leattn.generate, or open `with leattn.attend(...)` in this thread too"
        )
    call = _by_name(module, args, kwargs)
    attention.masks_asked = 0
    prepared = _prepared(attention, call)
    attention.forwards += 1
    _forwards.set((*(running for running in _forwards.get() if running.base is not module), attention))
    return (), prepared


def _by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(module.forward)
    call = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            call.update(call.pop(name, {}))
    return call


def _prepared(attention: Attention, call: dict[str, Any]) -> dict[str, Any]:
    batch = attention.batch
    ids = call.get("input_ids")
    tokens = ids if ids is not None else call.get("inputs_embeds")
    if tokens is None:
        raise BackendError("inside attend the model is called with input_ids (or inputs_embeds); it got neither")
    use_cache = call.get("use_cache")
    if attention.facts.windowed and (attention.base.config.use_cache if use_cache is None else use_cache):
        call["past_key_values"] = hf.full_length_cache(call.get("past_key_values"))
    first, length, rows = hf.cached_tokens(call.get("past_key_values")), tokens.shape[1], tokens.shape[0]
    repeats = batch.repeats(rows)
    if ids is not None:
        _check_ids(batch, ids, first, repeats)
    if first + length > batch.table.columns:
        for prompt in batch.prompts:
            if len(prompt.graph.sinks) > 1:
                raise BackendError(several_sinks(prompt))
    positions = batch.table.positions_at(first, length).repeat_interleave(repeats, 0).to(tokens.device)
    call["position_ids"] = positions
    mask = call.get("attention_mask")
    if mask is None:
        mask = torch.ones(rows, first + length, dtype=torch.long, device=tokens.device)
        prompt_part = batch.attention_mask.repeat_interleave(repeats, 0).to(tokens.device)
        shared = min(first + length, prompt_part.shape[1])
        mask[:, :shared] = prompt_part[:, :shared]
        call["attention_mask"] = mask
    elif mask is attention.made_ahead:
        attention.masks_asked += 1
    elif not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise BackendError("inside attend the attention_mask is 2D padding; give a 4D mask of your own to attend(mask=...)")
    attention.computed += rows * length
    return call


def several_sinks(prompt: CompiledPrompt) -> str:
    """Why a prompt whose branches end apart cannot be continued as one."""
    names = ", ".join(repr(prompt.graph.names[sink]) for sink in prompt.graph.sinks[:6])
    return (
        f"a prompt with several sinks ({names}) has no single continuation yet; let one last node see them, or compile and "
        "generate each sink by itself"
    )


def _check_ids(batch: Batch, ids: torch.Tensor, first: int, repeats: int) -> None:
    """The prompt's columns of ``ids`` must be the prompt's tokens; padding and what is generated are free."""
    last = min(first + ids.shape[1], batch.table.columns)
    if last <= first:
        return
    expected = batch.input_ids[:, first:last].repeat_interleave(repeats, 0).to(ids.device)
    is_prompt = batch.attention_mask[:, first:last].repeat_interleave(repeats, 0).to(ids.device).bool()
    given = ids[:, : last - first]
    wrong = (given != expected) & is_prompt
    if wrong.any():
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise BackendError(
            f"other input_ids than the prompt's inside attend: row {row}, column {first + column} is "
            f"{int(given[row, column])}, the prompt has {int(expected[row, column])}; call the model with "
            "**attention.inputs, or leave the block first"
        )


def _after(module: Any, _args: tuple[Any, ...], output: Any) -> None:
    """After the backbone ran, also after an exception: forget the forward, and make sure that a mask was asked for."""
    running = _forwards.get()
    if not running or running[-1].base is not module:
        return
    _forwards.set(running[:-1])
    if output is not None and not running[-1].masks_asked:
        raise NotAsked(f"{type(module).__name__} ran without asking for an attention mask, so it did not follow the graph")


def _answer(config: Any, implementation: str, request: MaskRequest, plain: Any) -> Any:
    """What our mask functions say: transformers' own mask unless the model at hand is following a graph."""
    # ``generate`` with a static cache asks ahead, outside of any forward.
    running = _forwards.get()
    around = running[-1:] or tuple(attention for attention in _attentions.get() if attention.base.config is config)[-1:]
    if not around or around[0].base.config is not config:
        return plain()
    attention = around[0]
    mask = _mask(attention, implementation, request, plain)
    if running:
        attention.masks_asked += 1
    else:
        attention.made_ahead = mask
    return mask


def _mask(attention: Attention, implementation: str, request: MaskRequest, plain: Any) -> Any:
    if attention.backend.implementation != implementation:
        raise BackendError(f"the model was switched to {implementation!r} inside attend; leave the block first")
    if attention.backend.name == "sdpa" and attention.batch.is_plain:
        return plain()
    return attention.backend.mask(attention.batch, request)
