"""What happens to a model while it follows a graph: which forward follows which prompts, and what transformers is answered.

A pre-hook on the model's backbone fills in positions and remembers, in a ``ContextVar``, which prompts this very forward
follows; transformers then asks our mask function (backends/hf.py), which answers from the prompts. Contexts are per thread, so
two graphs can run on one model at once; a thread that knows of no prompt raises. What all threads share is in switching.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import ref

import torch

from leattn.attention import BACKENDS, switching
from leattn.attention.batch import Batch, MaskRequest
from leattn.attention.call import by_name, prepared_call
from leattn.attention.kinds import Backend, ModelFacts
from leattn.errors import BackendError
from leattn.model import hf


class NotAsked(BackendError):
    """A forward ended without any mask having been asked for."""


@dataclass(eq=False, repr=False)
class Attention:
    """What ``with attend(...) as attention`` gives: the prompts as the model is to be called with them.

    ``attention.inputs`` are the keyword arguments for the model: ``input_ids``, ``attention_mask`` and ``position_ids``,
    ``[P, S]`` each, padded on the left where there are several prompts. ``forwards`` and ``computed`` count the model's
    forward passes in the block, and the tokens they computed (padding and every beam's row included).

    ``wrapped``, ``operations`` and ``reenter`` belong to interventions: what is around each layer's attention, what was asked
    for, and how a block inside this one is entered so that it is asked for there too. ``alternatives`` are the other backends
    that ``"auto"`` may move to, best first.
    """

    base: Any
    batch: Batch
    backend: Backend
    facts: ModelFacts
    wrapped: Wrapped | None = None
    operations: tuple[Any, ...] = ()
    reenter: Callable[[Attention], AbstractContextManager[Attention]] | None = None
    forwards: int = 0
    computed: int = 0
    columns: range = range(0)
    masks_asked: int = 0
    made_ahead: Any = None
    alternatives: tuple[Backend, ...] = ()
    cache: Callable[[], Any] = lambda: None

    def __repr__(self) -> str:
        return f"Attention({len(self.batch.prompts)} prompts, backend {self.backend.name!r}, {self.forwards} forwards so far)"

    @property
    def implementation(self) -> str:
        """The name of transformers' attention implementation while the block is open."""
        return self.backend.implementation if self.wrapped is None else hf.WRAPPED

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.batch.input_ids,
            "attention_mask": self.batch.attention_mask,
            "position_ids": self.batch.position_ids,
        }


@dataclass(frozen=True)
class Call:
    """One call of a layer's attention: query ``[B, H, Q, D]``, key and value ``[B, G, K, D]``, mask as the backend takes it."""

    attention: Attention
    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    scaling: float
    softcap: float | None

    @property
    def columns(self) -> range:
        """Columns of the batch that the queries stand in; the keys are all columns from 0."""
        return self.attention.columns


class Wrapped(Protocol):
    """Something around a backend's attention: it may change the mask before, and look at the call after."""

    def before(self, call: Call) -> Any:
        """The mask to use instead of ``call.mask``, or that one."""

    def after(self, call: Call) -> None:
        """Look at what was computed with."""


_attentions: ContextVar[tuple[Attention, ...]] = ContextVar("leattn_attentions", default=())
"""The blocks around the current code, outermost first."""
_forwards: ContextVar[tuple[Attention, ...]] = ContextVar("leattn_forwards", default=())
"""The forward passes around the current code, each with the block it follows."""


@contextmanager
def follow(attention: Attention) -> Iterator[Attention]:
    """The block itself, without any check of whether the model can do it."""
    theirs = [backend.implementation for backend in BACKENDS.values() if backend.function is None]
    ours = {backend.implementation: backend.function for backend in BACKENDS.values() if backend.function is not None}
    hf.install(theirs, _answer, {hf.WRAPPED: _attention, **ours})
    outer, active = _attentions.get(), _forwards.get()
    switching.bind(attention, outer, _before, _after)
    try:
        _attentions.set((*outer, attention))
        yield attention
    finally:
        _attentions.set(outer)
        _forwards.set(active)
        switching.unbind(attention, outer)


def innermost(base: Any) -> Attention | None:
    """The innermost block around the current code that is about this model."""
    return next((attention for attention in reversed(_attentions.get()) if attention.base is base), None)


