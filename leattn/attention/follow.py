"""A block: what a model follows while ``with attend(...)`` is open, and how its forward passes find it.

A pre-hook on the model's backbone finds the block that a call belongs to, fills in positions, decides which backend computes
this forward, and remembers the block in a ``ContextVar``; transformers then asks our mask function (model/registry.py), which
answers with that backend's attention. Contexts are per thread, so two graphs, or two backends, can run on one model at once; a
thread that knows of no block raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from leattn.attention.around import wrapped_attention
from leattn.attention.block import BLOCKS, FORWARDS, UNFOLLOWED, Block, innermost, standing_needs
from leattn.attention.call import by_name, hides_tokens, prepared_call
from leattn.attention.request import LayerAttention, Request, UnderMask
from leattn.errors import BackendError
from leattn.model import registry
from leattn.model.record import Model, check_plain_text


@contextmanager
def unfollowed(record: Model) -> Iterator[None]:
    """Inside, the model runs by itself, whatever blocks are open on it. Hooks see arguments by name, as they do in a block."""
    before = UNFOLLOWED.set(record.base.config)
    handle = record.base.register_forward_pre_hook(_before, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()
        UNFOLLOWED.reset(before)


@contextmanager
def follow(block: Block) -> Iterator[Block]:
    """Open a block, without any check of whether the model can do it."""
    outer, active = BLOCKS.get(), FORWARDS.get()
    _open(block)
    try:
        BLOCKS.set((*outer, block))
        yield block
    finally:
        BLOCKS.set(outer)
        FORWARDS.set(active)
        _close(block)


def check_not_in_use(record: Model, implementation: str) -> None:
    """Refuse another implementation than the one on which another thread has the model at the moment."""
    others = [other for other in record.blocks if other not in BLOCKS.get() and other.implementation != implementation]
    if others:
        raise BackendError(
            f"another thread is using this model on {others[-1].implementation!r}, and this block needs {implementation!r}: "
            f"{record.facts.family}, or training with gradient checkpointing, runs on one implementation at a time"
        )


def _open(block: Block) -> None:
    """The first block on a model hooks its backbone; each sets the implementation that it runs on."""
    record, name = block.record, block.implementation
    with record.lock:
        check_not_in_use(record, name)
        registry.acquire(name, _answer, record.base.config)  # first: it may refuse, and nothing is hooked yet
        if not record.blocks:
            base, record.originals = record.base, record.implementations()
            before = base.register_forward_pre_hook(_before, with_kwargs=True, prepend=True)
            record.handles = (before, base.register_forward_hook(_after, always_call=True))
        record.blocks.append(block)
        outer = record.around(block.model)
        if outer is not None:
            around = partial(_before_outer, block)
            block.handles = (outer.register_forward_pre_hook(around, with_kwargs=True, prepend=True),)
        try:
            record.switch(name)
        except BaseException:
            _close(block)
            raise


def _close(block: Block) -> None:
    """Go back to what the block before ran on; the last one leaves the model as it was."""
    record = block.record
    with record.lock:
        record.blocks.remove(block)
        for handle in block.handles:
            handle.remove()
        registry.release(block.implementation, record.base.config)
        if record.blocks:
            record.switch(record.blocks[-1].implementation)
            return
        for handle in record.handles:
            handle.remove()
        record.restore(record.originals)
        record.handles, record.originals = (), []


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before_outer(block: Block, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a wrapper runs, which calls the backbone with embeddings: what it was given itself."""
    if innermost(block.record) is block and UNFOLLOWED.get() is not block.record.base.config:
        call = by_name(module, args, kwargs)
        check_plain_text(module, call)
        block.embedded = call.get("inputs_embeds") is not None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # contexts and locks are no matter for a compiler
