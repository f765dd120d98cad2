"""How a node reads a group of what it sees: softer or sharper, with more or less weight, at another place."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from leattn.errors import GraphError

if TYPE_CHECKING:
    from leattn.dag.builders import Content
    from leattn.dag.node import ICLNode

_SYMBOLS = {"temperature": "τ", "scale": "σ", "log_weight": "b", "shift": "δ"}


@dataclass(frozen=True)
class Reading:
    """The numbers of :func:`read`. With its defaults nothing changes.

    Raises
    ------
    GraphError
        A temperature or scale that is not a positive number, a weight or shift that is none, an empty set of layers or heads.
    """

    temperature: float = 1.0
    scale: float = 1.0
    log_weight: float = 0.0
    shift: float = 0
    layers: frozenset[int] | None = None
    heads: frozenset[int] | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "scale"):
            value = _number(name, getattr(self, name))
            if not (0 < value < math.inf):
                raise GraphError(f"{name}={value:g} of a reading; give a positive number, 1 for no change")
        weight, shift = _number("log_weight", self.log_weight), _number("shift", self.shift)
        if not weight < math.inf:
            raise GraphError(f"log_weight={weight:g} of a reading; give a number, or -inf for a group that counts nothing")
        if not math.isfinite(shift):
            raise GraphError(f"shift={shift:g} of a reading; give positions, 0 for no change")
        for name in ("layers", "heads"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _indices(name, value))

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return (self.temperature, self.scale, self.log_weight, self.shift) == (1, 1, 0, 0)

    def changed(self) -> dict[str, Any]:
        """What is not as it is by default, as plain data."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: sorted(value) if isinstance(value, frozenset) else value
            for name, value in found.items()
            if value != getattr(Reading, name)
        }

    def __str__(self) -> str:
        """The symbols of METHODS: τ, σ, b, δ, and where it holds."""
        said = [
            f"{_SYMBOLS[name]} {value:.4g}" if name in _SYMBOLS else f"{name} {', '.join(map(str, value))}"
            for name, value in self.changed().items()
        ]
        return "  ".join(said) or "as it is"


@dataclass(frozen=True, eq=False)
class Read:
    """A group of nodes among ``parents``, and how they are read; in :func:`leattn.from_chat` of documents, as they come.

    Iterates as itself: ``[a, *read(b)]`` is ``[a, read(b)]``.
    """

    nodes: tuple[Any, ...]
    reading: Reading

    def __iter__(self) -> Iterator[Read]:
        yield self


def read(
    nodes: ICLNode | Iterable[ICLNode | Content],
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    log_weight: float = 0.0,
    shift: float = 0,
    layers: int | Collection[int] | None = None,
    heads: int | Collection[int] | None = None,
) -> Read:
    """A group of what a node sees, and how it is read; it stands among ``parents`` wherever nodes do.

    With scaled scores s_j = q·k_j/√d, the group G has L = log Σ exp(s_j / τ) and within it a softmax of s_j / τ. In the row it
    weighs exp(σ·τ·L + b); every key outside of groups counts exp(s_j), as always. Only the reader's rows change: keys and
    values of what is read stay, so they are shared and stored as before. What continues the reader reads as it does.

    Parameters
    ----------
    nodes
        One node or several; among the documents of :func:`leattn.from_chat`, texts or token ids. Several groups are several
        calls.
    temperature
        τ > 0. Below 1 the group is read more sharply.
    scale
        σ > 0, of the group's log-sum-exp. APE (Yang et al., arXiv 2502.05431) with its attention temperature T and scaling
        factor S is ``temperature=T, scale=S``.
    log_weight
        b, added to the group's log-weight: ``-log(M)`` for M groups is structured prompting (Hao et al., arXiv 2212.06713),
        ``log(w)`` a soft edge, ``-inf`` a cut one.
    shift
        δ: the group is read as if it stood δ positions further on, which takes rotary positions.
    layers, heads
        In which it holds; all of them for None.

    Raises
    ------
    GraphError
        No nodes, a group in a group, or numbers that :class:`Reading` refuses.

    Examples
    --------
    >>> from leattn import ICLNode, compile_prompt
    >>> header = ICLNode([1, 2], id="header")
    >>> docs = [ICLNode([3, 4, 5], [header], f"doc {i}") for i in (1, 2)]
    >>> print(compile_prompt(ICLNode([6, 7], [header, *read(docs, temperature=0.8)], "Q")))
    4 nodes, 10 tokens, density 0.84
      0  header  tokens 0:2   positions 0:2  ■⬚⬚⬚
      1  doc 1   tokens 2:5   positions 2:5  ■■⬚⬚
      2  doc 2   tokens 5:8   positions 2:5  ■⬚■⬚
      3  Q       tokens 8:10  positions 5:7  ■▣▣■  ▣ τ 0.8
    """
    given: list[Any] = [nodes] if hasattr(nodes, "parents") or isinstance(nodes, str) else list(nodes)
    if not given:
        raise GraphError("a reading is of one node or more; leave it out where there is none")
    for node in given:
        if isinstance(node, Read):
            raise GraphError("a group is read in one way; give each group a read() of its own among the parents")
    reading = Reading(temperature, scale, log_weight, shift, layers, heads)  # type: ignore[arg-type]
    return Read(tuple(given), reading)


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise GraphError(f"{name}={value!r} of a reading; give a number") from None


def _indices(name: str, given: Any) -> frozenset[int]:
    indices = [given] if isinstance(given, int) else list(given)
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise GraphError(f"{name} of a reading are whole numbers from 0 up, not {index!r}")
    if not indices:
        raise GraphError(f"{name}=[] of a reading: it would hold nowhere; leave it out for all {name}")
    return frozenset(indices)
