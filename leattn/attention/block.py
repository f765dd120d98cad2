"""A block: what a model follows while ``with attend(...)`` is open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

from torch import Tensor

from leattn.attention.reading import Turns
from leattn.attention.request import Backend, Need
from leattn.errors import BackendError
from leattn.model import registry
from leattn.model.record import Model
from leattn.prompt.columns import Columns
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.slots import Text


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
    texts
        The targets of a program, as operations name their tokens; none for prompts, which say that themselves.
    absent
        Why no forward can follow this block, for one that is there for the blocks inside it; None for all others.
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
    texts: tuple[Text, ...] = ()
    absent: str | None = None
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
        self.check_followed()
        columns = self.columns
        positions = columns.position_ids(range(columns.width))
        return {"input_ids": columns.input_ids, "attention_mask": columns.attention_mask, "position_ids": positions}

    def check_followed(self) -> None:
        """Refuse to run where there is no prompt to follow.

        Raises
        ------
        BackendError
            See ``absent``.
        """
        if self.absent is not None:
            raise BackendError(self.absent)

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


BLOCKS: ContextVar[tuple[Block, ...]] = ContextVar("leattn_blocks", default=())
"""The blocks around the current code, outermost first."""
FORWARDS: ContextVar[tuple[Block, ...]] = ContextVar("leattn_forwards", default=())
"""The forward passes around the current code, each as the block that it follows."""


UNFOLLOWED: ContextVar[Any] = ContextVar("leattn_unfollowed", default=None)
"""The config of a model whose forwards run as if no block were open on it."""


def innermost(record: Model) -> Block | None:
    """The innermost block around the current code that is about this model."""
    return next((block for block in reversed(BLOCKS.get()) if block.record is record), None)


def running(record: Model) -> Block | None:
    """The block that the model's current forward follows, or None outside of a forward."""
    return next((block for block in reversed(FORWARDS.get()) if block.record is record), None)


def standing_needs(record: Model, wants_weights: bool | None = None) -> set[Need]:
    """What a model in its present state asks of a backend, whatever it is called with."""
    needs: set[Need] = {"dropout"} if record.drops else set()
    if record.base.config.output_attentions if wants_weights is None else wants_weights:
        needs.add("weights")
    return needs
