"""What methods are compared on: a question, what it is to be answered from, and what would be right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from leattn.dag.builders import Content
from leattn.errors import LeattnError


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes
    ----------
    question
        What stands last, up to where the answer begins.
    documents
        Documents, or demonstrations, in an order.
    header
        What stands in front; None for the tokenizer's BOS.
    answers
        Texts of which each would be right. They are continuations of the question: after a word they begin with a space.
    choices, right
        Continuations to choose from, and the index of the right one.
    gold
        The index of the document that holds the answer, where one is known.
    id
        A name; the same in every run, where a run is to be resumed.
    """

    question: Content
    documents: Sequence[Content]
    header: Content | None = None
    answers: Sequence[str] = ()
    choices: Sequence[str] = ()
    right: int | None = None
    gold: int | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        if self.right is not None and not 0 <= self.right < len(self.choices):
            raise LeattnError(f"right={self.right} is no index into {len(self.choices)} choices")
        if self.gold is not None and not 0 <= self.gold < len(self.documents):
            raise LeattnError(f"gold={self.gold} is no index into {len(self.documents)} documents")
