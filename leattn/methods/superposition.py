"""Superposition prompting: the question behind every document, and an answer that sees the best of these paths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from leattn.attention.attend import attend
from leattn.dag.builders import Content
from leattn.dag.node import ICLNode
from leattn.errors import LeattnError
from leattn.methods.parts import header_of, side_by_side, tokens_of
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.positions import Positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def superposition(
    header: Content | None,
    documents: Iterable[Content],
    question: Content,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    answer: Content | None = None,
    keep: int | None = 1,
    prior: float = 1.0,
    positions: Positions = "equilibrium",
    model: Any = None,
) -> CompiledPrompt:
    """Superposition prompting (Merth et al., arXiv 2404.06910): a path per document, the question on each, and an answer.

    A path is a document and the question behind it, and sees the header; no path sees another. The answer sees the header and
    the paths that are kept. Those are the ones with the best scores (:func:`path_scores`), found in one forward over all of
    them. The others are not part of the prompt; what is left stands where it stood among all. Needs a header.

    Parameters
    ----------
    header, documents, question, tokenizer
        As for every method.
    answer
        The last segment, for example ``"\\nAnswer:"``. None takes the question's last token off the paths, so that every path
        still reads as the plain text of its document.
    keep
        How many paths; None keeps all, and then no model is looked at. 1 is what the authors' configuration of path pruning has
        (github.com/apple/ml-superposition-prompting, ``topk.yaml``; 2, 4 and 8 are its other values).
    prior
        The weight of the document's own likelihood in the score; 0 leaves the question's alone. 1 is published. In a trial with
        SmolLM2-135M-Instruct on 20 questions, 0 found the gold document more often.
    positions
        ``"equilibrium"`` is published, and takes rotary positions; ``"after_parents"`` lets all paths start together and the
        question behind each document, the answer behind the longest path.
    model
        The model that scores the paths.

    Raises
    ------
    LeattnError
        No model although paths are to be chosen; ``keep`` below 1; a question or document of too few tokens to have a
        likelihood.

    Examples
    --------
    >>> print(superposition([1], [[2, 3], [4]], [5, 6, 7], keep=None, positions="after_parents"))
    6 nodes, 9 tokens, density 0.73
      0  header      tokens 0:1  positions 0:1  ■⬚⬚⬚⬚⬚
      1  document 1  tokens 1:3  positions 1:3  ■■⬚⬚⬚⬚
      2  document 2  tokens 3:4  positions 1:2  ■⬚■⬚⬚⬚
      3  question 1  tokens 4:6  positions 3:5  ■■⬚■⬚⬚
      4  question 2  tokens 6:8  positions 2:4  ■⬚■⬚■⬚
      5  answer      tokens 8:9  positions 5:6  ■■■■■■
    """
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise LeattnError(f"keep={keep!r} paths; give a whole number from 1 up, or None for all of them")
    paths = _paths(header, documents, question, tokenizer, answer, positions)
    if keep is None or keep >= len(paths.docs):
        return paths.prompt
    if model is None:
        raise LeattnError(f"which {keep} of {len(paths.docs)} paths are kept, a model says; give model=, or keep=None for all")
    scores = _scores(model, paths, prior)
    best = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:keep])
    docs, questions = ([nodes[i] for i in best] for nodes in (paths.docs, paths.questions))
    last = ICLNode(paths.last.content, [*paths.first, *docs, *questions], "answer")
    stood = {node: paths.prompt[node].positions.tolist() for node in paths.prompt.graph}
    stood[last] = stood[paths.last]
    return compile_prompt(last, tokenizer, positions=lambda graph, _lengths: {node: stood[node] for node in graph})


def path_scores(
    header: Content | None,
    documents: Iterable[Content],
    question: Content,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    model: Any,
    answer: Content | None = None,
    prior: float = 1.0,
    positions: Positions = "equilibrium",
) -> list[float]:
    """The score of every path of :func:`superposition`, in nats per token, in the order of the documents.

    It is log p(question | document, header) + ``prior`` · log p(document | header), each the mean over its tokens from the
    second one on, as the authors' code has it (Bayesian path saliency). Parameters and errors are those of
    :func:`superposition`.

    Examples
    --------
    >>> import leattn
    >>> model, tokenizer = leattn.tiny.load()
    >>> ask = "\\nQ: What is the capital of Zarvia?\\nA"
    >>> texts = ["\\nThe capital of Genia is Pardan." + ask, "\\nThe capital of Zarvia is Lumo." + ask]
    >>> genia, zarvia = path_scores(None, texts, ": Lumo.", tokenizer, model=model, answer="\\n", prior=0)
    >>> zarvia > genia  # of answers: the likelihood of questions is what the bundled model never learned
    True
    """
    return _scores(model, _paths(header, documents, question, tokenizer, answer, positions), prior)


@dataclass(frozen=True)
class _Paths:
    first: list[ICLNode]
    docs: list[ICLNode]
    questions: list[ICLNode]
    last: ICLNode
    prompt: CompiledPrompt


def _paths(
    header: Content | None,
    documents: Iterable[Content],
    question: Content,
    tokenizer: PreTrainedTokenizerBase | None,
    answer: Content | None,
    positions: Positions,
) -> _Paths:
    """All paths and the answer that sees them."""
    first = header_of(header, tokenizer, "superposition")
    docs = side_by_side(documents, first)
    if answer is None:
        tokens = tokens_of(question, tokenizer, "question")
        if len(tokens) < 2:
            raise LeattnError("the question has one token, of which nothing is left for the paths; give answer=")
        question, answer = tokens[:-1], tokens[-1:]
    questions = [ICLNode(question, [*first, doc], f"question {i}") for i, doc in enumerate(docs, 1)]
    last = ICLNode(answer, [*first, *docs, *questions], "answer")
    return _Paths(first, docs, questions, last, compile_prompt(last, tokenizer, positions=positions))


@torch.no_grad()
def _scores(model: Any, paths: _Paths, prior: float) -> list[float]:
    """One forward; logits are made where a token's likelihood is asked for."""
    prompt = paths.prompt
    nodes = [*paths.questions, *(paths.docs if prior else [])]
    spans = [prompt.spans[node] for node in nodes]
    for node, (start, stop) in zip(nodes, spans, strict=True):
        if stop - start < 2:
            out = "give answer=, or a longer question" if node in paths.questions else "give prior=0, or a longer document"
            raise LeattnError(
                f"{prompt.graph.names[node]!r} has one token on its path, and its likelihood is that of the rest; {out}"
            )
    rows = [row for start, stop in spans for row in range(start, stop - 1)]
    with attend(model, prompt) as attention:
        ids = attention.inputs["input_ids"]  # [1, S]
        logits = attention.record.run(model, ids, rows, use_cache=False).logits[0]  # [rows, V]
    said = ids[0, torch.tensor(rows, device=ids.device) + 1].to(logits.device)
    likelihoods = -torch.nn.functional.cross_entropy(logits.float(), said, reduction="none").double().cpu()
    means = [float(of.mean()) for of in torch.split(likelihoods, [stop - start - 1 for start, stop in spans])]
    count = len(paths.docs)
    return [means[i] + (prior * means[count + i] if prior else 0.0) for i in range(count)]
