"""A text cut into segments at words, sentences, paragraphs or a pattern, of tokens that it has as a whole."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import TYPE_CHECKING, Literal, TypeAlias

from leattn.dag.segments import Segment
from leattn.errors import CompileError, LeattnError, choices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

At: TypeAlias = Literal["words", "sentences", "paragraphs"] | re.Pattern[str]

_PLACES: dict[str, re.Pattern[str]] = {
    "words": re.compile(r"(?<=\S)(?=\s+\S)"),
    "sentences": re.compile(r"(?<=[.!?…])(?=\s+\S)|(?<=[.!?…][\"'”’)\]»])(?=\s+\S)|(?<=[。！？])(?=\S)"),
    "paragraphs": re.compile(r"\n\s*\n(?=\s*\S)"),
}
"""Where a piece starts. The space between two pieces is the later one's, as tokenizers have it."""


def split_text(tokenizer: PreTrainedTokenizerBase, text: str, *, at: At = "sentences") -> tuple[list[int], list[Segment]]:
    """Token ids of a text and its segments, for :func:`leattn.from_segments`: tokenized once, so ids and positions stay.

    Each segment sees all before it, so the graph is the plain text; give segments other ``parents`` to cut edges.

    Parameters
    ----------
    tokenizer
        A fast one, which knows where in the text its tokens are. What it puts around a text (BOS) is there, too, each token a
        segment of its own.
    at
        Where to cut: ``"words"`` (before white space), ``"sentences"`` (after ``. ! ? …``, with a quote or bracket closed, that
        white space follows, and after ``。！？``; abbreviations are cut as well), ``"paragraphs"`` (before a blank line), or a
        compiled regular expression: a piece starts where it matches.

    Returns
    -------
    input_ids : list of int
    segments : list of Segment
        In text order, named by their first ten characters, made unique. ``metadata["text"]`` is the piece.

    Raises
    ------
    LeattnError
        An unknown place to cut at.
    CompileError
        A slow tokenizer, or a text without tokens.

    Examples
    --------
    >>> import leattn
    >>> _, tokenizer = leattn.tiny.load()
    >>> text = "The sky is blue. The sea is blue."
    >>> print(leattn.compile_prompt(leattn.from_segments(*split_text(tokenizer, text)), tokenizer))  # doctest: +ELLIPSIS
    2 nodes, ... density 1.00
    ...

    Notes
    -----
    A token belongs to the piece in which it starts, also where a cut goes through it.
    """
    if not isinstance(at, re.Pattern) and at not in _PLACES:
        raise LeattnError(choices("at", at, _PLACES) + ", or give a compiled regular expression")
    if not getattr(tokenizer, "is_fast", False):
        raise CompileError(
            f"{type(tokenizer).__name__} does not say where in a text its tokens are; use a fast tokenizer, or tokenize the "
            "pieces yourself and give from_segments where they are"
        )
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    ids, places, added = list(encoded["input_ids"]), encoded["offset_mapping"], encoded["special_tokens_mask"]
    if not ids:
        raise CompileError(f"the text {text[:40]!r} tokenizes to 0 tokens; give it some text")
    pattern = at if isinstance(at, re.Pattern) else _PLACES[at]
    starts = [0]
    for match in pattern.finditer(text):
        if text[starts[-1] : match.start()].strip():  # white space alone goes with what comes after it
            starts.append(match.start())
    bounds = [*starts, len(text)]
    # The piece of each token; of one that stands around the text, none.
    owners = [-1 - i if special else bisect_right(starts, places[i][0]) - 1 for i, special in enumerate(added)]
    segments: list[Segment] = []
    taken: dict[str, int] = {}
    first = 0
    for i in range(1, len(ids) + 1):
        if i < len(ids) and owners[i] == owners[first]:
            continue
        owner = owners[first]
        piece = str(tokenizer.convert_ids_to_tokens(ids[first])) if owner < 0 else text[bounds[owner] : bounds[owner + 1]]
        name = _unique(piece.strip()[:10].rstrip() or repr(piece), taken)
        segments.append(Segment(first, i, name, range(len(segments)), {"text": piece}))
        first = i
    return ids, segments


def _unique(name: str, taken: dict[str, int]) -> str:
    """``name``, or ``name #2`` and so on; ``taken`` has the last number of each."""
    number = taken.get(name, 0) + 1
    taken[name] = number
    if number == 1:
        return name
    return _unique(f"{name} #{number}", taken)
