"""95 % intervals: of shares, of means, and of differences between two measured on the same things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Z95 = 1.959963984540054
RESAMPLES = 1000


@dataclass(frozen=True)
class Summary:
    """A mean, the ends of its 95 % interval, and how many things it is of."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def summary(values: Sequence[float], *, is_share: bool) -> Summary:
    """Of numbers: Wilson's interval of a share, of which each is 0 or 1; else that of the bootstrap.

    Examples
    --------
    >>> print(summary([1, 1, 1, 1, 1, 1, 1, 1, 1, 0], is_share=True))
    0.900 [0.596, 0.982]
    """
    given = np.asarray(values, dtype=np.float64)
    mean = float(given.mean())
    low, high = wilson(mean, len(given)) if is_share else bootstrap(given)
    return Summary(mean, low, high, len(given))


def difference(values: Sequence[float], others: Sequence[float]) -> Summary:
    """Of two methods on the same things, in the same order: the mean of the differences, and their bootstrap interval."""
    given = np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    low, high = bootstrap(given)
    return Summary(float(given.mean()), low, high, len(given))


def wilson(mean: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; of means of several draws in 0…1 it is, if anything, too wide.

    Examples
    --------
    >>> [round(end, 3) for end in wilson(0.9, 10)]
    [0.596, 0.982]
    """
    centre = (mean + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 * float(np.sqrt(mean * (1 - mean) / count + Z95**2 / (4 * count**2))) / (1 + Z95**2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 % of the means of resamples, drawn with a fixed seed."""
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)
