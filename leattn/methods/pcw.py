"""Parallel Context Windows: documents side by side at the same positions."""

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


def pcw(
    header: Content | None,
    documents: Iterable[Content],
    question: Content,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CompiledPrompt:
    """Parallel Context Windows (Ratner et al., arXiv 2212.10947).

    Every document is a window: it sees the header and itself, all start at the same position, and the question, which sees
    everything, starts behind the longest. A window of several demonstrations is one text here. Needs a header.

    Examples
    --------
    >>> print(pcw([1], [[2, 3], [4]], [5, 6]))
    4 nodes, 6 tokens, density 0.90
      0  header      tokens 0:1  positions 0:1  ■⬚⬚⬚
      1  document 1  tokens 1:3  positions 1:3  ■■⬚⬚
      2  document 2  tokens 3:4  positions 1:2  ■⬚■⬚
      3  question    tokens 4:6  positions 3:5  ■■■■
    """
    first = header_of(header, tokenizer, "pcw")
    docs = side_by_side(documents, first)
    return compile_prompt(ICLNode(question, [*first, *docs], "question"), tokenizer)
