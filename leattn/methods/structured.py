"""Structured prompting: groups of demonstrations that end together, each of which weighs 1/M."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from leattn.dag.builders import Content
from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode
from leattn.dag.reading import read
from leattn.methods.parts import header_of, side_by_side
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def structured(
    header: Content | None,
    documents: Iterable[Content],
    question: Content,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CompiledPrompt:
    """Structured prompting (Hao et al., arXiv 2212.06713): M groups, each of which weighs 1/M for the question.

    The paper lets the question's own keys count M times, which is the same row of weights as groups that count 1/M. Groups are
    aligned on the right: the last token of each stands right before the question. A group of several demonstrations is one
    document here. The header, which the paper does not have, is seen by all and counts once. Needs a header.

    Examples
    --------
    >>> print(structured([1], [[2, 3], [4]], [5, 6]))
    4 nodes, 6 tokens, density 0.90
      0  header      tokens 0:1  positions 0:1  ■⬚⬚⬚
      1  document 1  tokens 1:3  positions 1:3  ■■⬚⬚
      2  document 2  tokens 3:4  positions 2:3  ■⬚■⬚
      3  question    tokens 4:6  positions 3:5  ■▣▣■  ▣ b -0.6931
    """
    first = header_of(header, tokenizer, "structured")
    docs = side_by_side(documents, first)
    last = ICLNode(question, [*first, *read(docs, log_weight=-math.log(len(docs)))], "question")

    def ending_together(_graph: ICLGraph, lengths: dict[ICLNode, int]) -> dict[ICLNode, int]:
        end = lengths[first[0]] + max(lengths[doc] for doc in docs)
        return {first[0]: 0, **{doc: end - lengths[doc] for doc in docs}, last: end}

    return compile_prompt(last, tokenizer, positions=ending_together)
