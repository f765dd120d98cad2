"""What attribution found: importances as a table, ranked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch

from leattn.errors import LeattnError, choices
from leattn.interventions.scores import Mode, Shift
from leattn.prompt.compiled import CompiledPrompt
from leattn.table import data_frame, html_table, text_table

Method: TypeAlias = Literal["suppress_nodes", "cut_nodes", "cut_edges", "suppress_tokens"]
METHODS: tuple[Method, ...] = get_args(Method)
Measure: TypeAlias = Literal["loss", "logit"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
SHOWN = 12
"""Rows per method that ``print`` shows."""


@dataclass(frozen=True)
class Importance:
    """One row: what was intervened on, and what the target lost by it.

    Attributes
    ----------
    method
        ``"suppress_nodes"``, ``"cut_nodes"``, ``"cut_edges"`` or ``"suppress_tokens"``.
    node
        Name of the node that was suppressed, or is no longer seen; of a token, the node that holds it.
    query
        Of an edge: the node that no longer sees ``node``.
    token, text
        Of a token: its index in the prompt, and its text.
    importance
        loss(target | intervened) − loss(target | untouched), in nats, or what was measured instead: the sum of ``per_token``.
    per_token
        The same for each target token.
    """

    method: Method
    node: str
    query: str | None
    token: int | None
    text: str | None
    importance: float
    per_token: tuple[float, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """What :func:`attribute` found.

    Attributes
    ----------
    prompt, target_ids
        What was asked about; T target tokens. With ``target_tokens=True`` the prompt ends with the target's, but for the last.
    loss
        Cross-entropy of each target token in nats, nothing touched, ``T`` numbers.
    rows
        One :class:`Importance` per intervention, methods and nodes in the order asked for.
    factor, mode, layers, backend, shift, measure, squared
        How it was suppressed (``layers`` None: in all of them), what ran, and what was measured.
    """

    prompt: CompiledPrompt
    target_ids: tuple[int, ...]
    loss: tuple[float, ...]
    rows: tuple[Importance, ...]
    methods: tuple[Method, ...]
    factor: float
    mode: Mode
    layers: tuple[int, ...] | None
    backend: str
    shift: Shift = "visible"
    measure: Measure = "loss"
    squared: bool = False

    @property
    def unit(self) -> str:
        """Of the importances: ``"nats"``, ``"logits"``, or one of them squared."""
        return ("nats" if self.measure == "loss" else "logits") + "²" * self.squared

    @property
    def quantity(self) -> str:
        """What the importances are, in words."""
        return f"{self.unit} of loss gained" if self.measure == "loss" else f"{self.unit} of the target lost"

    @property
    def target(self) -> str:
        """The target as text."""
        return self.prompt.decode(torch.tensor(self.target_ids))

    def rank(self, method: Method) -> tuple[Importance, ...]:
        """The rows of one method, the most important first.

        Raises
        ------
        LeattnError
            A method that was not asked for.
        """
        if method not in self.methods:
            raise LeattnError(choices("method", method, self.methods) + ", which is what this attribution holds")
        return tuple(sorted((row for row in self.rows if row.method == method), key=lambda row: -row.importance))

    def to_pandas(self) -> Any:
        """A data frame, one row per intervention, with the columns of :class:`Importance`. Needs pandas."""
        names = list(Importance.__dataclass_fields__)
        return data_frame({name: [getattr(row, name) for row in self.rows] for name in names})

    def __str__(self) -> str:
        parts = [self._caption()]
        for method in self.methods:
            ranked = self.rank(method)
            header, rows = _cells(method, ranked[:SHOWN], self.unit)
            rest = f"\n… {len(ranked) - SHOWN} more" if len(ranked) > SHOWN else ""
            parts.append(text_table(header, rows) + rest)
        return "\n\n".join(parts)

    def __repr__(self) -> str:
        return f"Attribution({self.target!r}, {len(self.rows)} rows of {', '.join(self.methods)})"

    def _repr_html_(self) -> str:
        # The head of each table says its method.
        captions = {self.methods[0]: self._caption()}
        tables = (html_table(*_cells(m, self.rank(m), self.unit), caption=captions.get(m, "")) for m in self.methods)
        return "".join(tables)

    def _caption(self) -> str:
        layers = "all layers" if self.layers is None else f"layers {', '.join(map(str, self.layers))}"
        shift = ", shift over all keys" if self.shift == "all" else ""
        how = f"; suppressed by {self.factor:g}, {self.mode}, {layers}{shift}"
        how = how if any("suppress" in m for m in self.methods) else ""
        return f"importance in {self.unit} for {self.target!r}, whose loss is {sum(self.loss):.4f} untouched{how}"


def _cells(method: Method, rows: Sequence[Importance], unit: str) -> tuple[list[str], list[list[str]]]:
    head = {"cut_edges": [method, "sees no more"], "suppress_tokens": [method, "index", "text"]}.get(method, [method])
    cells = []
    for row in rows:
        first = [row.query or "", row.node] if method == "cut_edges" else [row.node]
        extra = [str(row.token), repr(row.text)] if method == "suppress_tokens" else []
        cells.append([*first, *extra, f"{round(row.importance, 4) + 0.0:+.4f}"])
    return [*head, unit], cells
