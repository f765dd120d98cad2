"""Published ways to encode a header, documents (or demonstrations) and a question, under one signature.

``leattn.methods.METHODS[name](header, documents, question, tokenizer)`` gives a :class:`leattn.CompiledPrompt`, which
``generate``, ``forward`` and all analysis take. Parameters have the published defaults. Methods that look at a model first take
it as ``model=``.

Header, documents and question are texts or token ids, as the content of an :class:`leattn.ICLNode`. Documents are text without
control tokens (``special_tokens="text"``). The header stands first, and is what all see where a method needs such a root (a
first token that takes the attention nobody else wants, see docs/roots.md); for None it is the tokenizer's BOS. Nothing is added
to it: write a BOS in front of a header that is to have one.

One of your own is a function of that signature in a file of yours: ``METHODS["mine"] = mine``.
"""

from __future__ import annotations

from collections.abc import Callable

from leattn.methods.ape import ape
from leattn.methods.block import block
from leattn.methods.dial import Dial, dial
from leattn.methods.numbered import numbered
from leattn.methods.pcw import pcw
from leattn.methods.plain import plain
from leattn.methods.prompt_cache import prompt_cache
from leattn.methods.recompute import recompute
from leattn.methods.structured import structured
from leattn.methods.superposition import path_scores, superposition
from leattn.prompt.compiled import CompiledPrompt

METHODS: dict[str, Callable[..., CompiledPrompt]] = {
    "plain": plain,
    "pcw": pcw,
    "numbered": numbered,
    "block": block,
    "ape": ape,
    "structured": structured,
    "superposition": superposition,
    "prompt_cache": prompt_cache,
    "recompute": recompute,
}
"""Name → method."""

ORDER_FREE = frozenset({"pcw", "ape", "structured", "superposition"})
"""The methods that give the same numbers, to rounding, for every order of the documents."""

__all__ = [
    "METHODS",
    "ORDER_FREE",
    "Dial",
    "ape",
    "block",
    "dial",
    "numbered",
    "path_scores",
    "pcw",
    "plain",
    "prompt_cache",
    "recompute",
    "structured",
    "superposition",
]