def _before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the backbone runs: find the block this call belongs to, check its input, fill in positions, choose a backend."""
    if UNFOLLOWED.get() is module.config:
        return (), by_name(module, args, kwargs)
    block = next((block for block in reversed(BLOCKS.get()) if block.record.base is module), None)
    if block is None:
        raise BackendError(
            "this model is following a graph in another thread or context, and this call belongs to none; it would run plain "
            "causal. Use leattn.generate, or open `with leattn.attend(...)` in this thread too"
        )
    block.check_followed()
    record = block.record
    if record.runs_on != block.implementation:
        raise BackendError(f"the model was switched to {record.runs_on!r} inside attend; leave the block first")
    if record.checkpoints and not block.native:
        raise BackendError(
            "gradient checkpointing runs the layers again in backward, when this block may have ended; switch it on before the "
            "block begins"
        )
    call = by_name(module, args, kwargs)
    needs = {*block.needs, *standing_needs(record, call.get("output_attentions"))}
    prepared, block.queries = prepared_call(record, block.columns, block.prompts, call, embedded=block.embedded)
    if block.replaces:  # a mask that may open everything
        record.facts.check_seen_tokens(block.queries.stop)
    else:
        record.facts.check_seen(block.columns, block.queries)
    tokens = len(prepared["attention_mask"]) * len(block.queries)
    block.padding_hides = hides_tokens(block.columns, prepared["attention_mask"])
    if block.padding_hides:
        needs.add("padding")
    block.backend = block.decide(frozenset(needs))
    block.forget(prepared.get("past_key_values"))
    block.masks_asked = 0
    block.forwards += 1
    block.computed += tokens
    FORWARDS.set((*(other for other in FORWARDS.get() if other.record is not record), block))
    return (), prepared


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after(module: Any, _args: tuple[Any, ...], output: Any) -> None:
    """After the backbone ran, also after an exception: forget the forward, and make sure that a mask was asked for."""
    active = FORWARDS.get()
    if not active or active[-1].record.base is not module:
        return
    FORWARDS.set(active[:-1])
    if output is not None and not active[-1].masks_asked:
        raise BackendError(
            f"{type(module).__name__} ran without asking for an attention mask, so it did not follow the graph: it never asks "
            "transformers for a mask, so what its layers attend to cannot be set; use a model that does"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _answer(config: Any, plain: Callable[[], Any], padding: Tensor | None, *, ours: bool, is_causal: bool, **asked: Any) -> Any:
    """What our mask functions say: transformers' own mask unless the model at hand is following a graph."""
    active = FORWARDS.get()
    if UNFOLLOWED.get() is config:
        return UnderMask("eager", plain()) if ours else plain()
    if not is_causal and any(block.record.base.config is config for block in BLOCKS.get()):
        raise BackendError(
            "it asks for a mask that is more than causal attention and windows (tokens of a picture that see each other, "
            "attention in both directions), and the graph's would stand in its place; give it plain text, or a config with "
            "causal attention"
        )
    if active and active[-1].record.base.config is config:
        block = active[-1]
        block.masks_asked += 1
        padding = padding if block.padding_hides else None
        request = Request(
            block.columns,
            padding=padding,
            user=block.user,
            replaces=block.replaces,
            kept=block.kept,
            turns=block.turns,
            **asked,
        )
        attention: LayerAttention = block.backend.attention(request)
        if block.native:
            return attention.mask  # type: ignore[attr-defined]
        return attention if block.wrapped is None else partial(wrapped_attention, block.wrapped, attention, request)
    if not active and any(block.record.base.config is config for block in BLOCKS.get()):
        # ``generate`` with a static cache asks ahead; the forward asks again.
        return torch.ones(asked["rows"], asked["queries"].stop, device=asked["device"]) if padding is None else padding
    if ours and BLOCKS.get():
        raise BackendError(
            "a part of the model beside its backbone asks for an attention mask, and the graph does not reach that part"
        )
    if ours:
        raise BackendError(
            "leattn's attention runs inside leattn.attend only; call model.set_attn_implementation('sdpa') first"
        )
    return plain()
