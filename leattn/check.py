"""``check_model``: what a model can do with graphs, as a report. What it says is found out elsewhere, by trying."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from leattn.attention.backends import BACKENDS
from leattn.attention.probe import route
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
    """What :func:`leattn.check_model` found. Prints as a table."""

    model: str
    implementation: str
    facts: Facts
    capabilities: tuple[Capability, ...]

    def __getitem__(self, name: str) -> Capability:
        for capability in self.capabilities:
            if capability.name == name:
                return capability
        raise BackendError(choices("capability", name, [capability.name for capability in self.capabilities]))

    @property
    def ok(self) -> bool:
        """Whether the model can follow a graph on at least one backend."""
        return any(c.works for c in self.capabilities if c.name in BACKENDS)

    def __str__(self) -> str:
        width = max(len(capability.name) for capability in self.capabilities)
        lines = [f"{self.model} (loaded with {self.implementation})"]
        for capability in self.capabilities:
            reason = f"  {capability.reason}" if capability.reason else ""
            lines.append(f"  {capability.name:<{width}}  {'yes' if capability.works else 'no '}{reason}".rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [(c.name, "yes" if c.works else "no", c.reason) for c in self.capabilities]
        return html_table([], rows, caption=self.model)


def check_model(model: Any) -> ModelReport:
    """What this model can do with graphs, and why not where it cannot; found out once per model, by trying.

    Five tiny forwards tell whether the mask is asked for and obeyed, whether positions come from ``position_ids`` and not from
    the index in the sequence, and whether state leaks around attention; a few more, whether stored keys and values may be used
    again, at the same and at other positions. ``attend``, ``generate`` and a ``KVStore`` ask by themselves.

    Examples
    --------
    >>> import leattn
    >>> model, _ = leattn.tiny.load()
    >>> leattn.check_model(model)["sdpa"].works
    True
    """
    record = Model.of(model)
    facts = record.facts
    found = []
    for backend in BACKENDS.values():
        if backend.device not in (None, record.device.type):
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
        ("skip attention", _skip_refusal(record)),
    ):
        reason = reason if works else why
        found.append(Capability(name, reason is None, reason or ""))
    if facts.windowed:
        found.append(Capability("windows", works, "measured in positions, with a full-length cache" if works else why))
    if facts.rope_limit is not None:
        found.append(Capability("positions", works, f"below {facts.rope_limit}: past it rotary angles depend on the length"))
    elif facts.position_limit is not None:
        found.append(Capability("positions", works, f"below {facts.position_limit}, the size of the position table"))
    return ModelReport(f"{type(model).__name__} ({facts.family})", record.implementation, facts, tuple(found))


def _skip_refusal(record: Model) -> str | None:
    """Why attention cannot be left out of a layer, or None: it must be one module of its own."""
    try:
        _ = record.attentions
    except BackendError as error:
        return str(error)
    return None
