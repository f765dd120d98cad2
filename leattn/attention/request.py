"""What a model asks for when it asks for a mask, and what a backend is: something that answers with attention.

Shapes: P prompts, B rows (a multiple of P: beams and return sequences repeat a prompt's row), H heads, Q queries, K keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from leattn.attention.reading import Turns
from leattn.errors import BackendError
from leattn.model.record import Model
from leattn.model.registry import attention_function, check_keywords
from leattn.prompt.columns import Columns
from leattn.prompt.masks import additive

MaskMode: TypeAlias = Literal["combine", "replace"]

Need: TypeAlias = Literal["weights", "scores", "mask", "additive mask", "padding", "dropout", "readings"]
"""What a forward may ask of its backend beyond the graph itself."""

NEEDS: dict[Need, str] = {
    "weights": "{} has no attention weights to return; use backend='eager' for output_attentions",
    "scores": "this changes attention scores, which backend {!r} cannot carry; use backend='eager' or 'sdpa'",
    "mask": "{} takes no mask of your own; use backend='eager' or 'sdpa', or edit the prompt",
    "additive mask": "{} takes a boolean mask only; give a boolean mask, or use backend='eager' or 'sdpa'",
    "padding": "{} takes no attention_mask that hides tokens of a prompt; use backend='sdpa'",
    "dropout": "{} has no attention dropout; use model.eval() or set it to 0 in the config",
    "readings": "{} reads everything as it is, and a node of this graph does not (leattn.read); use backend='sparse' or 'sdpa'",
}
"""Why a backend, by name, that does not carry a need is refused."""

LayerAttention: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]
"""What travels through a model as its mask: ``(module, query, key, value, **kwargs)`` → output ``[B, Q, H, D]``, weights.

Query is ``[B, H, Q, D]``, key and value are ``[B, G, K, D]``. A ``mask`` attribute, if it has one, is what may be changed.
"""


@dataclass(frozen=True)
class Request:
    """One mask of one forward: the columns of the queries, and how many keys there are.

    ``window`` is None for full attention. ``padding`` is the caller's own ``attention_mask``, ``[B, ≤ K]`` bool, where it hides
    more than the padding in front of prompts. ``user`` is a mask of the user's, ``[1 or P, 1 or H, ≥ S, ≥ S]``, combined with
    the graph, or instead of it. ``kept`` is a backend's own, from one step of decoding to the next: empty
    whenever the prompt runs. ``may_skip`` says that plain text may go without a mask. ``turns`` are known where a reading has a
    shift.
    """

    columns: Columns
    rows: int
    queries: range
    keys: int
    window: int | None
    dtype: torch.dtype
    device: torch.device
    padding: Tensor | None = None
    user: Tensor | None = None
    replaces: bool = False
    kept: dict[Any, Any] = field(default_factory=dict)
    may_skip: bool = True
    turns: Turns = ()

    @property
    def repeats(self) -> int:
        """How many rows each prompt has."""
        return self.columns.repeats(self.rows)

    @property
    def is_plain(self) -> bool:
        """Whether no mask is needed: plain causal text, all of it or its next token."""
        if self.user is not None or self.padding is not None or (self.window is not None and self.keys > self.window):
            return False
        return (
            self.may_skip and self.columns.is_plain and len(self.queries) in (1, self.keys) and self.queries.stop == self.keys
        )

    def allowed(self) -> Tensor:
        """Who may attend, ``[B, 1 or H, Q, K]`` bool: the graph, the user's mask if boolean, and the caller's padding."""
        columns, queries, keys = self.columns, self.queries, self.keys
        allowed = (self._open() if self.replaces else columns.dense(queries, keys, self.window))[:, None]
        if self.user is not None and not self.is_additive:
            allowed = allowed & self._user_rows(self.user)
        allowed = allowed.repeat_interleave(self.repeats, 0).to(self.device)
        if self.padding is None:
            return allowed
        visible = self.visible_keys()[:, None, None]
        itself = torch.arange(queries.start, queries.stop, device=self.device)[:, None] == torch.arange(
            keys, device=self.device
        )
        # A row in which nothing is visible has no softmax; nobody reads it.
        return allowed & (visible | itself)

    def additive(self) -> Tensor:
        """Who may attend as numbers to add to the scores, ``[B, 1 or H, Q, K]`` in ``dtype``, with a maximum of 0."""
        mask = additive(self.allowed(), self.dtype)
        if self.user is None or not self.is_additive:
            return mask
        user = self._user_rows(self.user).to(mask)
        # The smallest number twice would overflow to −inf, and a row of −inf has no softmax.
        return (mask + user.repeat_interleave(self.repeats, 0)).clamp(min=torch.finfo(self.dtype).min)

    @property
    def is_additive(self) -> bool:
        """Whether the user's mask is one of numbers."""
        return self.user is not None and self.user.dtype != torch.bool

    def _user_rows(self, user: Tensor) -> Tensor:
        """``[P, 1 or H, Q, K]`` of the user's mask: later queries inherit its last row, later keys are open."""
        mask = user.expand(len(self.columns.rows), -1, -1, -1)
        index = torch.arange(self.queries.start, self.queries.stop, device=mask.device).clamp(max=mask.shape[2] - 1)
        rows = mask[:, :, index, : self.keys]
        return torch.nn.functional.pad(rows, (0, self.keys - rows.shape[-1]), value=0.0 if self.is_additive else True)

    def visible_keys(self) -> Tensor:
        """The keys that the caller's ``padding`` leaves, ``[B, K]`` bool; all that it says nothing about."""
        assert self.padding is not None
        visible = self.padding[:, : self.keys].to(self.device, torch.bool)
        return torch.nn.functional.pad(visible, (0, self.keys - visible.shape[1]), value=True)

    def _open(self) -> Tensor:
        """Where a mask that replaces the graph leaves the choice open: all of the prompt, causally what follows it."""
        columns = self.columns
        query = torch.arange(self.queries.start, self.queries.stop, device=columns.device)[:, None]
        key = torch.arange(self.keys, device=columns.device)
        padding = torch.tensor(columns.padding, device=columns.device)[:, None, None]
        allowed = ((key < columns.width) | (query >= key)) & (key >= padding) | (query == key)
        return allowed if self.window is None else allowed & columns.within(self.queries, self.keys, self.window)


