"""The backends by name, and the one policy of ``"auto"``."""

from __future__ import annotations

from leattn.attention.dense import EAGER, SDPA
from leattn.attention.flex import FLEX
from leattn.attention.request import Backend
from leattn.attention.sparse import SPARSE, VARLEN
from leattn.errors import BackendError, choices
from leattn.model.record import Model

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (EAGER, SDPA, FLEX, SPARSE, VARLEN)}
AUTO = ("sparse", "sdpa", "eager", "flex")
"""What ``"auto"`` tries, but for the model's current implementation, which goes before the other ones of transformers."""


def named(backend: str | Backend) -> Backend:
    """A backend by its name, or one of the user's own as it is.

    Raises
    ------
    BackendError
        An unknown name.
    """
    if isinstance(backend, Backend):
        return backend
    if backend not in BACKENDS:
        raise BackendError(choices("backend", backend, ["auto", *BACKENDS]) + ", or give a leattn.Backend")
    return BACKENDS[backend]


def automatic(record: Model, *, plain: bool) -> list[Backend]:
    """What ``"auto"`` tries, best first. Plain text stays on the model's current implementation."""
    current = record.implementation
    order = sorted((BACKENDS[name] for name in AUTO), key=lambda backend: backend.implementation not in (None, current))
    return sorted(order, key=lambda backend: backend.implementation is None) if plain else order


def unfit(record: Model) -> str | None:
    """Why no backend can serve such a model, as far as its config tells; None if one may."""
    facts = record.facts
    if facts.stateful:
        return (
            "it carries a recurrent state from token to token, which leaks past any attention mask; "
            "use a model whose layers are all attention"
        )
    if not facts.takes_positions:
        return (
            "its forward takes no position_ids, so its attention depends on the index in the sequence, which a graph's "
            "positions cannot reach; use a model that takes them"
        )
    if facts.windows_by_index:
        return "it cuts windows by index, not by position, in its local layers; use one with full or sliding-window attention"
    if facts.chunked:
        return "its chunked attention cuts by index, not by position; use a model with full or sliding-window attention"
    return None


def refusal(backend: Backend, record: Model) -> str | None:
    """Why a backend cannot serve such a model, as far as its config tells and another backend might; None if it may."""
    facts = record.facts
    if backend.device not in (None, record.device_type):
        return f"it runs on {backend.device} only, and the model is on {record.device_type}"
    reason = backend.refusal(record)
    if reason is None and not facts.can_switch and record.implementation != backend.implementation:
        if backend.implementation is not None:
            way = f"; load it with attn_implementation={backend.implementation!r}"
        else:
            way = "".join(f"; use backend={other.name!r}" for other in [instead(record)] if other is not None)
        return f"{facts.family} fixes its attention implementation when it is loaded, here {record.implementation!r}{way}"
    return reason


def instead(record: Model) -> Backend | None:
    """What can serve a model if anything can: eager, or what it is fixed to, if that is one of ours."""
    if record.facts.can_switch:
        return EAGER
    return next((one for one in BACKENDS.values() if one.implementation == record.implementation), None)