def running(base: Any) -> Attention | None:
    """The block that the model's current forward follows, or None outside of a forward."""
    return next((attention for attention in reversed(_forwards.get()) if attention.base is base), None)


def implementation_elsewhere(base: Any) -> str | None:
    """What the model runs on if another thread is following a graph on it, else None."""
    return switching.elsewhere(base, _attentions.get())


def trains_otherwise(base: Any) -> bool:
    """Whether the model is in training with what needs transformers' own attention: dropout, gradient checkpointing."""
    if not base.training:
        return False
    drops = (value for name, value in base.config.to_dict().items() if "drop" in name)
    return getattr(base, "is_gradient_checkpointing", False) or any(isinstance(value, float) and value > 0 for value in drops)


def _before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the backbone runs: find the block this call belongs to, check its input and fill in positions."""
    attention = innermost(module)
    if attention is None:
        raise BackendError(
            "this model is following a graph in another thread or context, and this call belongs to none; it would run plain "
            "causal. Use leattn.generate, or open `with leattn.attend(...)` in this thread too"
        )
    given = by_name(module, args, kwargs)
    attention.masks_asked = 0
    if attention.backend.name == "sparse":
        _check_sparse(attention, given)
    prepared = prepared_call(attention, given)
    if attention.cache() is not prepared.get("past_key_values"):
        attention.batch.kept.clear()
        attention.cache = _reference(prepared.get("past_key_values"))
    attention.forwards += 1
    _forwards.set((*(other for other in _forwards.get() if other.base is not module), attention))
    return (), prepared


def _check_sparse(attention: Attention, call: dict[str, Any]) -> None:
    """Move on from sparse, or refuse, where a call asks for what only another backend has."""
    asked = call.get("output_attentions")
    wants_weights = attention.base.config.output_attentions if asked is None else asked
    if attention.alternatives and (wants_weights or trains_otherwise(attention.base)):
        switching.move(attention, _attentions.get())
    elif wants_weights:
        raise BackendError("sparse has no attention weights to return; use backend='eager' for output_attentions")


def _reference(cache: Any) -> Callable[[], Any]:
    """Something that gives the cache for as long as it lives, without keeping it alive."""
    return (lambda: None) if cache is None else ref(cache)


def _after(module: Any, _args: tuple[Any, ...], output: Any) -> None:
    """After the backbone ran, also after an exception: forget the forward, and make sure that a mask was asked for."""
    active = _forwards.get()
    if not active or active[-1].base is not module:
        return
    _forwards.set(active[:-1])
    if output is not None and not active[-1].masks_asked:
        raise NotAsked(f"{type(module).__name__} ran without asking for an attention mask, so it did not follow the graph")


def _answer(config: Any, implementation: str, request: MaskRequest, plain: Any) -> Any:
    """What our mask functions say: transformers' own mask unless the model at hand is following a graph."""
    # ``generate`` with a static cache asks ahead, outside of any forward.
    active = _forwards.get()
    around = active[-1:] or tuple(attention for attention in _attentions.get() if attention.base.config is config)[-1:]
    if not around or around[0].base.config is not config:
        return plain()
    attention = around[0]
    mask = _mask(attention, implementation, request, plain)
    if active:
        attention.masks_asked += 1
    else:
        attention.made_ahead = mask
    return mask


def _mask(attention: Attention, implementation: str, request: MaskRequest, plain: Any) -> Any:
    if attention.implementation != implementation:
        raise BackendError(f"the model was switched to {implementation!r} inside attend; leave the block first")
    if attention.backend.name == "sparse" and attention.alternatives and not attention.batch.is_own_padding(request):
        switching.move(attention, _attentions.get())
    if attention.backend.name == "sdpa" and attention.batch.is_plain and attention.wrapped is None:
        return plain()
    return attention.backend.mask(attention.batch, request)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    """The attention function under the name ``hf.WRAPPED``: a backend's own, between ``before`` and ``after``."""
    active = _forwards.get()
    if not active or active[-1].wrapped is None:
        raise BackendError("a layer's attention was called outside of its model's forward, while the model follows a graph")
    attention = active[-1]
    wrapped = attention.wrapped
    assert wrapped is not None
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = Call(attention, module.layer_idx, query, key, value, attention_mask, scaling, kwargs.get("softcap"))
    function = hf.attention_function(module, attention.backend.implementation)
    output = function(module, query, key, value, wrapped.before(call), **kwargs)
    wrapped.after(call)
    return output
