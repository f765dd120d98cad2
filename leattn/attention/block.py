"""A block: what a model follows while ``with attend(...)`` is open, and how its forward passes find it.

A pre-hook on the model's backbone finds the block that a call belongs to, fills in positions, decides which backend computes
this forward, and remembers the block in a ``ContextVar``; transformers then asks our mask function (model/registry.py), which
answers with that backend's attention. Contexts are per thread, so two graphs, or two backends, can run on one model at once; a
thread that knows of no block raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from leattn.attention.around import wrapped_attention
from leattn.attention.call import by_name, hides_tokens, prepared_call
from leattn.attention.reading import Turns
from leattn.attention.request import Backend, LayerAttention, Need, Request, UnderMask
from leattn.errors import BackendError
from leattn.model import registry
from leattn.model.record import Model, check_plain_text
from leattn.prompt.columns import Columns
from leattn.prompt.compile import CompiledPrompt


@dataclass(eq=False, repr=False)
class Block:
    """What ``with attend(...) as attention`` gives: the prompts as the model is to be called with them.

    ``attention.inputs`` are the keyword arguments for the model. ``attention.backend`` is what computes its attention, decided
    once per forward. ``forwards`` and ``computed`` count the model's forward passes in the block, and the tokens that they
    computed (padding and every beam's row included).

    Attributes
    ----------
    prompts
        What the columns hold; none for a program.
    backends
        Those that may serve, best first: one where the user named it.
    serves
        Whether the model can run a backend in this block; asked of those that a forward needs.
    native
        The model keeps an implementation of transformers, and gets masks in its form.
    needs
        What every forward of the block asks of its backend.
    turns
        How each layer's keys turn with the position, where a reading has a shift.
    wrapped, operations, reenter
        Of interventions: what is around each layer's attention, what was asked for, and how a block inside this one is entered
        so that it is asked for there too.
    queries
        The columns of the running forward's tokens.
    embedded
        Whether ``inputs_embeds`` of the running forward are the caller's.
    """

    record: Model
    model: Any
    columns: Columns
    backends: Sequence[Backend]
    prompts: tuple[CompiledPrompt, ...] = ()
    serves: Callable[[Backend], bool] = lambda _: True
    native: bool = False
    needs: frozenset[Need] = frozenset()
    user: Tensor | None = None
    replaces: bool = False
    turns: Turns = ()
    wrapped: Any = None
    operations: tuple[Any, ...] = ()
    reenter: Callable[[Block], AbstractContextManager[Block]] | None = None
    forwards: int = 0
    computed: int = 0
    queries: range = range(0)
    embedded: bool = True
    padding_hides: bool = False
    masks_asked: int = 0
    kept: dict[Any, Any] = field(default_factory=dict)
    handles: tuple[Any, ...] = ()
    _cache: Callable[[], Any] = lambda: None

    def __post_init__(self) -> None:
        self.backend = self.backends[0]

    def __repr__(self) -> str:
        return f"Block({len(self.columns.rows)} prompts, backend {self.backend.name!r}, {self.forwards} forwards so far)"

    @property
    def implementation(self) -> str:
        """The name of the model's attention implementation while the block is open."""
        return str(self.backends[0].implementation) if self.native else registry.OURS

    @property
    def inputs(self) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``position_ids``, ``[P, S]`` each, padded on the left."""
        columns = self.columns
        return {"input_ids": columns.input_ids, "attention_mask": columns.attention_mask, "position_ids": columns.position_ids}

    def decide(self, needs: frozenset[Need]) -> Backend:
        """The backend for a forward that asks for this.

        Raises
        ------
        BackendError
            None that carries it.
        """
        carrying = [backend for backend in self.backends if not backend.lacks(needs)]
        if not carrying:
            raise BackendError(str(self.backends[0].lacks(needs)))
        if len(self.backends) == 1:
            return carrying[0]
        served = next((backend for backend in carrying if self.serves(backend)), None)
        if served is None:
            raise BackendError(
                f"this call needs {carrying[0].name!r}, which runs {self.record.facts.family} in blocks of its own only; name "
                "it as backend="
            )
        return served

    def wrap(self, wrapped: Any, what: str, *needs: Need) -> None:
        """Put something around the attention of every layer, which asks this of the backend; ``what`` names it in errors.

        ``wrapped.before(call)`` gives the mask to use instead of ``call.mask``, or that one; ``wrapped.after(call)`` looks at
        what was computed with.

        Raises
        ------
        BackendError
            A model that keeps transformers' implementation, or no backend that carries it.
        """
        if self.native:
            raise BackendError(
                f"{what} goes through transformers' attention interface, which {self.record.facts.family} does not use, or not "
                "under another implementation's name; the weights of a short prompt: leattn.forward(model, prompt, "
                "backend='eager', output_attentions=True).attentions"
            )
        self.wrapped, self.needs = wrapped, self.needs.union(needs)
        self.backend = self.decide(self.needs)

    def forget(self, cache: Any) -> None:
        """What a backend kept belongs to one cache, and to a prompt that does not run again."""
        if self._cache() is not cache or self.queries.start < self.columns.width:
            self.kept.clear()
        self._cache = (lambda: None) if cache is None else ref(cache)


_blocks: ContextVar[tuple[Block, ...]] = ContextVar("leattn_blocks", default=())
"""The blocks around the current code, outermost first."""
_forwards: ContextVar[tuple[Block, ...]] = ContextVar("leattn_forwards", default=())
"""The forward passes around the current code, each as the block that it follows."""


_unfollowed: ContextVar[Any] = ContextVar("leattn_unfollowed", default=None)
"""The config of a model whose forwards run as if no block were open on it."""


@contextmanager
def unfollowed(record: Model) -> Iterator[None]:
    """Inside, the model runs by itself, whatever blocks are open on it. Hooks see arguments by name, as they do in a block."""
    before = _unfollowed.set(record.base.config)
    handle = record.base.register_forward_pre_hook(_before, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()
        _unfollowed.reset(before)


@contextmanager
def follow(block: Block) -> Iterator[Block]:
    """Open a block, without any check of whether the model can do it."""
    outer, active = _blocks.get(), _forwards.get()
    _open(block)
    try:
        _blocks.set((*outer, block))
        yield block
    finally:
        _blocks.set(outer)
        _forwards.set(active)
        _close(block)


def innermost(record: Model) -> Block | None:
    """The innermost block around the current code that is about this model."""
    return next((block for block in reversed(_blocks.get()) if block.record is record), None)


def running(record: Model) -> Block | None:
    """The block that the model's current forward follows, or None outside of a forward."""
    return next((block for block in reversed(_forwards.get()) if block.record is record), None)


def check_not_in_use(record: Model, implementation: str) -> None:
    """Refuse another implementation than the one on which another thread has the model at the moment."""
    others = [other for other in record.blocks if other not in _blocks.get() and other.implementation != implementation]
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


def standing_needs(record: Model, wants_weights: bool | None = None) -> set[Need]:
    """What a model in its present state asks of a backend, whatever it is called with."""
    needs: set[Need] = {"dropout"} if record.drops else set()
    if record.base.config.output_attentions if wants_weights is None else wants_weights:
        needs.add("weights")
    return needs


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before_outer(block: Block, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a wrapper runs, which calls the backbone with embeddings: what it was given itself."""
    if innermost(block.record) is block and _unfollowed.get() is not block.record.base.config:
        call = by_name(module, args, kwargs)
        check_plain_text(module, call)
        block.embedded = call.get("inputs_embeds") is not None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # contexts and locks are no matter for a compiler
def _before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the backbone runs: find the block this call belongs to, check its input, fill in positions, choose a backend."""
    if _unfollowed.get() is module.config:
        return (), by_name(module, args, kwargs)
    block = next((block for block in reversed(_blocks.get()) if block.record.base is module), None)
    if block is None:
        raise BackendError(
            "this model is following a graph in another thread or context, and this call belongs to none; it would run plain "
            "causal. Use leattn.generate, or open `with leattn.attend(...)` in this thread too"
        )
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
    _forwards.set((*(other for other in _forwards.get() if other.record is not record), block))
    return (), prepared


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after(module: Any, _args: tuple[Any, ...], output: Any) -> None:
    """After the backbone ran, also after an exception: forget the forward, and make sure that a mask was asked for."""
    active = _forwards.get()
    if not active or active[-1].record.base is not module:
        return
    _forwards.set(active[:-1])
    if output is not None and not active[-1].masks_asked:
        raise BackendError(
            f"{type(module).__name__} ran without asking for an attention mask, so it did not follow the graph: it never asks "
            "transformers for a mask, so what its layers attend to cannot be set; use a model that does"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _answer(config: Any, plain: Callable[[], Any], padding: Tensor | None, *, ours: bool, is_causal: bool, **asked: Any) -> Any:
    """What our mask functions say: transformers' own mask unless the model at hand is following a graph."""
    active = _forwards.get()
    if _unfollowed.get() is config:
        return UnderMask("eager", plain()) if ours else plain()
    if not is_causal and any(block.record.base.config is config for block in _blocks.get()):
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
    if not active and any(block.record.base.config is config for block in _blocks.get()):
        # ``generate`` with a static cache asks ahead; the forward asks again.
        return torch.ones(asked["rows"], asked["queries"].stop, device=asked["device"]) if padding is None else padding
    if ours and _blocks.get():
        raise BackendError(
            "a part of the model beside its backbone asks for an attention mask, and the graph does not reach that part"
        )
    if ours:
        raise BackendError(
            "leattn's attention runs inside leattn.attend only; call model.set_attn_implementation('sdpa') first"
        )
    return plain()
