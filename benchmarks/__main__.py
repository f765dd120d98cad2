"""``python -m benchmarks [--quick] [--rounds N] [--only ROW …] [--out FILE]``: ratios against their goals, and JSON."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

import leattn
from benchmarks import attention, branches, cached, plain, planning, readings, scores
from benchmarks.row import FULL, QUICK, Effort, Result, Row
from benchmarks.table import judgement, number

ROWS: tuple[Row, ...] = (
    *attention.ROWS,
    *plain.ROWS,
    *cached.ROWS,
    *branches.ROWS,
    *planning.ROWS,
    *readings.ROWS,
    *scores.ROWS,
)


def select(names: Iterable[str]) -> list[Row]:
    """Rows by name or by tag, in their own order.

    Raises
    ------
    ValueError
        A name that is neither.
    """
    wanted = set(names)
    known = {row.name for row in ROWS} | {tag for row in ROWS for tag in row.tags}
    if unknown := sorted(wanted - known):
        raise ValueError(f"there is no row {unknown[0]!r}; rows and tags are {', '.join(sorted(known))}")
    return [row for row in ROWS if row.name in wanted or row.tags & wanted]


def machine() -> dict[str, Any]:
    """What the figures depend on, and nothing that says whose machine it is."""
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "leattn": leattn.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def run(rows: Sequence[Row], effort: Effort, out: Path, *, add: bool = False) -> list[Result]:
    """Measure row by row, print each as it is done, write the JSON.

    With ``add`` the rows join those that the file has; each says on which machine it was measured, if on another.
    """
    # One thread, or CPU time would count what another thread waits.
    torch.set_num_threads(1)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    out.parent.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    before = json.loads(out.read_text(encoding="utf-8")) if add else {"machine": facts, "rounds": effort.rounds, "rows": []}
    place = {} if before["machine"] == facts else {"machine": facts}
    for row in rows:
        started = time.perf_counter()
        results.append(row.run(effort))
        print(f"\n{row.name}: {row.what}  ({time.perf_counter() - started:.0f} s)\n{_lines(results[-1])}", flush=True)
        # After every row, so that a run that is interrupted keeps what it has.
        new = {result.name: result.to_dict() | place for result in results}
        kept = [new.pop(entry["name"], entry) for entry in before["rows"]]
        written = {**before, "rows": [*kept, *new.values()]}
        out.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nwritten to {out}")
    return results


def _lines(result: Result) -> str:
    measured, goals = result.measured, {verdict.goal.figure: verdict for verdict in result.verdicts}
    lines = []
    if measured.seconds:
        times = ", ".join(f"{name} {1000 * seconds:.4g}" for name, seconds in measured.seconds.items())
        lines.append(f"  ms: {times}")
    for name, value in measured.figures.items():
        verdict = goals.get(name)
        goal = "" if verdict is None else f"{verdict.goal.sign} {verdict.goal.value:g} {judgement(verdict)}"
        lines.append(f"  {name:40}{number(value):>10}  {goal}".rstrip())
    lines.extend(f"  {note}" for note in measured.notes)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and without the longest rows")
    parser.add_argument("--rounds", type=int, help=f"rounds per median: {FULL.rounds}, or {QUICK.rounds} if quick")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows by name or tag")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks.json"))
    parser.add_argument("--add", action="store_true", help="put the rows beside those that the file has")
    args = parser.parse_args(arguments)
    try:
        rows = select(args.only or (["quick"] if args.quick else [row.name for row in ROWS]))
    except ValueError as error:
        parser.error(str(error))
    effort = QUICK if args.quick else FULL
    run(rows, replace(effort, rounds=args.rounds or effort.rounds), args.out, add=args.add)


if __name__ == "__main__":
    main()
