"""``python -m benchmarks [--quick] [--out FILE.json]``: a table of ratios, and JSON with machine and versions."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import leattn
from benchmarks import attention, planning


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    seconds = ", ".join(f"{name} {1000 * value:.1f}" for name, value in row["seconds"].items())
    ratios = ", ".join(f"{name} {value:.2f}" for name, value in row["ratios"].items())
    return row["what"], row["goal"], seconds, ratios


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, without the longest rows")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "leattn": leattn.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{'':26}{'goal':18}{'ms (median CPU time)':64}ratios")
    rows = []
    for row in (*planning.rows(quick=args.quick), *attention.rows(quick=args.quick)):
        rows.append(row)
        what, goal, seconds, ratios = _cells(row)
        print(f"{what:26}{goal:18}{seconds:64}{ratios}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
