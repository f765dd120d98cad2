"""Best of n: several drafts, and the one that a scorer likes most."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from leattn.dag.gennode import GenNode
from leattn.dag.graph import ICLGraph
from leattn.errors import LeattnError, choices
from leattn.generation.generate import generate
from leattn.generation.program import build
from leattn.generation.result import Generation
from leattn.generation.session import session
from leattn.kv.store import KVStore
from leattn.model.record import Model
from leattn.patterns.drafts import sampled, texts_of
from leattn.prompt.compile import compile_prompt
from leattn.prompt.positions import Positions
from leattn.prompt.visible import Visibility
from leattn.table import html_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Best:
    """The draft with the highest score.

    Attributes
    ----------
    name : str
        Its node, which is ``generation.realised[name]``; of several with the same score, the earliest.
    scores : mapping of str to float
        Of every draft, by node name.
    generation : Generation
        All drafts.
    """

    name: str
    scores: Mapping[str, float]
    generation: Generation = field(repr=False)

    @property
    def text(self) -> str:
        """What the best draft says."""
        return self.generation[self.name]

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        ranked = sorted(self.scores, key=lambda name: -self.scores[name])
        rows = [(name, self.scores[name], self.generation[name]) for name in ranked]
        return html_table(["draft", "score", "text"], rows, f"the best is {self.name}")


def best_of_n(
    model: Any,
    draft: GenNode,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    n: int,
    scorer: Callable[[str], float] | Literal["logprob"] = "logprob",
    **options: Any,
) -> Best:
    """Write a node ``n`` times by sampling, and take the draft with the highest score; of equal drafts, the earliest.

    Parameters
    ----------
    model, draft, tokenizer, n, **options
        As for :func:`leattn.patterns.self_consistency`.
    scorer
        A function from a text to a number, or ``"logprob"``: the mean log-probability of a draft's tokens, in nats, from one
        forward over ``generation.realised``. It is the model's own distribution that counts, before temperature, top-p and
        penalties; a dropped EOS or stop string does not count, and a draft of no tokens has ``-inf``.

    Returns
    -------
    Best

    Raises
    ------
    LeattnError
        An unknown scorer, or a score that is NaN; whatever ``self_consistency`` refuses.

    Examples
    --------
    >>> import leattn
    >>> from leattn import GenNode, ICLNode
    >>> model, tokenizer = leattn.tiny.load()
    >>> bos = leattn.bos(tokenizer)
    >>> texts = ["Zarvia is governed from Madan.", "Zarvia's capital is Lumo.", "In Zarvia, the capital is Lumo."]
    >>> docs = [ICLNode("\\n" + text, [bos]) for text in texts]
    >>> q = ICLNode("\\nQ: What is the capital of Zarvia?", [bos, *docs])
    >>> draft = GenNode("\\nA:", [bos, *docs, q], max_new_tokens=2, temperature=3.0)
    >>> best = best_of_n(model, draft, tokenizer, n=6, seed=1)
    >>> best.text, len(best.scores)
    (' Lumo.', 6)
    """
    if not callable(scorer) and scorer != "logprob":
        raise LeattnError(choices("scorer", scorer, ["logprob"]) + ", or give a function from a text to a number")
    drafts = sampled(draft, n, options)
    generation = generate(model, ICLGraph(*drafts), tokenizer, **options)
    texts = texts_of(drafts, generation)
    if not texts:
        raise LeattnError("this was interrupted before any draft had begun, so there is nothing to choose from")
    if callable(scorer):
        scores = {name: float(scorer(text)) for name, text in texts.items()}
    else:
        known = ("backend", "kv_store", "positions", "visibility")
        given = {name: options[name] for name in known if name in options}
        scores = _mean_logprobs(model, generation, list(texts), tokenizer, **given)
    for name, score in scores.items():
        if math.isnan(score):
            raise LeattnError(f"the score of {name!r}, {texts[name]!r}, is NaN; give numbers that can be compared")
    ids = {name: generation.branches[name][0].token_ids.tolist() for name in texts}
    best = max(scores, key=lambda name: scores[name])
    # Rounding may tell apart drafts that are the same, so that machines would disagree on which of them is best.
    return Best(next(name for name in ids if ids[name] == ids[best]), scores, generation)


def _mean_logprobs(
    model: Any,
    generation: Generation,
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    backend: str = "auto",
    kv_store: KVStore | None = None,
    positions: Positions = "after_parents",
    visibility: Visibility = "parents",
) -> dict[str, float]:
    """The score of each of the named nodes; logits are made for their written tokens alone, ``[T, V]``."""
    realised = generation.realised
    prompt = compile_prompt([realised[name] for name in names], tokenizer, positions=positions, visibility=visibility)
    program, _ = build([prompt], tokenizer)
    tokens = {name: generation.branches[name][0].token_ids for name in names}
    last = {prompt.graph.index[prompt.graph[name]]: len(new) + 1 for name, new in tokens.items()}
    with session(model, Model.of(model), program, backend=backend, kv_store=kv_store) as work:
        logits = work.logits(last).logits[0]
    scores = {}
    for name, new, own in zip(names, tokens.values(), logits.split(list(last.values())), strict=True):
        logprobs = own[:-1].float().log_softmax(-1).gather(1, new.to(own.device)[:, None])  # [n, 1]
        scores[name] = float(logprobs.mean()) if len(new) else -math.inf
    return scores
