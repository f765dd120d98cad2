"""Facts about made-up countries, sampled with a seed.

One eighth of all (entity, value) pairs never occurs in training; every entity
and every value does. What a model says about such a pair it must have read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil, sqrt
from random import Random
from typing import Literal, TypeVar
from zlib import crc32

from leattn.errors import LeattnError, choices
from leattn.tiny.words import ENTITIES, RELATION, RELATIONS, Relation

Distractors = Literal["relation", "entity", "mixed", "random"]
T = TypeVar("T")
DISTRACTORS: tuple[Distractors, ...] = ("relation", "entity", "mixed", "random")


@dataclass(frozen=True)
class Fact:
    """One statement about the made-up world: the `relation` of `entity` is `value`.

    Examples
    --------
    >>> fact = Fact("capital", "Zarvia", "Lumo")
    >>> fact.sentence(), fact.question()
    ('The capital of Zarvia is Lumo.', 'What is the capital of Zarvia?')
    >>> fact.sentence(1)
    "Zarvia's capital is Lumo."
    """

    relation: str
    entity: str
    value: str

    def sentence(self, phrasing: int = 0) -> str:
        """The fact in words; there are ``N_SENTENCES`` phrasings, 0 the plainest."""
        return RELATION[self.relation].sentences[phrasing].format(e=self.entity, v=self.value)

    def question(self, phrasing: int = 0) -> str:
        """The question the fact answers; there are ``N_QUESTIONS`` phrasings."""
        return RELATION[self.relation].questions[phrasing].format(e=self.entity)

    @property
    def held_out(self) -> bool:
        """Whether the pair (entity, value) was kept out of training."""
        return is_held_out(self.entity, self.value)

    @property
    def chance(self) -> float:
        """How often a guess among all values of the relation is right."""
        return 1 / len(RELATION[self.relation].values)


N_SENTENCES = len(RELATIONS[0].sentences)
N_QUESTIONS = len(RELATIONS[0].questions)


def is_held_out(entity: str, value: str) -> bool:
    """Whether the pair belongs to the eighth that training never sees."""
    return crc32(f"{entity}|{value}".encode()) % 8 == 0


@cache
def _values(entity: str, relation: str, held_out: bool) -> tuple[str, ...]:
    return tuple(v for v in RELATION[relation].values if is_held_out(entity, v) == held_out)


def sample_facts(rng: Random, n: int, distractors: Distractors = "relation", *, held_out: bool = False) -> tuple[Fact, ...]:
    """Facts that can stand together in one prompt: no two of them answer one question.

    Parameters
    ----------
    rng
        Where the randomness comes from.
    n
        How many.
    distractors
        What the facts have in common: all the same ``"relation"``; all the same
        ``"entity"``; ``"mixed"``, the cells of a small grid of entities and relations,
        so that nearly every fact shares either with others; nothing (``"random"``).
    held_out
        True: every pair is one that training never saw. False: none is.

    Returns
    -------
    tuple[Fact, ...]
        In random order, with `n` different values.

    Raises
    ------
    LeattnError
        An unknown kind, or more facts than the world has room for.

    Examples
    --------
    >>> facts = sample_facts(Random(0), 4, "entity", held_out=True)
    >>> len({f.entity for f in facts}), len({f.relation for f in facts}), facts[0].held_out
    (1, 4, True)
    """
    for _ in range(1000):
        facts: list[Fact] = []
        for entity, relation in _subjects(rng, n, distractors):
            used = {fact.value for fact in facts}
            free = [v for v in _values(entity, relation.name, held_out) if v not in used]
            if not free:
                break  # a pair of names without a value of this side of the split: draw again
            facts.append(Fact(relation.name, entity, rng.choice(free)))
        else:
            rng.shuffle(facts)
            return tuple(facts)
    raise LeattnError(f"no {n} facts with distractors={distractors!r}, held_out={held_out}; ask for fewer")


def _subjects(rng: Random, n: int, distractors: Distractors) -> list[tuple[str, Relation]]:
    """`n` different (entity, relation)."""
    if distractors == "relation":
        relation = rng.choice(RELATIONS)
        return [(entity, relation) for entity in _some(rng, ENTITIES, n)]
    if distractors == "entity":
        entity = rng.choice(ENTITIES)
        return [(entity, relation) for relation in _some(rng, RELATIONS, n)]
    if distractors == "mixed":
        side = ceil(sqrt(n))
        entities, relations = _some(rng, ENTITIES, side), _some(rng, RELATIONS, side)
        grid = [(entity, relation) for entity in entities for relation in relations]
        return _some(rng, grid, n)
    if distractors == "random":
        return [(entity, rng.choice(RELATIONS)) for entity in _some(rng, ENTITIES, n)]
    raise LeattnError(choices("distractors", distractors, DISTRACTORS))


def _some(rng: Random, options: tuple[T, ...] | list[T], n: int) -> list[T]:
    if n > len(options):
        raise LeattnError(f"{n} facts asked for, but only {len(options)} can differ here; ask for fewer")
    return rng.sample(options, n)


def rival(rng: Random, fact: Fact, *, held_out: bool = False) -> Fact | None:
    """A fact that contradicts `fact`: another value. None if this side of the split has none."""
    options = [v for v in _values(fact.entity, fact.relation, held_out) if v != fact.value]
    return Fact(fact.relation, fact.entity, rng.choice(options)) if options else None
