"""The token ids of nodes, each tokenized by itself, and how text is kept from becoming a control token."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from leattn.errors import CompileError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Chunk(Protocol):
    """What is tokenized: a text, with or without control tokens in it, or token ids."""

    @property
    def content(self) -> str | tuple[int, ...]: ...

    @property
    def special_tokens(self) -> str: ...


def tokenize_all(nodes: Sequence[Chunk], tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """Token ids of every node, each tokenized by itself, in one call per treatment of special tokens.

    Raises
    ------
    CompileError
        A node that tokenizes to nothing, or text without a tokenizer.
    """
    result: list[list[int]] = [[] if isinstance(node.content, str) else list(node.content) for node in nodes]
    for treatment in ("parse", "text"):
        picked = [i for i, node in enumerate(nodes) if isinstance(node.content, str) and node.special_tokens == treatment]
        if not picked:
            continue
        if tokenizer is None:
            raise CompileError(f"node {nodes[picked[0]]} holds text; give a tokenizer, or token ids as content")
        encoded = tokenizer(
            [str(nodes[i].content) for i in picked],
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            split_special_tokens=treatment == "text",
            verbose=False,
        )
        control = control_tokens(tokenizer) if treatment == "text" else {}
        for i, ids in zip(picked, encoded["input_ids"], strict=True):
            clean = control.keys().isdisjoint(ids)
            result[i] = list(ids) if clean else _as_text(str(nodes[i].content), control, tokenizer)
    for node, ids in zip(nodes, result, strict=True):
        if not ids:
            raise CompileError(f"node {node} tokenizes to 0 tokens; give it text or remove it")
    return result


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Added tokens that may steer the model: all but whitespace (Gemma's newlines) and plain words."""
    added = tokenizer.get_added_vocab().items()
    return {token: name for name, token in added if len(name) > 1 and name.strip() and not name.strip().isalnum()}


def _as_text(text: str, control: Mapping[int, str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of ``text`` without those in ``control``.

    ``split_special_tokens`` takes apart only what is marked special; ``<tool_call>`` and its like are added tokens without
    that mark. So the text is cut inside each of them, and the pieces are tokenized one by one.
    """
    # The lookahead finds overlapping ones too.
    starts = re.finditer("(?=" + "|".join(map(re.escape, control.values())) + ")", text)
    cuts = [0, *(match.start() + 1 for match in starts), len(text)]
    pieces = [text[start:stop] for start, stop in itertools.pairwise(cuts) if start < stop]
    encoded = tokenizer(pieces, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False)
    return [token for piece in encoded["input_ids"] for token in piece]
