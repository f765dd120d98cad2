"""Self-consistency: the same question answered several times by sampling, and a vote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from leattn.dag.gennode import GenNode
from leattn.dag.graph import ICLGraph
from leattn.generation.generate import generate
from leattn.generation.result import Generation
from leattn.patterns.drafts import sampled, texts_of
from leattn.table import html_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Vote:
    """What several drafts agree on.

    Attributes
    ----------
    answer : hashable or None
        What most drafts say; of several with as many votes, the one that the earliest draft gives. None if all abstain.
    votes : mapping of answer to int
        Most votes first, ties as above.
    answers : mapping of str to hashable or None
        What each draft says, by node name; None abstains.
    generation : Generation
        All drafts; ``generation.realised`` is the graph with them.
    """

    answer: Hashable | None
    votes: Mapping[Hashable, int]
    answers: Mapping[str, Hashable | None]
    generation: Generation = field(repr=False)

    def __str__(self) -> str:
        return "\n".join(f"{answer}: {count} of {len(self.answers)}" for answer, count in self.votes.items())

    def _repr_html_(self) -> str:
        abstained = sum(answer is None for answer in self.answers.values())
        note = f"{len(self.answers)} drafts" + (f", {abstained} without an answer" if abstained else "")
        return html_table(["answer", "votes"], self.votes.items(), note)


def self_consistency(
    model: Any,
    draft: GenNode,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    n: int,
    extract: Callable[[str], Hashable | None] = str.strip,
    **options: Any,
) -> Vote:
    """Write a node ``n`` times by sampling, take an answer from each text, and let them vote.

    The drafts are siblings in one sequence: what they see is computed once, and none sees another.

    Parameters
    ----------
    model
        A transformers model with ``generate``.
    draft
        What is to be written: header, parents, limit, stops and sampling. The drafts are called after it, ``"draft 1"`` and so
        on for a node without a name.
    tokenizer
        As for ``generate``.
    n
        How many drafts.
    extract
        From a text to its answer, which can be compared; None where there is none, which does not count.
    **options
        What :func:`leattn.generate` takes: ``seed``, ``backend``, ``kv_store``, ``progress``, ``token_budget``,
        ``temperature``, …

    Returns
    -------
    Vote

    Raises
    ------
    LeattnError
        ``draft`` is not a ``GenNode``; ``n`` below 1; ``do_sample=False``; whatever ``generate`` refuses.

    Examples
    --------
    Of three documents two agree, and the model says so more often than not.

    >>> import leattn
    >>> from leattn import GenNode, ICLNode
    >>> model, tokenizer = leattn.tiny.load()
    >>> bos = leattn.bos(tokenizer)
    >>> texts = ["Zarvia is governed from Madan.", "Zarvia's capital is Lumo.", "In Zarvia, the capital is Lumo."]
    >>> docs = [ICLNode("\\n" + text, [bos]) for text in texts]
    >>> q = ICLNode("\\nQ: What is the capital of Zarvia?", [bos, *docs])
    >>> draft = GenNode("\\nA:", [bos, *docs, q], max_new_tokens=2, stop=".", temperature=2.0)
    >>> vote = self_consistency(model, draft, tokenizer, n=9, seed=0)
    >>> vote.answer, sum(vote.votes.values())
    ('Lumo', 9)
    """
    drafts = sampled(draft, n, options)
    generation = generate(model, ICLGraph(*drafts), tokenizer, **options)
    answers = {name: extract(text) for name, text in texts_of(drafts, generation).items()}
    # Counter keeps the order of first sight, and most_common is stable.
    votes = dict(Counter(answer for answer in answers.values() if answer is not None).most_common())
    return Vote(next(iter(votes), None), votes, answers, generation)
