"""How the documents of a chat are written: each by itself, in a frame of the user's, and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import Formatter
from typing import TYPE_CHECKING, TypeAlias

from leattn.dag.builders import Content
from leattn.dag.node import ICLNode
from leattn.dag.reading import Read, Reading
from leattn.errors import GraphError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DocumentTemplate: TypeAlias = str | Callable[[int, Content], Content]
"""``"Document [{i}] {text}"``, or a function of the number, from 1, and the document, which gives text or token ids."""


def ungrouped(documents: Sequence[Content | Read] | Read) -> tuple[list[Content], list[tuple[list[int], Reading]]]:
    """All documents in order, and the groups among them that are read in another way, as indices."""
    if isinstance(documents, str):
        raise GraphError(f"documents is a list of texts, not the single text {documents[:40]!r}; put it in a list")
    contents: list[Content] = []
    groups = []
    for document in documents:
        several = document.nodes if isinstance(document, Read) else (document,)
        if isinstance(document, Read) and not document.reading.is_identity:
            groups.append((list(range(len(contents), len(contents) + len(several))), document.reading))
        contents += several
    return contents, groups


def documents_of(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Content],
    template: DocumentTemplate | None,
    separator: Content,
    ids: Sequence[str | None] | None,
) -> list[tuple[Content, str]]:
    """What the node of each document holds, and its id.

    Raises
    ------
    GraphError
        A template that does not hold ``{text}`` once, or holds something else than ``{i}`` beside it; another number of ids
        than of documents.
    """
    if isinstance(ids, str):
        raise GraphError(f"document_ids is a list with one name per document, not the single text {ids!r}; put it in a list")
    if ids is not None and len(ids) != len(documents):
        raise GraphError(f"{len(ids)} document_ids are given for {len(documents)} documents; give one per document, or None")
    names = [None] * len(documents) if ids is None else ids
    return [
        (_joined(tokenizer, [*_framed(template, i, document), separator]), f"document {i}" if name is None else name)
        for i, (document, name) in enumerate(zip(documents, names, strict=True), 1)
    ]


def _framed(template: DocumentTemplate | None, i: int, document: Content) -> list[Content]:
    if template is None:
        return [document]
    if not isinstance(template, str):
        return [template(i, document)]
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise GraphError(f"document_template {template!r} is no format string: {error}; write {{{{ for a brace") from error
    fields = [field for _, field, _, _ in parts if field is not None]
    wrong = next((field for field in fields if field not in ("i", "text")), None)
    if wrong is not None or fields.count("text") != 1:
        what = "lacks {text}, or has it twice" if wrong is None else f"has the field {{{wrong}}}"
        raise GraphError(f"document_template {template!r} {what}; it holds {{text}} once, and {{i}} for the number")
    pieces: list[Content] = []
    for literal, field, spec, _ in parts:
        pieces.append(literal)
        if field is not None:
            pieces.append(document if field == "text" else format(i, spec or ""))
    return pieces


def _joined(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Content]) -> Content:
    """One text, if all are text; otherwise token ids, of which each stretch of text is tokenized by itself."""
    merged: list[Content] = []
    for piece in pieces:
        if isinstance(piece, str) and merged and isinstance(merged[-1], str):
            merged[-1] += piece
        elif not isinstance(piece, str) or piece:
            merged.append(piece)
    if len(merged) < 2:
        return merged[0] if merged else ""
    return [token for piece in merged for token in ICLNode(piece, special_tokens="text").tokenize(tokenizer).tolist()]
