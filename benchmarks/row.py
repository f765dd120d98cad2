"""What a benchmark is: a row measures figures, and some of its figures have goals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Effort:
    """How much is measured: ``rounds`` rounds, and every length in tokens divided by ``shrink``.

    What is measured on shrunken workloads says that the code runs, and nothing about the goals.
    """

    rounds: int
    shrink: int = 1

    def length(self, tokens: int) -> int:
        return max(1, tokens // self.shrink)


FULL, QUICK, SMALLEST = Effort(7), Effort(3), Effort(1, 16)


@dataclass(frozen=True)
class Goal:
    """What one figure should be: at least or at most ``value``, in ``unit``."""

    figure: str
    sign: Literal["≥", "≤"]
    value: float
    unit: str = "×"

    def met(self, measured: float) -> bool:
        return measured >= self.value if self.sign == "≥" else measured <= self.value


@dataclass(frozen=True)
class Measured:
    """What a row found: median CPU seconds per rival, figures by name (those with a goal among them), and remarks."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """A goal beside what was measured; ``reached`` is None where nothing that counts was measured."""

    goal: Goal
    measured: float | None
    reached: bool | None


@dataclass(frozen=True)
class Row:
    """One workload. ``measure`` checks that all rivals agree before it times any of them."""

    name: str
    what: str
    measure: Callable[[Effort], Measured]
    goals: tuple[Goal, ...] = ()
    tags: frozenset[str] = frozenset()

    def run(self, effort: Effort) -> Result:
        """Measure, and judge the goals."""
        measured = self.measure(effort)
        counts = effort.shrink == 1
        verdicts = []
        for goal in self.goals:
            figure = measured.figures.get(goal.figure)
            verdicts.append(Verdict(goal, figure, goal.met(figure) if counts and figure is not None else None))
        return Result(self.name, self.what, measured, tuple(verdicts))


@dataclass(frozen=True)
class Result:
    """What becomes of a row, as it is printed and written to JSON."""

    name: str
    what: str
    measured: Measured
    verdicts: tuple[Verdict, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """What :meth:`to_dict` gave, after a round through JSON."""
        verdicts = tuple(Verdict(Goal(**entry["goal"]), entry["measured"], entry["reached"]) for entry in data["verdicts"])
        measured = data["measured"]
        return cls(
            data["name"], data["what"], Measured(measured["seconds"], measured["figures"], tuple(measured["notes"])), verdicts
        )
