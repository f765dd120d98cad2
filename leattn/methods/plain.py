"""Plain text: everything sees everything before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from leattn.dag.builders import Content, causal
from leattn.dag.node import ICLNode
from leattn.errors import GraphError
from leattn.methods.parts import header_of, names
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def plain(
    header: Content | None,
    documents: Iterable[Content],
    question: Content,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CompiledPrompt:
    """Header, documents and question one after another, as in any prompt: what all other methods are compared with.

    The header may be empty, and there may be no documents. Raises as :func:`leattn.compile_prompt` does.

    Examples
    --------
    >>> print(plain([1], [[2, 3], [4]], [5, 6]))
    4 nodes, 6 tokens, density 1.00
      0  header      tokens 0:1  positions 0:1  ■⬚⬚⬚
      1  document 1  tokens 1:3  positions 1:3  ■■⬚⬚
      2  document 2  tokens 3:4  positions 3:4  ■■■⬚
      3  question    tokens 4:6  positions 4:6  ■■■■
    """
    if isinstance(documents, str):
        raise GraphError(f"documents is a list of texts, not the single text {documents[:40]!r}; put it in a list")
    first = header_of(header, tokenizer, "plain", may_be_empty=True)
    listed = list(documents)
    seen = [*first, *causal(listed, first, ids=names(len(listed)), special_tokens="text")]
    return compile_prompt(ICLNode(question, seen, "question"), tokenizer)
