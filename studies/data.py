"""Where examples come from: folders of JSON lines, and a few of our own making for tests.

``nq_open.jsonl`` has ``question``, ``answers``, ``title`` and ``text`` of the passage that holds an answer: Natural Questions,
as the lost-in-the-middle study cuts them (github.com/nelson-liu/lost-in-the-middle). ``NAME_train.jsonl`` and
``NAME_test.jsonl`` have ``text`` and ``label``: SST-2 (``sst2``), TREC (``trec``) and AG News (``agnews``), each on the Hugging
Face Hub under that name. Without a folder, there are six made-up questions and twelve made-up reviews, to see that everything
runs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rank_bm25 import BM25Okapi

from leattn.errors import LeattnError

LANDS = ("Zarvia", "Genia", "Aldia", "Toria", "Belmar", "Ostia")
CITIES = ("Lumo", "Pardan", "Vex", "Mirelle", "Sorn", "Quill")
OWN: dict[str, list[dict[str, Any]]] = {
    "nq_open": [
        {
            "question": f"what is the capital of {land}",
            "answers": [city],
            "title": land,
            "text": f"{land} is a land with {3 + i} rivers and many hills. Its capital is {city}, which lies by the sea.",
        }
        for i, (land, city) in enumerate(zip(LANDS, CITIES, strict=True))
    ],
    **{
        f"sst2_{part}": [
            {"text": f"{start} {what} .", "label": label}
            for label, words in (("positive", ("a joy", "a delight", "great")), ("negative", ("a bore", "a mess", "dull")))
            for what in words
        ]
        for part, start in (("train", "this film is"), ("test", "all in all it is"))
    },
}
"""Named as the files are."""


def read(folder: Path | None, name: str) -> list[dict[str, Any]]:
    """The rows of ``NAME.jsonl``, or those of our own making without a folder.

    Raises
    ------
    LeattnError
        There is no such file, or none of our own of that name.
    """
    if folder is None:
        if name not in OWN:
            raise LeattnError(f"there are no {name} of our own; give --data, a folder with {name}.jsonl (studies/data.py)")
        return list(OWN[name])
    path = folder / f"{name}.jsonl"
    if not path.exists():
        raise LeattnError(f"{path} is missing; studies/data.py says what it holds and where the public original is")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Nearest:
    """The passages that look most like the answer to a question and hold none of its answers: random ones are too easy.

    By BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009), as rank-bm25 has it.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows
        self._index = BM25Okapi([_words(f"{row['title']} {row['text']}") for row in rows])

    def to(self, of: int, count: int) -> list[int]:
        """Indices of passages, best first."""
        scores = self._index.get_scores(_words(self.rows[of]["question"]))
        answers = [answer.lower() for answer in self.rows[of]["answers"]]
        ranked = (int(i) for i in np.argsort(-scores, kind="stable"))
        fit = (i for i in ranked if i != of and not any(answer in self.rows[i]["text"].lower() for answer in answers))
        return list(islice(fit, count))


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()


def balanced(rows: Sequence[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` rows drawn with a seed, as many of each label as can be, in random order."""
    draw = random.Random(seed)
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    labels = sorted(by_label)
    draw.shuffle(labels)
    chosen = [draw.sample(by_label[label], count // len(labels) + (i < count % len(labels))) for i, label in enumerate(labels)]
    found = [row for each in chosen for row in each]
    draw.shuffle(found)
    return found
