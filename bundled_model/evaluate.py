"""How often the model is right on prompts it has never seen: the table of ``python -m bundled_model --evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from leattn.generation.forward import forward
from leattn.tiny.corpus import Distractors
from leattn.tiny.examples import PATTERNS, Example, Kind, make

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes
    ----------
    name
        What was asked.
    n, right
        Prompts, and how many of them the model answered.
    chance
        What a guess among all values of the relation would get.
    target
        Accuracy to reach; for a hidden document, not to exceed. None if only reported.
    """

    name: str
    n: int
    right: int
    chance: float
    target: float | None = None
    at_most: bool = False

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        z, p, n = 1.96, self.accuracy, self.n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return centre - half, centre + half

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        if self.at_most:
            return "ok" if self.accuracy <= self.target else "MISSED"
        return "ok" if self.accuracy >= self.target else "MISSED"

    def __str__(self) -> str:
        low, high = self.interval
        target = "" if self.target is None else f"{'<=' if self.at_most else '>='} {100 * self.target:.1f}"
        return (
            f"{self.name:<44}{self.n:>6}{100 * self.accuracy:>8.1f}  [{100 * low:5.1f}, {100 * high:5.1f}]"
            f"{100 * self.chance:>8.1f}  {target:<8}{self.verdict}"
        )


HEADER = f"{'held-out prompts':<44}{'n':>6}{'right %':>8}  {'95 % interval':<14}{'chance %':>10}  target"


@torch.no_grad()
def answered(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, batch_size: int = 64
) -> list[bool]:
    """Whether the likeliest next token is the answer, example by example."""
    right: list[bool] = []
    for i in range(0, len(examples), batch_size):
        some = examples[i : i + batch_size]
        prompts = [example.compile(tokenizer) for example in some]
        # Padded on the left, and the question is the last node: the last column is its last token.
        said = forward(model, prompts, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
        answers = [tokenizer.convert_tokens_to_ids("Ġ" + example.fact.value) for example in some]
        right += [a == b for a, b in zip(said, answers, strict=True)]
    return right


def _cases() -> list[tuple[str, Kind, dict[str, Any], float | None]]:
    """Name, kind, arguments of `make`, target."""
    cases: list[tuple[str, Kind, dict[str, Any], float | None]] = [
        ("causal", "causal", {}, 0.95),
        ("parallel", "parallel", {}, 0.95),
        ("parallel, 16 documents", "parallel", {"n": 16}, None),
        ("parallel, sequential positions", "parallel", {"positions": "sequential"}, None),
        ("contradiction decided by an edge", "contradiction", {}, 0.90),
    ]
    cases += [(f"paraphrases, {pattern}", "paraphrase", {"pattern": pattern}, 0.90) for pattern in PATTERNS]
    cases += [
        (f"paraphrases, {pattern}, after_parents", "paraphrase", {"pattern": pattern, "positions": "after_parents"}, None)
        for pattern in PATTERNS
    ]
    mixed: Distractors = "mixed"
    cases += [
        ("conjunction, causal", "causal", {"distractors": mixed}, 0.80),
        ("conjunction, parallel", "parallel", {"distractors": mixed}, 0.80),
        ("all share the entity, parallel", "parallel", {"distractors": "entity"}, None),
        ("document hidden", "hidden", {}, None),
    ]
    return cases


def table(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, *, n: int = 512, seed: int = 0) -> list[Row]:
    """Accuracy on `n` held-out prompts for each kind, of 8 documents if not said otherwise.

    No (entity, value) pair of these prompts occurs in training, and all phrasings do. The documents
    share the relation asked for; those of "conjunction" are cells of a small grid of entities and
    relations, so that both must match. A prompt is right if the likeliest next token is the answer.

    Examples
    --------
    >>> from leattn.tiny import load
    >>> rows = table(*load(), n=16)
    >>> rows[0].name, rows[0].accuracy > 0.9
    ('causal', True)
    """
    rows = []
    for name, kind, arguments, target in _cases():
        rng = Random(f"{seed} {name}")
        examples = [make(kind, rng, **arguments) for _ in range(n)]
        right = sum(answered(model, tokenizer, examples))
        chance = sum(example.fact.chance for example in examples) / n
        hidden = kind == "hidden"
        rows.append(Row(name, n, right, chance, 1.5 * chance if hidden else target, hidden))
    return rows
