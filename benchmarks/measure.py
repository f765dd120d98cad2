"""Interleaved medians: rivals take turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleaved(rivals: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each rival over ``repeats`` rounds, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for round_number in range(repeats + 1):
        for name, run in rivals.items():
            started = time.process_time()
            run()
            if round_number:
                times[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}
