"""The token ids of nodes, each tokenized by itself, and how text is kept from becoming a control token."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from leattn.errors import CompileError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

tokenized_with: WeakKeyDictionary[Any, PreTrainedTokenizerBase] = WeakKeyDictionary()
"""The tokenizer each node was last given to be tokenized by itself. Never tokens: another one means others."""


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
        A node that tokenizes to nothing, text without a tokenizer, or text that cannot be kept from holding a control token.
    """
    result: list[list[int]] = [[] if isinstance(node.content, str) else list(node.content) for node in nodes]
    for treatment, encode in (("parse", _parsed), ("text", _as_text)):
        picked = [i for i, node in enumerate(nodes) if isinstance(node.content, str) and node.special_tokens == treatment]
        if not picked:
            continue
        if tokenizer is None:
            raise CompileError(f"node {str(nodes[picked[0]])!r} holds text; give a tokenizer, or token ids as content")
        for i, ids in zip(picked, encode([nodes[i] for i in picked], tokenizer), strict=True):
            result[i] = ids
    for node, ids in zip(nodes, result, strict=True):
        if not ids:
            raise CompileError(f"node {str(node)!r} tokenizes to 0 tokens; give it text or remove it")
    return result


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Added tokens that may steer the model: all but whitespace (Gemma's newlines, SentencePiece's spaces) and plain words."""
    added = tokenizer.get_added_vocab().items()
    plain = {token: name.replace("▁", " ").strip() for name, token in added}
    return {token: name for name, token in added if len(name) > 1 and plain[token] and not plain[token].isalnum()}


def _parsed(nodes: Sequence[Chunk], tokenizer: PreTrainedTokenizerBase, *, split: bool = False) -> list[list[int]]:
    encoded = tokenizer(
        [str(node.content) for node in nodes],
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        split_special_tokens=split,
        verbose=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _as_text(nodes: Sequence[Chunk], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids as if the tokenizer had no control tokens.

    ``split_special_tokens`` of a fast tokenizer takes apart only what is marked special; ``<tool_call>`` and its like are
    added tokens without that mark. Cutting the text inside them would do, if no tokenizer put a space before each piece.
    """
    control = control_tokens(tokenizer)
    if getattr(tokenizer, "is_fast", False):
        result = _without(control, nodes, tokenizer.backend_tokenizer)
    else:
        result = _parsed(nodes, tokenizer, split=True)
    if any(not control.keys().isdisjoint(ids) for ids in result):
        _check_pieces(control.keys() - _unknown(tokenizer), nodes, result, control)
    return result


def _check_pieces(
    steering: Set[int], nodes: Sequence[Chunk], result: Sequence[Sequence[int]], control: Mapping[int, str]
) -> None:
    """Refuse a text that the model itself, without any added token, turns into a control token."""
    for node, ids in zip(nodes, result, strict=True):
        found = steering & set(ids)
        if found:
            names = ", ".join(repr(control[token]) for token in sorted(found))
            raise CompileError(
                f"the text of node {str(node)!r} holds {names}, also a piece of the tokenizer's own vocabulary, so that it "
                "cannot be kept from becoming a control token; take it out of the text, or give token ids as content"
            )


def _without(control: Collection[int], nodes: Sequence[Chunk], backend: Any) -> list[list[int]]:
    """Ids of a fast tokenizer with the same model, of which only the added tokens that are no control tokens are left."""
    from tokenizers import Tokenizer

    plain = Tokenizer(backend.model)  # shared, not copied
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        setattr(plain, part, getattr(backend, part))
    added = backend.get_added_tokens_decoder()
    kept = {token: one for token, one in sorted(added.items()) if token not in control and not one.special}
    plain.add_tokens(list(kept.values()))
    renumbered = {plain.token_to_id(one.content): token for token, one in kept.items()}
    encoded = plain.encode_batch([str(node.content) for node in nodes], add_special_tokens=False)
    return [[renumbered.get(token, token) for token in one.ids] for one in encoded]


def _unknown(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What the tokenizer gives for what it does not know: that is nothing a text can make use of."""
    found = {tokenizer.unk_token_id}
    if getattr(tokenizer, "is_fast", False):
        model = tokenizer.backend_tokenizer.model
        with contextlib.suppress(Exception):  # a model without a token for it raises what it likes
            found |= {piece.id for piece in model.tokenize("\U0010fffd")}
    return found - {None}
