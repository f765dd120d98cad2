"""``python -m benchmarks.table FILE.json``: the README's section on speed, written from measured figures."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.row import Result, Verdict

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"


def number(value: float) -> str:
    """Three significant digits, without an exponent from 0.001 on."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def judgement(verdict: Verdict) -> str:
    """Whether the goal was reached, or by how much it was missed."""
    if verdict.reached is None or verdict.measured is None:
        return "not measured"
    if verdict.reached:
        return "reached"
    goal = verdict.goal
    missing = 1 - verdict.measured / goal.value if goal.sign == "≥" else verdict.measured / goal.value - 1
    return f"missed by {100 * missing:.2g} %"


def section(measured: Mapping[str, Any]) -> str:
    """The Markdown of what ``python -m benchmarks`` wrote: one line per goal."""
    machine = measured["machine"]
    lines = [
        "## Speed",
        "",
        "`make bench` measures this, rivals in turns and only after all of them were found to compute the same.",
        f"{machine['processor']}, {machine['capability']}, {machine['threads']} thread; torch {machine['torch']}, "
        f"transformers {machine['transformers']}, Python {machine['python']}. Medians of CPU time over "
        f"{measured['rounds']} rounds; ratios travel between machines better than seconds do.",
        "",
        "| what | figure | goal | measured | |",
        "|---|---|---|---|---|",
    ]
    for entry in measured["rows"]:
        result = Result.from_dict(entry)
        elsewhere = entry.get("machine")
        place = f" ({elsewhere['processor']}, {elsewhere['capability']})" if elsewhere else ""
        for i, verdict in enumerate(result.verdicts):
            goal = verdict.goal
            unit = goal.unit if goal.unit == "×" else f" {goal.unit}"
            figure = goal.figure.removesuffix(f", {goal.unit}")
            found = "" if verdict.measured is None else number(verdict.measured) + unit
            what = result.what + place if i == 0 else ""
            lines.append(f"| {what} | {figure} | {goal.sign} {goal.value:g}{unit} | {found} | {judgement(verdict)} |")
    return "\n".join(lines)


def rewritten(readme: str, text: str) -> str:
    """The README with another section between the two comments.

    Raises
    ------
    ValueError
        The comments are not there, once each.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"the README needs {BEGIN} and {END}, once each, around the section to write")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", readme)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.table", description=__doc__)
    parser.add_argument("file", type=Path, help="what python -m benchmarks wrote")
    file = parser.parse_args(arguments).file
    text = section(json.loads(file.read_text(encoding="utf-8")))
    README.write_text(rewritten(README.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
