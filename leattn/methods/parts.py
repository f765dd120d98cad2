"""What methods are built from: the header, documents side by side, and the tokens of a content."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from leattn.dag.bos import bos
from leattn.dag.builders import Content, parallel
from leattn.dag.node import ICLNode
from leattn.errors import GraphError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def header_of(
    header: Content | None, tokenizer: PreTrainedTokenizerBase | None, method: str, *, may_be_empty: bool = False
) -> list[ICLNode]:
    """The header as a list of one node, or of none where it may be empty and is; the BOS for None.

    Raises
    ------
    GraphError
        An empty header where the documents need one, or None without a tokenizer that has a BOS.
    """
    if header is None:
        if tokenizer is None or tokenizer.bos_token_id is None:
            what = "there is no tokenizer to take a BOS from" if tokenizer is None else "this tokenizer has no BOS"
            raise GraphError(f"header=None of {method!r}, and {what}; give the header as text or token ids")
        return [bos(tokenizer)]
    if len(header) == 0:
        if not may_be_empty:
            raise GraphError(
                f"{method!r} has an empty header, so that each document would begin with a sink of its own (docs/roots.md); "
                "give some text that all of them see, or None for the BOS"
            )
        return []
    return [ICLNode(header, id="header")]


def side_by_side(documents: Iterable[Content], parents: Iterable[ICLNode]) -> list[ICLNode]:
    """Nodes ``document 1``, ``document 2`` … that see ``parents`` and not each other.

    Raises
    ------
    GraphError
        A single text for the list, or no document at all.
    """
    listed = listed_documents(documents)
    return parallel(listed, parents, ids=names(len(listed)), special_tokens="text")


def listed_documents(documents: Iterable[Content]) -> list[Content]:
    """Documents as a list that is not empty; raises as :func:`side_by_side` does."""
    if isinstance(documents, str):
        raise GraphError(f"documents is a list of texts, not the single text {documents[:40]!r}; put it in a list")
    listed = list(documents)
    if not listed:
        raise GraphError("there is no document; give one or more, or take leattn.methods.plain for a question alone")
    return listed


def names(count: int) -> list[str]:
    """The ids of documents."""
    return [f"document {i}" for i in range(1, count + 1)]


def tokens_of(
    content: Content, tokenizer: PreTrainedTokenizerBase | None, name: str, *, is_document: bool = False
) -> list[int]:
    """The token ids of a content, as the node of that name would have them."""
    node = ICLNode(content, id=name, special_tokens="text" if is_document else "parse")
    return [int(token) for token in node.tokenize(tokenizer)]
