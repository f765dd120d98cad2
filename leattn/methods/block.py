"""Block-Attention: blocks that see nothing but themselves, and a last one that sees all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from leattn.dag.builders import Content
from leattn.dag.node import ICLNode
from leattn.methods.parts import header_of, side_by_side
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def block(
    header: Content | None,
    documents: Iterable[Content],
    question: Content,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CompiledPrompt:
    """Block-Attention (Ma et al., arXiv 2409.15355), as its models are trained and served.

    The header is a block like the documents: none of them sees another, positions run on as in plain text, and the last block,
    the question, sees all. TurboRAG (arXiv 2410.07590) does the same. It differs from :func:`leattn.methods.numbered` in one
    thing: documents do not see the header. So each begins with a sink of its own, which takes a model trained for it; without
    one, take ``numbered``. The header may be empty.

    Examples
    --------
    >>> print(block([1], [[2, 3], [4]], [5, 6]))
    4 nodes, 6 tokens, density 0.76
      0  header      tokens 0:1  positions 0:1  ■⬚⬚⬚
      1  document 1  tokens 1:3  positions 1:3  ⬚■⬚⬚
      2  document 2  tokens 3:4  positions 3:4  ⬚⬚■⬚
      3  question    tokens 4:6  positions 4:6  ■■■■
    """
    first = header_of(header, tokenizer, "block", may_be_empty=True)
    docs = side_by_side(documents, ())
    return compile_prompt(ICLNode(question, [*first, *docs], "question"), tokenizer, positions="sequential")
