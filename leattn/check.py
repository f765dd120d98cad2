"""``check_model``: what a model can do with graphs, as a report. What it says is found out elsewhere, by trying."""

from __future__ import annotations

import textwrap
import time
from dataclasses import dataclass
from typing import Any

from leattn.attention.backends import BACKENDS
from leattn.attention.probe import route
from leattn.attention.turning import readings_refusal, real_refusal, shift_refusal
from leattn.errors import BackendError, choices
from leattn.kv.certify import Certificate, certificate
from leattn.model.facts import Facts
from leattn.model.record import Model
from leattn.table import html_table


@dataclass(frozen=True)
class Capability:
    """One thing a model can do, or cannot and why."""

    name: str
    works: bool
    reason: str = ""


@dataclass(frozen=True)
class ModelReport:
    """What :func:`leattn.check_model` found, in ``seconds``. Prints as a table."""

    model: str
    implementation: str
    facts: Facts
    capabilities: tuple[Capability, ...]
    seconds: float

    def __getitem__(self, name: str) -> Capability:
        for capability in self.capabilities:
            if capability.name == name:
                return capability
        raise BackendError(choices("capability", name, [capability.name for capability in self.capabilities]))

    @property
    def ok(self) -> bool:
        """Whether the model can follow a graph on at least one backend."""
        return any(c.works for c in self.capabilities if c.name in BACKENDS)

    @property
    def _title(self) -> str:
        verdict = "can follow a graph" if self.ok else "cannot follow a graph"
        return f"{self.model}, loaded with {self.implementation}, {verdict} (found out in {self.seconds:.1f} s)"

    @property
    def _rows(self) -> list[tuple[str, str, str]]:
        """Capability, yes or no, and why; a reason that holds for several in a row is said once."""
        rows: list[tuple[str, str, str]] = []
        said = ""
        for capability in self.capabilities:
            reason = "as above" if capability.reason and capability.reason == said else capability.reason
            rows.append((capability.name, "yes" if capability.works else "no", reason))
            said = capability.reason
        return rows

    def __str__(self) -> str:
        width = max(len(name) for name, _, _ in self._rows)
        lines = [self._title]
        for name, answer, reason in self._rows:
            front = f"  {name:<{width}}  {answer:<3}  "
            lines.append(textwrap.fill(front + reason, 100, subsequent_indent=" " * len(front)).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table(["", "works", "why"], self._rows, caption=self._title)


def check_model(model: Any) -> ModelReport:
    """What this model can do with graphs, and why not where it cannot; found out once per model, by trying.

    Two plain forwards and six on small graphs per backend tell whether attention is causal, whether plain text as a graph
    gives what the model gives by itself, whether the mask is asked for and obeyed, whether positions come from ``position_ids``
    and not from the index in the sequence, and whether state leaks around attention; a few more, whether stored keys and values
    may be used again, at the same and at other positions. ``attend``, ``generate`` and a ``KVStore`` ask by themselves.

    Examples
    --------
    >>> import leattn
    >>> model, _ = leattn.tiny.load()
    >>> leattn.check_model(model)["sdpa"].works
    True
    """
    started = time.perf_counter()
    record = Model.of(model)
    facts = record.facts
    found = []
    for backend in BACKENDS.values():
        if backend.device not in (None, record.device_type):
            continue
        reason, _ = route(model, record, backend)
        found.append(Capability(backend.name, reason is None, reason or ""))
    works = any(capability.works for capability in found)
    why = "" if works else found[0].reason
    found.append(Capability("generate", works and hasattr(model, "generate"), why))
    certified = certificate(model) if works else Certificate(why, why)
    for name, reason in (
        ("reuse", certified.reuse),
        ("shifted reuse", certified.shift),
        ("readings", readings_refusal(model, record) if works else why),
        ("shifted readings", shift_refusal(model, record) if works else why),
        ("real positions", real_refusal(model, record) if works else why),
        ("skip attention", _skip_refusal(record)),
    ):
        reason = reason if works else why
        found.append(Capability(name, reason is None, reason or ""))
    if facts.windowed:
        found.append(Capability("windows", works, "measured in positions, with a full-length cache" if works else why))
    if facts.index_limit is not None:
        found.append(Capability("length", works, f"up to {facts.index_limit} tokens: past that attention depends on the index"))
    if facts.seen_limit is not None:
        found.append(Capability("seen", works, f"up to {facts.seen_limit} tokens by each: past that it chooses among them"))
    if facts.rope_limit is not None:
        found.append(Capability("positions", works, f"below {facts.rope_limit}: past it rotary angles depend on the length"))
    elif facts.position_limit is not None:
        found.append(Capability("positions", works, f"below {facts.position_limit}, the size of the position table"))
    name = f"{type(model).__name__} ({facts.family})"
    return ModelReport(name, record.implementation, facts, tuple(found), time.perf_counter() - started)


def _skip_refusal(record: Model) -> str | None:
    """Why attention cannot be left out of a layer, or None: it must be one module of its own."""
    try:
        _ = record.attentions
    except BackendError as error:
        return str(error)
    return None
