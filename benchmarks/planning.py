"""What happens before a model runs: compiling, block masks, pictures, imports."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import interleaved
from leattn import ICLNode, causal, compile_prompt, parallel, viz


def _fan(documents: int, length: int) -> ICLNode:
    head = ICLNode([1])
    return ICLNode([1] * 30, [head, *parallel([[1] * length] * documents, [head])])


def rows(*, quick: bool) -> Iterator[dict[str, Any]]:
    """Compile, BlockMask, pictures and imports, in seconds beside their goals."""
    repeats = 3 if quick else 7
    for count, goal in ((10_000, "≤ 0.05 s"), (100_000, "≤ 0.6 s")):
        targets = {"causal": causal([[1, 2, 3]] * count)[-1], "fan": _fan(count, 3)}
        seconds = interleaved({name: lambda node=node: compile_prompt(node) for name, node in targets.items()}, repeats)
        yield {"what": f"compile {count} nodes", "goal": goal, "seconds": seconds, "ratios": {}}
    prompt = compile_prompt(_fan(4000, 32))
    prompt.mask_mod  # noqa: B018  the table is made once per prompt
    yield {
        "what": f"BlockMask, {len(prompt)} tokens",
        "goal": "≤ 0.1 s",
        "seconds": interleaved({"spans": prompt.block_mask}, repeats),
        "ratios": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for tokens, node in ((4096, _fan(16, 254)), (100_000, _fan(50, 2000))):
            path = Path(folder) / f"{tokens}.png"
            mask = compile_prompt(node)
            seconds = interleaved({"png": lambda mask=mask, path=path: viz.plot_mask(mask, path=path)}, repeats)
            kilobytes = {"kB": path.stat().st_size / 1000}
            yield {"what": f"mask picture, {tokens} tokens", "goal": "≤ 0.3 s, 200 kB", "seconds": seconds, "ratios": kilobytes}
    yield {
        "what": "import leattn",
        "goal": "≤ 1.2 × torch",
        "seconds": {},
        "ratios": {"with / without": _import_ratio(repeats)},
    }


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def _import_ratio(repeats: int) -> float:
    """Wall time, as another process does the work."""
    times: dict[str, list[float]] = {"import torch": [], "import torch, leattn": []}
    for _ in range(repeats):
        for code, taken in times.items():
            started = time.perf_counter()
            _python(code)
            taken.append(time.perf_counter() - started)
    return statistics.median(times["import torch, leattn"]) / statistics.median(times["import torch"])
