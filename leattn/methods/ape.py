"""Adaptive parallel encoding: shared positions behind a prefix, and a question that reads the documents more sharply."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from leattn.dag.builders import Content
from leattn.dag.node import ICLNode
from leattn.dag.reading import read
from leattn.methods.parts import header_of, side_by_side
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def ape(
    header: Content | None,
    documents: Iterable[Content],
    question: Content,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    temperature: float = 0.9,
    scale: float = 0.9,
) -> CompiledPrompt:
    """APE (Yang et al., arXiv 2502.05431): parallel documents behind a shared prefix, at shared positions, read as one group.

    Parameters
    ----------
    header, documents, question, tokenizer
        As for every method. Needs a header: it is APE's shared prefix.
    temperature, scale
        APE's attention temperature T and scaling factor S, which are the τ and σ of :func:`leattn.read`: the group weighs
        exp(S·T·log Σ exp(s/T)). The defaults are those of the authors' code (github.com/Infini-AI-Lab/APE, demo_ape.py), for
        Llama 3 and 3.1 8B Instruct, Mistral 7B Instruct 0.3 and Gemma 2 9B; in the paper they are searched for by task. They
        depend on the model: SmolLM2-135M-Instruct did best with T = 0.8, S = 1 in a trial of ours. Measure.

    Examples
    --------
    >>> print(ape([1], [[2, 3], [4]], [5, 6]))
    4 nodes, 6 tokens, density 0.90
      0  header      tokens 0:1  positions 0:1  ■⬚⬚⬚
      1  document 1  tokens 1:3  positions 1:3  ■■⬚⬚
      2  document 2  tokens 3:4  positions 1:2  ■⬚■⬚
      3  question    tokens 4:6  positions 3:5  ■▣▣■  ▣ τ 0.9  σ 0.9
    """
    first = header_of(header, tokenizer, "ape")
    docs = side_by_side(documents, first)
    seen = [*first, *read(docs, temperature=temperature, scale=scale)]
    return compile_prompt(ICLNode(question, seen, "question"), tokenizer)
