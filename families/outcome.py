"""What a check found, and what becomes of all checks of one column."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from leattn import LeattnError

Status = Literal["exact", "refused", "WRONG", "CRASH", "unchecked"]
WORST: tuple[Status, ...] = ("WRONG", "CRASH", "refused", "exact", "unchecked")


@dataclass(frozen=True)
class Outcome:
    """One check: its name, what became of it, the largest relative error, and the sentence of a refusal or an exception."""

    check: str
    status: Status
    error: float | None = None
    text: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


def judged(check: str, tolerance: float, measure: Callable[[], float | None]) -> Outcome:
    """Run one check. ``measure`` gives the error, or None if there was nothing to compare with."""
    try:
        error = measure()
    except LeattnError as refusal:
        return Outcome(check, "refused", text=str(refusal))
    except Mismatch as found:
        return Outcome(check, "WRONG", text=str(found))
    except Exception as crash:
        return Outcome(check, "CRASH", text=f"{type(crash).__name__}: {first_line(crash)} ({place(crash)})")
    if error is None:
        return Outcome(check, "unchecked")
    return Outcome(check, "exact" if error < tolerance else "WRONG", error)


class Mismatch(Exception):
    """Something that is wrong and has no size: other tokens, nothing reused."""


def first_line(error: BaseException) -> str:
    """The first line of its message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


def place(error: BaseException) -> str:
    """The innermost lines it came through, without folders of this machine."""
    frames = traceback.extract_tb(error.__traceback__)[-2:]
    return ", ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in reversed(frames))


def worst(outcomes: Iterable[Outcome]) -> Status:
    """The status of a column: one wrong or crashed check is enough; refused if nothing that was asked for was given."""
    statuses = {outcome.status for outcome in outcomes}
    for status in ("WRONG", "CRASH"):
        if status in statuses:
            return status
    if "exact" in statuses:
        return "exact"
    return "refused" if "refused" in statuses else "unchecked"
