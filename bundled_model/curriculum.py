"""What the model is taught, in which order.

The order decides everything: a model that starts with whole graphs looks at
the relation alone and stays at half of the answers for thousands of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from leattn.dag.node import ICLNode
from leattn.tiny.corpus import N_QUESTIONS, N_SENTENCES, Distractors, Fact, rival, sample_facts
from leattn.tiny.examples import PATTERNS, Pattern, Scheme
from leattn.tiny.tokenizer import BOS, CHAT_END, CHAT_START, EOS

PHASES = ("pairs", "one phrasing", "all phrasings", "graphs", "conjunction")
MAX_QUESTIONS = 6


@dataclass(frozen=True)
class Lesson:
    """One training text: a graph with several answers.

    Attributes
    ----------
    answers
        The nodes that end in an answer, and how many of their last tokens are trained.
    documents
        All documents; some may be seen by no answer.
    facts
        What the documents state.
    positions
        How to compile it.
    """

    answers: tuple[tuple[ICLNode, int], ...]
    documents: tuple[ICLNode, ...]
    facts: tuple[Fact, ...]
    positions: Scheme = "after_parents"

    @property
    def targets(self) -> tuple[ICLNode, ...]:
        """What to compile."""
        return (*(node for node, _ in self.answers), *self.documents)


@dataclass(frozen=True)
class Style:
    """How documents, questions and answers are set in one text; ``{}`` stands for the sentence."""

    document: str = "\n{}"
    question: str = "\nQ: {}"
    answer: str = "\nA:"
    reply: str = " {}." + EOS

    def ask(self, fact: Fact, phrasing: int) -> str:
        """Question, answer and all, as one node has it."""
        return self.question.format(fact.question(phrasing)) + self.answer + self.reply.format(fact.value)

    @property
    def trained(self) -> int:
        """Tokens at the end of an answer that are trained: value, full stop, end."""
        return 3


_QUESTIONS = (
    *[("\nQ: {}", "\nA:")] * 5,
    ("Q: {}", "\nA:"),
    ("\nQ: {}", " A:"),
    ("\n\nQ: {}\n", "A:"),
)
_DOCUMENTS = ("\n{}", "\n{}", "\n{}", "{}\n", "{}", " {}")


def _style(rng: Random) -> Style:
    document = rng.choice(_DOCUMENTS)
    if rng.random() < 0.12:
        question, answer = f"{CHAT_START}user\n{{}}{CHAT_END}\n", f"{CHAT_START}assistant\n"
        return Style(document, question, answer, f"{{}}.{CHAT_END}")
    return Style(document, *rng.choice(_QUESTIONS))


def lesson(rng: Random, phase: str) -> Lesson:
    """A text of the phase called `phase`, one of ``PHASES``.

    Examples
    --------
    >>> text = lesson(Random(0), "pairs")
    >>> any(fact.held_out for fact in text.facts)
    False
    """
    if phase == "pairs":
        return _pairs(rng)
    if phase == "one phrasing":
        facts = sample_facts(rng, rng.randint(2, 10), rng.choice(("relation", "relation", "relation", "random")))
        return _Text(rng, facts, Style(), phrasings=1).causal()
    distractors = _distractors(rng, phase)
    facts = sample_facts(rng, rng.randint(1, 10 if distractors == "entity" else 12), distractors)
    text = _Text(rng, facts, _style(rng))
    if phase == "all phrasings":
        return text.causal()
    kinds = (text.causal, text.parallel, text.random_edges, text.contradiction, text.paraphrases)
    return rng.choices(kinds, (20, 25, 5, 20, 30))[0]()


def _distractors(rng: Random, phase: str) -> Distractors:
    kinds: tuple[Distractors, ...] = ("relation", "mixed", "entity", "random")
    weights = (35, 45, 12, 8) if phase == "conjunction" else (75, 5, 0, 20)
    return rng.choices(kinds, weights)[0]


def _pairs(rng: Random) -> Lesson:
    """``Zarvia Lumo Genia Madan …``, then an entity, its value to be said. Mostly few: there matching pays soonest."""
    facts = sample_facts(rng, rng.choice((2, 2, 3, 3, 4, 5, 6, 8, 10)), rng.choice(("relation", "relation", "random")))
    root = ICLNode(BOS)
    text = ICLNode("".join(f" {fact.entity} {fact.value}" for fact in facts), [root])
    asked = rng.sample(facts, min(len(facts), MAX_QUESTIONS))
    answers = tuple((ICLNode(f" {fact.entity} {fact.value}", [root, text]), 1) for fact in asked)
    return Lesson(answers, (text,), facts)


class _Text:
    """The facts of one lesson, and the graphs one can make of them."""

    def __init__(self, rng: Random, facts: tuple[Fact, ...], style: Style, phrasings: int | None = None) -> None:
        self.rng, self.facts, self.style = rng, facts, style
        self.phrasings = phrasings or N_QUESTIONS
        self.sentences = phrasings or N_SENTENCES
        self.root = ICLNode(BOS)
        self.positions: Scheme = "after_parents" if phrasings else rng.choice(("after_parents",) * 2 + ("sequential",))

    def causal(self) -> Lesson:
        documents: list[ICLNode] = []
        for fact in self.facts:
            documents.append(self._document(fact, documents))
        return self._ask(documents)

    def parallel(self) -> Lesson:
        # Now and then far apart: nothing may hang on an exact distance.
        apart = self.positions == "after_parents" and self.rng.random() < 0.3
        return self._ask([self._document(fact, (), self.rng.randint(1, 300) if apart else None) for fact in self.facts])

    def random_edges(self) -> Lesson:
        documents: list[ICLNode] = []
        for fact in self.facts:
            documents.append(self._document(fact, [d for d in documents if self.rng.random() < 0.4]))
        return self._ask(documents)

    def contradiction(self) -> Lesson:
        """Pairs of documents that contradict each other; an answer sees one of each pair."""
        rivals = [(fact, rival(self.rng, fact)) for fact in self.facts[:6]]
        pairs = [(one, other) for one, other in rivals if other is not None]
        stated = [fact for pair in pairs for fact in pair]
        self.rng.shuffle(stated)
        nodes = {fact: self._document(fact) for fact in stated}
        answers = []
        for asked in self.rng.sample(pairs, min(len(pairs), 3)):
            phrasing = self.rng.randrange(self.phrasings)
            for mine in asked:
                # Beside its own source it reads a random side of every other pair.
                read = {mine, *(self.rng.choice(pair) for pair in pairs if pair is not asked)}
                seen = [nodes[fact] for fact in stated if fact in read]
                answers.append((ICLNode(self.style.ask(mine, phrasing), [self.root, *seen]), self.style.trained))
        return Lesson(tuple(answers), tuple(nodes.values()), tuple(stated), self.positions)

    def paraphrases(self) -> Lesson:
        """Groups of one question asked in several ways, each with an answer that sees the context and the whole group."""
        # Mostly the two whose questions cannot look at the context: the answer has to put both together.
        pattern = self.rng.choices(PATTERNS, (3, 2, 3, 2))[0]
        # A question that sees nothing would start at 0, further from its answer than the documents are:
        # that was not learnt in 1600 steps, with either of the two patterns.
        positions: Scheme = "sequential" if pattern in ("anchor", "isolated") else self.positions
        context = [self.root]
        for fact in self.facts:
            context.append(self._document(fact, context[1:]))
        answers = []
        for fact in self.rng.sample(self.facts, min(len(self.facts), 4)):
            group: list[ICLNode] = []
            for phrasing in self.rng.sample(range(self.phrasings), self.rng.randint(1, 3)):
                text = self.style.question.format(fact.question(phrasing))
                group.append(ICLNode(text, _sees(pattern, context, group)))
            text = self.style.answer + self.style.reply.format(fact.value)
            answers.append((ICLNode(text, context + group), self.style.trained))
        return Lesson(tuple(answers), tuple(context[1:]), self.facts, positions)

    def _document(self, fact: Fact, seen: Sequence[ICLNode] = (), start: int | None = None) -> ICLNode:
        text = self.style.document.format(fact.sentence(self.rng.randrange(self.sentences)))
        return ICLNode(text, [self.root, *seen], start_pos_id=start)

    def _ask(self, documents: Sequence[ICLNode]) -> Lesson:
        """Questions about some of the facts, each a branch of its own that sees every document."""
        answers = []
        for fact in self.rng.sample(self.facts, min(len(self.facts), MAX_QUESTIONS)):
            text = self.style.ask(fact, self.rng.randrange(self.phrasings))
            answers.append((ICLNode(text, [self.root, *documents]), self.style.trained))
        return Lesson(tuple(answers), tuple(documents), self.facts, self.positions)


def _sees(pattern: Pattern, context: list[ICLNode], group: list[ICLNode]) -> list[ICLNode]:
    """What the next question of a paraphrase group sees; `group` are the questions before it."""
    return {"anchor": group[:1], "shared": context, "isolated": [], "causal": context + group}[pattern]
