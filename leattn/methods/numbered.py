"""Documents side by side, numbered one after another."""

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


def numbered(
    header: Content | None,
    documents: Iterable[Content],
    question: Content,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CompiledPrompt:
    """Parallel documents behind a header, at the positions that they have in plain text.

    What Block-Attention (Ma et al., arXiv 2409.15355), TurboRAG (Lu et al., arXiv 2410.07590) and KVLink (Yang et al., arXiv
    2502.16002) do to positions, on a model that was not trained for it, and with a header that every document sees, so that
    there is one sink. Needs a header. For a model that was trained for blocks that see nothing: :func:`leattn.methods.block`.

    Examples
    --------
    >>> print(numbered([1], [[2, 3], [4]], [5, 6]))
    4 nodes, 6 tokens, density 0.90
      0  header      tokens 0:1  positions 0:1  ■⬚⬚⬚
      1  document 1  tokens 1:3  positions 1:3  ■■⬚⬚
      2  document 2  tokens 3:4  positions 3:4  ■⬚■⬚
      3  question    tokens 4:6  positions 4:6  ■■■■
    """
    first = header_of(header, tokenizer, "numbered")
    docs = side_by_side(documents, first)
    return compile_prompt(ICLNode(question, [*first, *docs], "question"), tokenizer, positions="sequential")