def never(record: Model) -> str | None:
    """No reason to refuse a model."""
    del record
    return None


@dataclass(frozen=True)
class Backend:
    """A way to compute the graph's attention. One of your own is passed as ``backend=``; see docs/extending.md.

    Attributes
    ----------
    name
        What users call it.
    attention
        The attention of the layers that a request is for. Asked once per forward and kind of layer.
    refusal
        Why it cannot serve a model, in words that follow "backend 'name' cannot run this model: "; None if it can.
    implementation
        The attention implementation of transformers whose masks ``attention(request).mask`` are; None if there is none.
    carries
        What it has beyond the graph.
    device
        The type of device that it runs on; None for any.
    """

    name: str
    attention: Callable[[Request], LayerAttention]
    refusal: Callable[[Model], str | None] = never
    implementation: str | None = None
    carries: Collection[Need] = ()
    device: str | None = None

    def lacks(self, needs: Collection[Need]) -> str | None:
        """The sentence for the first need that it does not carry, or None."""
        return next((NEEDS[need].format(self.name) for need in NEEDS if need in needs and need not in self.carries), None)


@dataclass(frozen=True)
class UnderMask:
    """Transformers' own attention function, ``implementation``, under a mask as it takes them."""

    implementation: str
    mask: Any

    def __call__(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        function = attention_function(module, self.implementation)
        if self.implementation != "eager":  # which is the family's own, made for what its layers hand over
            check_keywords(kwargs, _parameters(function), f"transformers' {self.implementation}")
        if self.implementation == "sdpa" and self.mask is None:
            kwargs["is_causal"] = True  # some layers say that they are not, and rely on a mask
        output: tuple[Tensor, Tensor | None] = function(module, query, key, value, self.mask, **kwargs)
        return output


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters) | {"dropout", "softcap"}  # which it refuses by itself


def checked_mask(mask: Tensor, columns: Columns) -> Tensor:
    """A user's 4D mask on the columns' device, after everything that can be wrong with it.

    Raises
    ------
    BackendError
        Another shape, a dtype that is neither, or an additive mask whose maximum is not 0.
    """
    prompts, width = len(columns.rows), columns.width
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise BackendError(f"mask is a 4D tensor [B, 1 or H, Q, K], not {shape}")
    if mask.shape[0] not in (1, prompts) or mask.shape[2] < width or mask.shape[3] < width:
        raise BackendError(
            f"mask has shape {list(mask.shape)}; these {prompts} prompts of at most {width} tokens need "
            f"[1 or {prompts}, 1 or H, ≥ {width}, ≥ {width}]"
        )
    if mask.dtype == torch.bool:
        return mask.to(columns.device)
    if not mask.is_floating_point():
        raise BackendError(
            f"mask has dtype {mask.dtype}; give a boolean mask (True may attend), e.g. mask.bool(), or an additive one"
        )
    if mask.isnan().any() or mask.max() != 0:
        raise BackendError(
            f"an additive mask is in inverted form: 0 where a token may attend and negative elsewhere, so its maximum is 0; "
            f"this one has maximum {mask.max().item():g}. For a 0/1 mask give mask.bool()"
        )
    return mask.to(columns.device)
