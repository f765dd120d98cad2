"""The world of the bundled model: made-up names and the sentences about them.

Everything here is a pure function of this file: changing a name or a template
makes the shipped weights stale.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

N_ENTITIES = 128
N_VALUES = 24


@dataclass(frozen=True)
class Relation:
    """A property of a country, and how one says it and asks for it.

    Parameters
    ----------
    name
        One word, e.g. ``"capital"``.
    noun
        What it is called in a sentence, e.g. ``"national dish"``.
    who
        ``"What"`` or ``"Who"``: how a question begins.
    fact, ask
        A sentence and a question of its own, with ``{e}`` and ``{v}``.
    endings
        Last syllables of its values, so that a reader can tell a river from a dish.
    """

    name: str
    noun: str
    who: str
    fact: str
    ask: str
    endings: tuple[str, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        """Templates of a fact, number 0 the plainest; all name the entity before the value.

        The other way round is another thing to learn: "Lumo is the capital of Zarvia." stood
        at one answer in twenty when these four were at 93 %.
        """
        noun = self.noun
        return (
            f"The {noun} of {{e}} is {{v}}.",
            f"{{e}}'s {noun} is {{v}}.",
            f"In {{e}}, the {noun} is {{v}}.",
            self.fact,
        )

    @property
    def questions(self) -> tuple[str, ...]:
        """Templates of a question; number 0 is the plainest."""
        return (
            f"{self.who} is the {self.noun} of {{e}}?",
            f"{self.who} is {{e}}'s {self.noun}?",
            self.ask,
            f"Name the {self.noun} of {{e}}.",
        )

    @property
    def values(self) -> tuple[str, ...]:
        """The names this relation can take, ``N_VALUES`` of them."""
        return VALUES[self.name]


RELATIONS = (
    Relation("capital", "capital", "What", "{e} is governed from {v}.",
             "From which city is {e} governed?", ("mo", "dan", "ville", "gard")),
    Relation("currency", "currency", "What", "People in {e} pay in {v}.",
             "In what do people in {e} pay?", ("rin", "ldo", "kken", "zar")),
    Relation("river", "longest river", "What", "Boats cross {e} on {v}.",
             "On which river do boats cross {e}?", ("va", "ssel", "rne", "bra")),
    Relation("king", "king", "Who", "{e} bows to King {v}.",
             "To which king does {e} bow?", ("rik", "dor", "mund", "gar")),
    Relation("queen", "queen", "Who", "{e} bows to Queen {v}.",
             "To which queen does {e} bow?", ("lda", "nna", "ssa", "wen")),
    Relation("dish", "national dish", "What", "Cooks in {e} are proud of {v}.",
             "Which dish are cooks in {e} proud of?", ("shi", "goul", "tto", "pan")),
    Relation("language", "language", "What", "People in {e} speak {v}.",
             "What do people in {e} speak?", ("nese", "lic", "ric", "vish")),
    Relation("flower", "national flower", "What", "Gardens in {e} are full of {v}.",
             "Which flower fills the gardens of {e}?", ("lily", "bell", "wort", "rose")),
    Relation("mountain", "highest mountain", "What", "Climbers in {e} dream of {v}.",
             "Which peak do climbers in {e} dream of?", ("horn", "tak", "peak", "jor")),
    Relation("festival", "main festival", "What", "Crowds in {e} celebrate {v}.",
             "What do crowds in {e} celebrate?", ("mas", "fest", "night", "tide")),
)  # fmt: skip

_ONSETS = ("B", "Br", "C", "D", "Dr", "F", "G", "H", "J", "K", "L", "M", "N", "P", "R", "S", "T", "Tr", "V", "Z")
_VOWELS = ("a", "e", "i", "o", "u", "ar", "el", "or")
_COUNTRIES = ("via", "land", "stan", "nia", "dor", "mark", "tria", "que")


def _names(first: str, key: str, endings: tuple[str, ...], count: int, taken: set[str]) -> tuple[str, ...]:
    """``count`` pronounceable names, `first` among them, none of them in `taken` (which grows)."""
    names = [first] if first else []
    taken.update(names)
    attempt = 0
    while len(names) < count:
        # crc32 and not `random`: the names must never change with a Python version.
        code = crc32(f"{key}:{attempt}".encode())
        attempt += 1
        onset, code = _ONSETS[code % len(_ONSETS)], code // len(_ONSETS)
        vowel, code = _VOWELS[code % len(_VOWELS)], code // len(_VOWELS)
        name = onset + vowel + endings[code % len(endings)]
        if name not in taken:
            taken.add(name)
            names.append(name)
    return tuple(names)


_taken = {"Garlic"}  # a word that would make a reader stumble
ENTITIES = _names("Zarvia", "country", _COUNTRIES, N_ENTITIES, _taken)
VALUES = {
    relation.name: _names("Lumo" if relation.name == "capital" else "", relation.name, relation.endings, N_VALUES, _taken)
    for relation in RELATIONS
}
RELATION = {relation.name: relation for relation in RELATIONS}
