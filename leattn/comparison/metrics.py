"""What is measured of an answer."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from leattn.comparison.example import Example
from leattn.errors import LeattnError, choices
from leattn.generation.scores import Score

Needs = Literal["answer", "choices", "text"]


@dataclass(frozen=True)
class Metric:
    """A number for each example.

    Attributes
    ----------
    name
        Of its column.
    needs
        What it looks at: the score of the first ``"answer"``, the scores of all ``"choices"``, or the ``"text"`` generated.
    value
        From the example and that to the number.
    is_share
        Whether the number is 0 or 1, so that the mean is a share and has Wilson's interval.
    """

    name: str
    needs: Needs
    value: Callable[[Example, list[Score], str], float]
    is_share: bool = True


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and doubled spaces: what SQuAD's evaluation compares (arXiv 1606.05250)."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def _loss(_example: Example, scores: list[Score], _text: str) -> float:
    return -scores[0].normalised("tokens")


def _right(example: Example, _scores: list[Score], text: str) -> float:
    found = normalised(text.strip().split("\n")[0])
    return float(any(normalised(answer) in found for answer in example.answers))


def _chosen(by: Literal["total", "tokens"]) -> Callable[[Example, list[Score], str], float]:
    def value(example: Example, scores: list[Score], _text: str) -> float:
        return float(max(range(len(scores)), key=lambda c: scores[c].normalised(by)) == example.right)

    return value


METRICS = {
    metric.name: metric
    for metric in (
        Metric("loss", "answer", _loss, is_share=False),
        Metric("right", "text", _right),
        Metric("accuracy", "choices", _chosen("total")),
        Metric("accuracy_by_token", "choices", _chosen("tokens")),
    )
}
"""``loss``: nats per token of the first answer. ``right``: whether the first line that is generated holds one of the answers,
as the lost-in-the-middle study counts (arXiv 2307.03172). ``accuracy``: whether the right choice is the likeliest;
``accuracy_by_token``: by token."""


def as_metric(metric: str | Metric) -> Metric:
    """A metric by its name, or one of the user's own.

    Raises
    ------
    LeattnError
        An unknown name.
    """
    if isinstance(metric, Metric):
        return metric
    if metric not in METRICS:
        raise LeattnError(choices("metric", metric, METRICS) + ", or give a leattn.comparison.metrics.Metric")
    return METRICS[metric]
