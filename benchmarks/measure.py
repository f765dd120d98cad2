"""Time, memory and agreement. Rivals take turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Setup = Callable[..., Callable[[], Any]]
"""A function of a module that prepares something and returns what is to be measured."""


class Disagreement(AssertionError):
    """Two rivals compute different things, so that comparing their speed says nothing."""


@dataclass(frozen=True)
class Times:
    """CPU seconds of each rival, round by round."""

    rounds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def medians(self) -> dict[str, float]:
        return {name: self.median(name) for name in self.rounds}

    def ratio(self, rival: str, ours: str) -> float:
        """How many times as long the rival takes: the median over rounds, each against the same round's own."""
        return statistics.median(a / b for a, b in zip(self.rounds[rival], self.rounds[ours], strict=True))

    def without(self, name: str, part: str) -> list[float]:
        """Round by round, the time of a rival less that of a part of it, which was measured as a rival of its own."""
        return [a - b for a, b in zip(self.rounds[name], self.rounds[part], strict=True)]


def interleaved(
    rivals: Mapping[str, Callable[[], Any]], count: int, *, clock: Callable[[], float] = time.process_time
) -> Times:
    """Seconds of each rival over ``count`` rounds, in turns and in both orders, after one round that does not count."""
    rounds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(count + 1):
        for name in list(rivals) if number % 2 else reversed(rivals):
            started = clock()
            rivals[name]()
            if number:
                rounds[name].append(clock() - started)
    return Times(rounds)


def check_close(what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Refuse to time what computes something else.

    Raises
    ------
    Disagreement
        Another shape, a value that is no number, or a difference above ``tolerance``.
    """
    if found.shape != expected.shape:
        raise Disagreement(f"{what} has shape {list(found.shape)}, the reference {list(expected.shape)}; nothing was timed")
    difference = float((found - expected).abs().max())
    if not difference <= tolerance:
        raise Disagreement(f"{what} differs from the reference by {difference:.2g}, more than {tolerance:g}; nothing was timed")


# Memory: a fresh process per measurement, whose peak is set back to what it holds right before the call.

QUIET_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc gives freed memory back at once, so that what was freed before does not hide what is taken later."""


def peak_megabytes(setup: Setup, *args: int) -> float:
    """What calling ``setup(*args)()`` adds to the resident memory of a fresh process at its peak, in MB (10⁶ bytes).

    Raises
    ------
    RuntimeError
        The process failed; its last line is in the message. Linux only: the peak is read from ``/proc``.
    """
    command = [sys.executable, "-m", "benchmarks.measure", setup.__module__, setup.__name__, json.dumps(args)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env={**os.environ, **QUIET_HEAP}, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {setup.__name__}{args} failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.splitlines()[-1])


def _resident(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def _measure_peak(module: str, name: str, args: list[int]) -> float:
    torch.set_num_threads(1)
    run = getattr(importlib.import_module(module), name)(*args)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak back: proc(5)
    before = _resident("VmRSS")
    kept = run()
    peak = _resident("VmHWM")
    del kept
    return peak - before


if __name__ == "__main__":
    print(_measure_peak(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
