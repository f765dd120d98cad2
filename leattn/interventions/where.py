"""Which tokens an operation touches: by node, by span or by index."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias, cast

from leattn.dag.node import ICLNode
from leattn.errors import LeattnError
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.slots import Text, text_of

Place: TypeAlias = ICLNode | str | int | tuple[int, int] | range
Where: TypeAlias = Place | Iterable[Place]
"""A node or its id, a token index of the prompt, a span ``(start, end)``, or several of them in a list."""


def tokens_at(prompt: CompiledPrompt | Text, where: Where) -> list[int]:
    """Token indices of a prompt, or slots of a text, in the order given, each once.

    Raises
    ------
    LeattnError
        An index outside of the prompt, or not known before a program runs; an empty span; something that is no place.

    Examples
    --------
    >>> from leattn import ICLNode, compile_prompt
    >>> prompt = compile_prompt(ICLNode([7, 8, 9], id="a"))
    >>> tokens_at(prompt, "a"), tokens_at(prompt, [2, (0, 2)])
    ([0, 1, 2], [2, 0, 1])
    """
    one = isinstance(where, (ICLNode, str, int, range)) or _is_span(where) or not isinstance(where, Iterable)
    places = cast(Iterable[Place], [where] if one else where)
    text = prompt if isinstance(prompt, Text) else text_of(prompt, generates=False)
    return list(dict.fromkeys(token for place in places for token in _tokens(text, place)))


def known_tokens_at(text: Text, place: Place) -> list[int]:
    """The slots of a place's tokens that are known beforehand: of a node that the model writes, its header's."""
    return text.known_of(place) if isinstance(place, (ICLNode, str)) else tokens_at(text, place)


def _is_span(where: object) -> bool:
    return isinstance(where, tuple) and len(where) == 2 and all(type(part) is int for part in where)


def _tokens(text: Text, place: Place) -> list[int]:
    if isinstance(place, (ICLNode, str)):
        return text.slots_of(place)
    if isinstance(place, bool) or not isinstance(place, (int, range, tuple)):
        raise LeattnError(f"tokens are named by a node, an id, an index, a span (start, end) or a list of them, not {place!r}")
    span = range(place, place + 1) if isinstance(place, int) else place if isinstance(place, range) else range(*place)
    if not len(span):
        raise LeattnError(f"the span {place} is empty; give (start, end) with start < end")
    indexed = len(text.by_index)
    if min(span) >= 0 and max(span) >= indexed < len(text.known):
        raise LeattnError(
            f"token {place} has no index yet: what stands before it is still to be written; name its node, or an index below "
            f"{indexed}"
        )
    if min(span) < 0 or max(span) >= indexed:
        raise LeattnError(f"token {place} is outside of the prompt, which has {indexed} tokens, 0 to {indexed - 1}")
    return [text.by_index[index] for index in span]
