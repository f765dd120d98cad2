"""What a sweep measured: one row per value, and means with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from leattn.errors import LeattnError, choices
from leattn.intervals import Summary, bootstrap, wilson
from leattn.table import data_frame, html_table, text_table

UNTOUCHED = "untouched"
"""The operation of a sweep's baseline rows."""


@dataclass(frozen=True)
class SweepRow:
    """One measured value.

    Attributes
    ----------
    operation
        Its name; ``"untouched"`` for the baseline.
    layer
        Where it was applied; None for the baseline.
    source_layer
        Of an injection: the layer the states were taken from.
    seed
        None where nothing is drawn: baseline and injections.
    prompt
        Index into the prompts.
    target
        ``"own"``: measured on the prompt's target. ``"donor"``: on that of an injection's donor.
    value
        The metric.
    """

    operation: str
    layer: int | None
    source_layer: int | None
    seed: int | None
    prompt: int
    target: str
    value: float

    def with_seed(self, seed: int | None) -> SweepRow:
        return replace(self, seed=seed)


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult:
    """What :func:`leattn.analysis.sweep` measured: ``rows``, one :class:`SweepRow` per value, and what was asked for."""

    rows: tuple[SweepRow, ...]
    metric: str
    operations: tuple[str, ...]
    layers: tuple[int, ...]
    seeds: tuple[int, ...]
    prompts: int
    model: str
    backend: str

    @property
    def interval(self) -> str:
        """Which 95 % interval :meth:`summary` gives; prompts are the units, a prompt's seeds are averaged first."""
        return "Wilson" if self.metric == "accuracy" else "bootstrap"

    @cached_property
    def _points(self) -> dict[tuple[str, int | None, int | None, str], dict[int, list[float]]]:
        """Point → prompt → one value per seed."""
        points: dict[tuple[str, int | None, int | None, str], dict[int, list[float]]] = {}
        for row in self.rows:
            point = points.setdefault((row.operation, row.layer, row.source_layer, row.target), {})
            point.setdefault(row.prompt, []).append(row.value)
        return points

    def measured(self, operation: str) -> tuple[int, ...]:
        """The layers at which an operation was measured: all, but those where it has nothing to run."""
        return tuple(sorted({layer for name, layer, _, _ in self._points if name == operation and layer is not None}))

    def source_layers(self, operation: str) -> tuple[int, ...]:
        """The layers an injection took states from; empty for other operations."""
        return tuple(sorted({source for name, _, source, _ in self._points if name == operation and source is not None}))

    def summary(
        self, operation: str, layer: int | None = None, *, source_layer: int | None = None, target: str = "own"
    ) -> Summary:
        """Mean and 95 % interval over prompts at one point; ``summary("untouched")`` is the baseline.

        Raises
        ------
        LeattnError
            Nothing was measured there.
        """
        if operation not in (UNTOUCHED, *self.operations):
            raise LeattnError(choices("operation", operation, (UNTOUCHED, *self.operations)))
        values = self._points.get((operation, layer, source_layer, target))
        if values is None:
            raise LeattnError(
                f"nothing was measured for layer {layer}, source_layer {source_layer} and target {target!r} of {operation!r}; "
                f"its layers are {list(self.measured(operation))}, its source layers {list(self.source_layers(operation))}"
            )
        means = np.array([np.mean(column) for column in values.values()])
        mean = float(means.mean())
        low, high = wilson(mean, len(means)) if self.interval == "Wilson" else bootstrap(means)
        return Summary(mean, low, high, len(means))

    def mean(self, operation: str, layer: int | None = None, *, source_layer: int | None = None, target: str = "own") -> float:
        """The mean of :meth:`summary`."""
        return self.summary(operation, layer, source_layer=source_layer, target=target).mean

    def to_pandas(self) -> Any:
        """A data frame with the columns of :class:`SweepRow`. Needs pandas."""
        return data_frame({name: [getattr(row, name) for row in self.rows] for name in SweepRow.__dataclass_fields__})

    def __repr__(self) -> str:
        return f"SweepResult({self.metric}, {len(self.rows)} rows: {', '.join(self.operations)} × {len(self.layers)} layers)"

    def __str__(self) -> str:
        return f"{self._caption()}\n\n{text_table(*self._cells())}"

    def _repr_html_(self) -> str:
        return html_table(*self._cells(), caption=self._caption())

    def _caption(self) -> str:
        base = self.summary(UNTOUCHED)
        return (
            f"{self.metric.rsplit('.', 1)[-1]} of {self.model}, mean over {self.prompts} prompts; untouched {base.mean:.3f} "
            f"[{base.low:.3f}, {base.high:.3f}], {self.interval} 95 % interval"
        )

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """A line per operation (an injection: per source layer and target), a column per layer."""
        points = dict.fromkeys((name, source, target) for name, layer, source, target in self._points if layer is not None)
        rows = []
        for operation, source, target in points:
            name = operation if source is None else f"{operation} from {source}, {target}"
            there = self.measured(operation)
            means = (
                f"{self.mean(operation, layer, source_layer=source, target=target):.3f}" if layer in there else ""
                for layer in self.layers
            )
            rows.append([name, *means])
        return ["layer", *map(str, self.layers)], rows
