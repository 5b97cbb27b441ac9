"""How two rankings compare, how good one is by graded judgments, and how sure we are. Pure.

nDCG as in Järvelin and Kekäläinen 2002 with the gain as given and discount log2(rank + 1); the interval
is the percentile bootstrap (Efron and Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.errors import must

__all__ = ["Interval", "bootstrap_mean", "ndcg", "overlap"]

RESAMPLES = 10_000
BLOCK_RESAMPLES = 256  # bounds the memory: that many draws of all values at once


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def bootstrap_mean(values: NDArray[np.float64], seed: int) -> Interval:
    """The mean of (n,) values, n >= 1, and the interval in which 95 % of the means of RESAMPLES samples
    of n values, drawn with replacement, lie. The same seed gives the same interval."""
    must(len(values) > 0, "no values, no mean")
    dice = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, BLOCK_RESAMPLES):
        count = min(BLOCK_RESAMPLES, RESAMPLES - start)
        drawn = dice.integers(0, len(values), (count, len(values)))
        means[start : start + count] = values[drawn].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def overlap(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of the longer list that both have, whatever the order: overlap@k for lists of k. Two empty
    lists agree: 1."""
    longer = max(len(one), len(other))
    return len(set(one) & set(other)) / longer if longer else 1.0


def ndcg(found: Sequence[int], gains: Mapping[int, float], k: int) -> float:
    """Of the first k of `found`, best first. gains: what is relevant, each above 0; others count 0."""
    must(len(gains) > 0, "without a relevant point there is no nDCG")
    ideal = sorted(gains.values(), reverse=True)[:k]
    return _discounted([gains.get(key, 0.0) for key in found[:k]]) / _discounted(ideal)


def _discounted(gains: Sequence[float]) -> float:
    return float((np.array(gains) / np.log2(np.arange(len(gains)) + 2.0)).sum())
