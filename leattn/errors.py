"""What can go wrong. Every error a user can cause is a :class:`LeattnError` that states fact, value and fix."""

from __future__ import annotations

from collections.abc import Iterable


class LeattnError(ValueError):
    """Base of every error that a user's input can cause."""


class GraphError(LeattnError):
    """The graph itself is wrong: a cycle, an unknown or doubly given id, an impossible segment."""


class CompileError(LeattnError):
    """The graph cannot become a prompt: an empty node, contradictory pins, a negative position."""


class BackendError(LeattnError):
    """This model, backend and prompt do not go together; the message says what does."""


class LeattnWarning(UserWarning):
    """Something that is allowed but rarely meant."""


def choices(what: str, given: object, known: Iterable[str]) -> str:
    """The sentence for a name that is not among the known ones.

    Examples
    --------
    >>> choices("positions", "relative", ["restart", "sequential"])
    "unknown positions 'relative'; choose one of 'restart', 'sequential'"
    """
    names = ", ".join(repr(name) for name in known)
    return f"unknown {what} {given!r}; choose one of {names}"
