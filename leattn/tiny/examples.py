"""Prompts with one right answer: graphs about a few facts, sampled with a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal

from leattn.dag.node import ICLNode
from leattn.dag.paraphrase import paraphrase_group
from leattn.errors import LeattnError, choices
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt
from leattn.tiny.corpus import N_QUESTIONS, N_SENTENCES, Distractors, Fact, rival, sample_facts
from leattn.tiny.tokenizer import BOS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["causal", "parallel", "contradiction", "paraphrase", "hidden"]
Pattern = Literal["anchor", "shared", "isolated", "causal"]
Scheme = Literal["after_parents", "sequential"]
PATTERNS: tuple[Pattern, ...] = ("anchor", "shared", "isolated", "causal")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt and its answer.

    Attributes
    ----------
    kind
        Which maker it is from.
    question
        The node whose last token the answer follows.
    answer
        As text, with its space: ``" Lumo"``. One token.
    fact
        What is asked.
    documents
        The nodes that state facts, in the order of `facts`.
    source
        The document that states `fact`; in ``hidden`` it is there and not seen.
    unread
        Documents that the question does not see. They are part of the prompt all the same, so that
        an edge makes the difference and nothing else.
    positions
        How to compile it.
    """

    kind: Kind
    question: ICLNode
    answer: str
    fact: Fact
    facts: tuple[Fact, ...]
    documents: tuple[ICLNode, ...]
    source: ICLNode
    unread: tuple[ICLNode, ...] = ()
    positions: Scheme = "after_parents"

    @property
    def targets(self) -> tuple[ICLNode, ...]:
        """What to compile: the question and the documents it does not see."""
        return (self.question, *self.unread)

    def compile(self, tokenizer: PreTrainedTokenizerBase) -> CompiledPrompt:
        """The whole prompt, unread documents included."""
        return compile_prompt(self.targets, tokenizer, positions=self.positions)


@dataclass(frozen=True)
class _Setting:
    """What the makers share; see :func:`make`."""

    n: int = 8
    distractors: Distractors = "relation"
    held_out: bool = True
    positions: Scheme = "after_parents"
    plain: bool = False

    def facts(self, rng: Random, n: int) -> tuple[Fact, ...]:
        return sample_facts(rng, n, self.distractors, held_out=self.held_out)

    def document(self, rng: Random, fact: Fact, parents: list[ICLNode], name: int) -> ICLNode:
        phrasing = 0 if self.plain else rng.randrange(N_SENTENCES)
        return ICLNode("\n" + fact.sentence(phrasing), parents, id=f"doc{name}")

    def question(self, rng: Random, fact: Fact) -> str:
        return "\nQ: " + fact.question(0 if self.plain else rng.randrange(N_QUESTIONS))


def make(
    kind: Kind,
    rng: Random,
    *,
    n: int = 8,
    distractors: Distractors = "relation",
    held_out: bool = True,
    positions: Scheme | None = None,
    plain: bool = False,
    pattern: Pattern = "shared",
) -> Example:
    """A prompt of `n` documents and a question about one of them.

    Parameters
    ----------
    kind
        ``"causal"``: each document sees all before it. ``"parallel"``: documents are siblings.
        ``"contradiction"``: parallel, and two of the documents contradict each other; the
        question sees one of the two. ``"paraphrase"``: causal documents, three phrasings of
        the question in a `pattern`, an answer node that sees everything. ``"hidden"``:
        parallel, and the question does not see the document that holds the answer.
    rng
        ``random.Random(seed)``.
    n
        Documents in all.
    distractors, held_out
        As in `sample_facts`; by default every pair in the prompt is unknown from training.
    positions
        ``"after_parents"`` or ``"sequential"``; by default the second for paraphrases, as in the published recipe, and
        the first for the rest.
    plain
        True: only the plainest phrasing of facts and questions.
    pattern
        Of ``"paraphrase"``: ``"anchor"``, ``"shared"``, ``"isolated"`` or ``"causal"``.

    Returns
    -------
    Example

    Raises
    ------
    LeattnError
        An unknown name, or fewer than two documents for a contradiction.

    Examples
    --------
    >>> example = make("parallel", Random(0), n=2, plain=True)
    >>> example.source.content.endswith(f" is{example.answer}.")
    True
    >>> example.source in example.question.parents
    True
    """
    if kind not in _MAKERS:
        raise LeattnError(choices("kind", kind, _MAKERS))
    if pattern not in PATTERNS:
        raise LeattnError(choices("pattern", pattern, PATTERNS))
    if positions is None:
        positions = "sequential" if kind == "paraphrase" else "after_parents"
    setting = _Setting(n, distractors, held_out, positions, plain)
    extra = {"pattern": pattern} if kind == "paraphrase" else {}
    return _MAKERS[kind](rng, setting, **extra)


