"""Study 2: demonstrations. Accuracy by method and task, and how much the order of the same demonstrations changes it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from leattn.comparison.compare import compare
from leattn.comparison.comparison import Comparison
from leattn.comparison.example import Example
from studies.data import balanced, read
from studies.prompts import WAYS, classified

METHODS = {name: way for name, way in WAYS.items() if name != "superposition"}
"""All but the one that looks for a single document: every demonstration counts."""


def examples(
    data: Path | None, tokenizer: Any, task: str, count: int, shots: int, draws: int, orders: int, seed: int
) -> list[Example]:
    """Test items behind demonstrations: the same items in every draw, every draw in several orders."""
    train, test = read(data, f"{task}_train"), read(data, f"{task}_test")
    items = test[:count]
    found = []
    for draw in range(draws):
        chosen = balanced(train, shots, seed + draw)
        for order in range(orders):
            shuffled = random.Random(order).sample(chosen, len(chosen)) if order else chosen
            for i, item in enumerate(items):
                name = f"{task}, {shots} shots, draw {draw}, order {order}, item {i}"
                found.append(classified(task, item, shuffled, tokenizer, name))
    return found


def run(
    model: Any,
    tokenizer: Any,
    data: Path | None,
    out: Path,
    *,
    task: str = "sst2",
    n: int,
    shots: int = 8,
    draws: int = 3,
    orders: int = 1,
    seed: int = 0,
    timed: int = 0,
) -> Comparison:
    """Compare the methods on one task."""
    given = examples(data, tokenizer, task, n, shots, draws, orders, seed)
    file = out / f"demonstrations_{task}_{shots}_{orders}.jsonl"
    return compare(model, given, METHODS, ["accuracy"], tokenizer, timed=timed, chunk=max(8, n), path=file)
