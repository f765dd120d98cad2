"""Study 1: documents. Loss and answers on open questions, by method and by the place of the document that holds the answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from leattn.comparison.compare import compare
from leattn.comparison.comparison import Comparison
from leattn.comparison.example import Example
from leattn.dag.builders import Content
from studies.data import Nearest, read
from studies.prompts import WAYS, question

REFERENCES: dict[str, Callable[[Example], list[Content]]] = {
    "gold alone": lambda one: [] if one.gold is None else [one.documents[one.gold]],
    "no document": lambda _: [],
}
"""What plain text gives with the one document that holds the answer, and with none."""


def examples(data: Path | None, tokenizer: Any, count: int, documents: int, seed: int) -> list[Example]:
    """Questions, each behind the passage that holds its answer and its nearest rivals, the gold one at every place in turn."""
    rows = read(data, "nq_open")
    chosen = list(range(len(rows)))
    random.Random(seed).shuffle(chosen)  # so that fewer are the first of more
    rivals = Nearest(rows)
    found = []
    for n, i in enumerate(chosen[:count]):
        place = n % documents
        others = [rows[j] for j in rivals.to(i, documents - 1)]
        shown = [*others[:place], rows[i], *others[place:]]
        found.append(question(rows[i], shown, min(place, len(others)), tokenizer, f"question {i}, {documents} documents"))
    return found


def run(
    model: Any, tokenizer: Any, data: Path | None, out: Path, *, n: int, documents: int = 8, seed: int = 0, timed: int = 4
) -> Comparison:
    """Compare the methods, and plain text with the gold document alone and with none."""
    given = examples(data, tokenizer, n, documents, seed)
    file = out / f"documents_{documents}.jsonl"
    found = compare(model, given, WAYS, ["loss", "right"], tokenizer, timed=timed, path=file)
    for name, shown in REFERENCES.items():
        other = [replace(one, documents=shown(one), gold=None) for one in given]
        path = file.with_name(f"{file.stem}_{name.replace(' ', '_')}.jsonl")
        found = found.joined(compare(model, other, {name: WAYS["plain"]}, ["loss", "right"], tokenizer, path=path))
    return found
