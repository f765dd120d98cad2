"""What a comparison found: a row per method, example and metric, and means with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from leattn.errors import LeattnError, choices
from leattn.intervals import Summary, difference, summary
from leattn.table import data_frame, html_table, text_table


@dataclass(frozen=True)
class Row:
    """One measured value: of a method, on an example, whose gold document stands at place ``gold``."""

    method: str
    example: str
    metric: str
    value: float
    gold: int | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What :func:`leattn.compare` found.

    Attributes
    ----------
    rows : tuple of Row
        One value each. Beside the metrics asked for there are, where costs were measured, ``tokens_cold`` and ``tokens_warm``
        (what the first token took the model to compute, with an empty store and with one that knows the documents),
        ``seconds_cold`` and ``seconds_warm``.
    settings : mapping
        What the run was of: model, dtype, releases, limits.
    shares : set of str
        The metrics that are 0 or 1.
    """

    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    shares: frozenset[str] = frozenset()

    @cached_property
    def _values(self) -> dict[tuple[str, str], dict[str, float]]:
        """(method, metric) → example → value."""
        found: dict[tuple[str, str], dict[str, float]] = {}
        for row in self.rows:
            found.setdefault((row.method, row.metric), {})[row.example] = row.value
        return found

    @property
    def methods(self) -> list[str]:
        """Their names, in the order in which they were given."""
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def metrics(self) -> list[str]:
        """All columns."""
        return list(dict.fromkeys(row.metric for row in self.rows))

    def values(self, method: str, metric: str) -> dict[str, float]:
        """By example.

        Raises
        ------
        LeattnError
            Nothing was measured there.
        """
        if method not in self.methods:
            raise LeattnError(choices("method", method, self.methods))
        if (method, metric) not in self._values:
            raise LeattnError(choices("metric", metric, self.metrics))
        return self._values[method, metric]

    def summary(self, method: str, metric: str) -> Summary:
        """Mean and 95 % interval over examples: Wilson's for shares, else the bootstrap's."""
        return summary(list(self.values(method, metric).values()), is_share=metric in self.shares)

    def difference(self, method: str, other: str, metric: str) -> Summary:
        """The mean of ``method`` less that of ``other`` on the examples that both have, paired bootstrap."""
        ours, theirs = self.values(method, metric), self.values(other, metric)
        both = [example for example in ours if example in theirs]
        if not both:
            raise LeattnError(f"{method!r} and {other!r} have no example in common")
        return difference([ours[example] for example in both], [theirs[example] for example in both])

    def by_place(self, method: str, metric: str) -> dict[int, Summary]:
        """By the place of the gold document."""
        found: dict[int, list[float]] = {}
        for row in self.rows:
            if row.method == method and row.metric == metric and row.gold is not None:
                found.setdefault(row.gold, []).append(row.value)
        return {place: summary(found[place], is_share=metric in self.shares) for place in sorted(found)}

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with the columns of :class:`Row`."""
        return data_frame({name: [getattr(row, name) for row in self.rows] for name in Row.__dataclass_fields__})

    def table(self, baseline: str | None = None) -> tuple[list[str], list[list[str]]]:
        """Names of columns, and a line of texts for each method; with a ``baseline``, differences to it beside the means."""
        head = ["method"]
        for metric in self.metrics:
            head += [metric] if baseline is None else [metric, f"− {baseline}"]
        lines = []
        for method in self.methods:
            line = [method]
            for metric in self.metrics:
                known = (method, metric) in self._values
                line.append(_shown(self.summary(method, metric)) if known else "")
                if baseline is not None:
                    apart = known and method != baseline and (baseline, metric) in self._values
                    line.append(_shown(self.difference(method, baseline, metric), sign="+") if apart else "")
            lines.append(line)
        return head, lines

    def joined(self, other: Comparison) -> Comparison:
        """The rows of both, of the same run on other methods."""
        return replace(self, rows=(*self.rows, *other.rows), shares=self.shares | other.shares)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return f"{self._caption}\n\n{text_table(*self.table())}"

    def __repr__(self) -> str:
        return f"Comparison({len(self.methods)} methods, {', '.join(self.metrics)})"

    def _repr_html_(self) -> str:
        return html_table(*self.table(), caption=self._caption)

    @property
    def _caption(self) -> str:
        count = len({row.example for row in self.rows})
        return f"{self.settings.get('model', 'model')}, {count} examples; means and 95 % intervals"

    def markdown(self, baseline: str | None = None) -> str:
        """The table for a page."""
        head, lines = self.table(baseline)
        return "\n".join(_line(cells) for cells in (head, ["---"] * len(head), *lines))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(of: Summary, sign: str = "") -> str:
    digits = 0 if abs(of.mean) >= 100 else 2
    return f"{of.mean:{sign}.{digits}f} [{of.low:{sign}.{digits}f}, {of.high:{sign}.{digits}f}]"