def _causal(rng: Random, setting: _Setting) -> Example:
    return _one_question(rng, setting, "causal")


def _parallel(rng: Random, setting: _Setting) -> Example:
    return _one_question(rng, setting, "parallel")


def _hidden(rng: Random, setting: _Setting) -> Example:
    return _one_question(rng, setting, "hidden")


def _one_question(rng: Random, setting: _Setting, kind: Kind) -> Example:
    facts = setting.facts(rng, setting.n)
    root = ICLNode(BOS, id="bos")
    documents: list[ICLNode] = []
    for i, fact in enumerate(facts):
        documents.append(setting.document(rng, fact, [root, *documents] if kind == "causal" else [root], i))
    asked = rng.randrange(len(facts))
    unread = (documents[asked],) if kind == "hidden" else ()
    return Example(
        kind=kind,
        question=ICLNode(
            setting.question(rng, facts[asked]) + "\nA:", [root, *(d for d in documents if d not in unread)], id="Q"
        ),
        answer=" " + facts[asked].value,
        fact=facts[asked],
        facts=facts,
        documents=tuple(documents),
        source=documents[asked],
        unread=unread,
        positions=setting.positions,
    )


def _contradiction(rng: Random, setting: _Setting) -> Example:
    if setting.n < 2:
        raise LeattnError(f"a contradiction takes two documents, n={setting.n}; give n >= 2")
    while True:
        facts = list(setting.facts(rng, setting.n - 1))
        asked = rng.choice(facts)
        other = rival(rng, asked, held_out=setting.held_out)
        if other is not None:
            break
    facts.insert(rng.randrange(setting.n), other)
    root = ICLNode(BOS, id="bos")
    documents = tuple(setting.document(rng, fact, [root], i) for i, fact in enumerate(facts))
    unread = documents[facts.index(other)]
    return Example(
        kind="contradiction",
        question=ICLNode(setting.question(rng, asked) + "\nA:", [root, *(d for d in documents if d is not unread)], id="Q"),
        answer=" " + asked.value,
        fact=asked,
        facts=tuple(facts),
        documents=documents,
        source=documents[facts.index(asked)],
        unread=(unread,),
        positions=setting.positions,
    )


def _paraphrase(rng: Random, setting: _Setting, pattern: Pattern) -> Example:
    facts = setting.facts(rng, setting.n)
    context: list[ICLNode] = [ICLNode(BOS, id="bos")]
    for i, fact in enumerate(facts):
        context.append(setting.document(rng, fact, context, i))
    asked = rng.randrange(len(facts))
    questions = ["\nQ: " + facts[asked].question(phrasing) for phrasing in rng.sample(range(N_QUESTIONS), 3)]
    graph = paraphrase_group(context, questions, pattern=pattern, answer="\nA:")
    return Example(
        kind="paraphrase",
        question=graph["answer"],
        answer=" " + facts[asked].value,
        fact=facts[asked],
        facts=facts,
        documents=tuple(context[1:]),
        source=context[1 + asked],
        positions=setting.positions,
    )


_MAKERS: dict[str, Callable[..., Example]] = {
    "causal": _causal,
    "parallel": _parallel,
    "contradiction": _contradiction,
    "paraphrase": _paraphrase,
    "hidden": _hidden,
}
