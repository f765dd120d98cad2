"""Which tokens an operation touches: by node, by span or by index."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias, cast

import torch

from leattn.dag.node import ICLNode
from leattn.errors import LeattnError
from leattn.prompt.compiled import CompiledPrompt

Place: TypeAlias = ICLNode | str | int | tuple[int, int] | range
Where: TypeAlias = Place | Iterable[Place]
"""A node or its id, a token index of the prompt, a span ``(start, end)``, or several of them in a list."""


def tokens_at(prompt: CompiledPrompt, where: Where) -> list[int]:
    """Token indices of a prompt, in the order given, each once.

    Raises
    ------
    LeattnError
        An index outside of the prompt, an empty span, something that is no place.

    Examples
    --------
    >>> from leattn import ICLNode, compile_prompt
    >>> prompt = compile_prompt(ICLNode([7, 8, 9], id="a"))
    >>> tokens_at(prompt, "a"), tokens_at(prompt, [2, (0, 2)])
    ([0, 1, 2], [2, 0, 1])
    """
    one = isinstance(where, (ICLNode, str, int, range)) or _is_span(where) or not isinstance(where, Iterable)
    places = cast(Iterable[Place], [where] if one else where)
    return list(dict.fromkeys(token for place in places for token in _tokens(prompt, place)))


def all_but_the_last(prompt: CompiledPrompt) -> list[int]:
    """Every token but the last of every sink: what Ben Artzy and Schwartz (arXiv 2409.03621) manipulate."""
    last = {prompt.spans[sink][1] - 1 for sink in prompt.graph.sinks}
    return [token for token in range(len(prompt)) if token not in last]


def as_mask(tokens: Iterable[int], prompt: CompiledPrompt, columns: int) -> torch.Tensor:
    """True at the columns of some tokens of a prompt that stands at the right end of a padded row, ``[columns]``."""
    mask = torch.zeros(columns, dtype=torch.bool)
    mask[torch.tensor(list(tokens), dtype=torch.long) + columns - len(prompt)] = True
    return mask


def _is_span(where: object) -> bool:
    return isinstance(where, tuple) and len(where) == 2 and all(type(part) is int for part in where)


def _tokens(prompt: CompiledPrompt, place: Place) -> range:
    if isinstance(place, (ICLNode, str)):
        return range(*prompt[place].span)
    if isinstance(place, bool) or not isinstance(place, (int, range, tuple)):
        raise LeattnError(f"tokens are named by a node, an id, an index, a span (start, end) or a list of them, not {place!r}")
    span = range(place, place + 1) if isinstance(place, int) else place if isinstance(place, range) else range(*place)
    if not len(span):
        raise LeattnError(f"the span {place} is empty; give (start, end) with start < end")
    if min(span) < 0 or max(span) >= len(prompt):
        raise LeattnError(f"token {place} is outside of the prompt, which has {len(prompt)} tokens, 0 to {len(prompt) - 1}")
    return span
