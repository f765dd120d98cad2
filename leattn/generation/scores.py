"""What ``score`` returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from leattn.errors import LeattnError, choices
from leattn.generation.result import Stats
from leattn.table import data_frame, html_table, text_table

By: TypeAlias = Literal["total", "tokens", "characters", "unconditional"]
"""What a total is divided by, or what is taken off it."""


@dataclass(frozen=True, eq=False)
class Score:
    """How likely one continuation of one sink is.

    Attributes
    ----------
    prompt, continuation
        Indices into what was asked.
    node
        The sink that was continued.
    text
        The continuation.
    token_logprobs
        Of its tokens, each given those before it, in nats, float64 ``[n]``.
    unconditional
        The total behind the unconditional prompt, if there was one.
    """

    prompt: int
    node: str
    continuation: int
    text: str
    token_logprobs: Tensor
    unconditional: float | None = None

    @property
    def logprob(self) -> float:
        """The total, in nats."""
        return float(self.token_logprobs.sum())

    def normalised(self, by: By) -> float:
        """The total; by token; by character of the text; or less what the continuation has behind the unconditional prompt.

        Raises
        ------
        LeattnError
            Another word, or no unconditional prompt.
        """
        if by not in get_args(By):
            raise LeattnError(choices("by", by, get_args(By)))
        if by == "tokens":
            return self.logprob / len(self.token_logprobs)
        if by == "characters":
            return self.logprob / max(1, len(self.text))
        if by == "total":
            return self.logprob
        if self.unconditional is None:
            raise LeattnError("there was no unconditional prompt; give score(unconditional=...), such as 'Answer:'")
        return self.logprob - self.unconditional


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """What :func:`leattn.score` found.

    Everything nested goes by prompt, then by continuation, in the order in which they were given: a list for one prompt, a
    list of lists for a list of them. A prompt with several sinks has a list for each sink in its place.

    Attributes
    ----------
    rows : tuple of Score
        All of them.
    is_list : bool
        Whether a list of prompts was asked about.
    stats : Stats
        Tokens computed and reused, forwards and seconds.
    backend : str
        Which backend ran.
    """

    rows: tuple[Score, ...]
    is_list: bool
    stats: Stats
    backend: str

    @property
    def logprobs(self) -> Any:
        """Totals in nats, nested."""
        return self._nested(lambda rows: [row.logprob for row in rows])

    @property
    def token_logprobs(self) -> Any:
        """Log-probabilities of the tokens of each continuation, float64 ``[n]``, nested."""
        return self._nested(lambda rows: [row.token_logprobs for row in rows])

    def normalised(self, by: By) -> Any:
        """Totals, nested: as they are; divided by ``"tokens"`` or ``"characters"``; ``"unconditional"``: less what the
        continuation has behind the unconditional prompt.

        Raises
        ------
        LeattnError
            Another word, or no unconditional prompt.
        """
        return self._nested(lambda rows: [row.normalised(by) for row in rows])

    def best(self, by: By = "total") -> Any:
        """The index of the likeliest continuation, nested without the last level; the first of equals."""
        return self._nested(lambda rows: max(range(len(rows)), key=lambda c: rows[c].normalised(by)))

    def probabilities(self, by: By = "total") -> Any:
        """A softmax over the continuations of each prompt, nested."""
        return self._nested(lambda rows: torch.tensor([row.normalised(by) for row in rows]).double().softmax(0).tolist())

    def _nested(self, value: Callable[[list[Score]], Any]) -> Any:
        found = []
        for _, of_prompt in groupby(self.rows, lambda row: row.prompt):
            by_sink: dict[str, list[Score]] = {}
            for row in of_prompt:
                by_sink.setdefault(row.node, []).append(row)
            values = [value(rows) for rows in by_sink.values()]
            found.append(values[0] if len(values) == 1 else values)
        return found if self.is_list else found[0]

    def __len__(self) -> int:
        return len(self.rows)

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``, one row per continuation of a sink."""
        names = ("prompt", "node", "continuation", "text", "logprob", "unconditional")
        columns = {name: [getattr(row, name) for row in self.rows] for name in names}
        columns["tokens"] = [len(row.token_logprobs) for row in self.rows]
        columns["characters"] = [len(row.text) for row in self.rows]
        return data_frame(columns)

    def __str__(self) -> str:
        rows = [
            [
                str(row.prompt),
                " ".join(row.node.split()),
                repr(row.text),
                f"{row.logprob:.3f}",
                f"{row.normalised('tokens'):.3f}",
            ]
            for row in self.rows
        ]
        return text_table(_HEAD, rows)

    def __repr__(self) -> str:
        return f"Scores({len(self.rows)} of {len({row.prompt for row in self.rows})} prompts, backend {self.backend!r})"

    def _repr_html_(self) -> str:
        rows = [(row.prompt, row.node, repr(row.text), row.logprob, row.normalised("tokens")) for row in self.rows]
        stats = self.stats
        note = f"{stats.computed} tokens computed, {stats.reused} reused, {stats.seconds:.2f} s, {self.backend}"
        return html_table(_HEAD, rows, note)


_HEAD = ("prompt", "node", "continuation", "nats", "per token")
