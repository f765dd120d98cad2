"""Things on a line, kept apart: labels beside an axis, boxes in a layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from leattn.viz.style import FloatArray


def spread(wanted: Sequence[float] | FloatArray, gaps: Sequence[float] | FloatArray) -> FloatArray:
    """Positions as near to ``wanted`` as their order and the gaps allow, in least squares.

    Parameters
    ----------
    wanted
        ``[n]``, where each thing would like to be. The order of the things is that of the list.
    gaps
        ``[n − 1]``, the least distance from each to the next.

    Examples
    --------
    >>> spread([0.0, 0.0, 5.0], [1.0, 1.0]).tolist()
    [-0.5, 0.5, 5.0]
    """
    shift = np.concatenate([[0.0], np.cumsum(gaps)])
    # Less the gaps, positions need only not descend: isotonic regression, pooling neighbours that would.
    means: list[float] = []
    counts: list[int] = []
    for value in np.asarray(wanted, dtype=np.float64) - shift[: len(wanted)]:
        means.append(float(value))
        counts.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            mean, count = means.pop(), counts.pop()
            means[-1] = (means[-1] * counts[-1] + mean * count) / (counts[-1] + count)
            counts[-1] += count
    placed: FloatArray = np.repeat(means, counts) + shift[: len(wanted)]
    return placed


def spread_within(wanted: FloatArray, gap: float, low: float, high: float) -> FloatArray:
    """Numbers spread with one gap for all and nothing outside ``low`` … ``high``, as far as there is room."""
    placed = spread(wanted, np.full(max(len(wanted) - 1, 0), gap))
    last = low + gap * (len(wanted) - 1)
    if last >= high:
        return low + (high - low) * np.arange(len(wanted)) / max(len(wanted) - 1, 1)
    # Clipping a solution to a band (less the gaps) keeps it optimal in that band.
    steps = gap * np.arange(len(wanted))
    inside: FloatArray = np.clip(placed - steps, low, high - gap * (len(wanted) - 1)) + steps
    return inside
