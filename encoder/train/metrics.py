"""How good a model's rankings are: recall@k, nDCG@k, MRR. Pure.

Judgments are binary: a document is relevant to a query or not. Every figure is kept per query, so that
two models are compared on the same queries and the interval is that of the difference.

nDCG as in Järvelin and Kekäläinen 2002 with gain 1 and discount log2(rank + 1); the interval is the
percentile bootstrap over queries (Efron and Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.errors import must
from shoal.ranking import Interval, bootstrap_mean

__all__ = ["Quality", "quality", "ranks_of_relevant"]

K = 10
BLOCK_QUERIES = 256  # rows of scores at once


@dataclass(frozen=True, slots=True, eq=False)
class Quality:
    """(n,) float64 each, one figure per query."""

    recall_at_10: NDArray[np.float64]
    ndcg_at_10: NDArray[np.float64]
    reciprocal_rank: NDArray[np.float64]

    def means(self) -> dict[str, float]:
        return {
            "recall@10": float(self.recall_at_10.mean()),
            "ndcg@10": float(self.ndcg_at_10.mean()),
            "mrr": float(self.reciprocal_rank.mean()),
        }

    def intervals(self, seed: int) -> dict[str, Interval]:
        return {
            "recall@10": bootstrap_mean(self.recall_at_10, seed),
            "ndcg@10": bootstrap_mean(self.ndcg_at_10, seed),
            "mrr": bootstrap_mean(self.reciprocal_rank, seed),
        }


def ranks_of_relevant(
    queries: NDArray[np.float32],
    documents: NDArray[np.float32],
    relevant: Sequence[AbstractSet[int]],
) -> list[NDArray[np.int64]]:
    """Where the relevant documents stand when all are sorted by inner product.

    queries    (n, dim), documents (m, dim), rows of length 1.
    relevant   for each query the positions of its documents, at least one.
    Returns    for each query their ranks, ascending from 0. A document that scores the same as a
               relevant one counts as before it: a model that gives one vector to all texts is no good.
    Cost       n x m x dim multiplications; exact.
    """
    must(len(queries) == len(relevant), "every query needs its judgments")
    ranks: list[NDArray[np.int64]] = []
    for start in range(0, len(queries), BLOCK_QUERIES):
        scores = queries[start : start + BLOCK_QUERIES] @ documents.T
        for row, wanted in zip(scores, relevant[start : start + BLOCK_QUERIES], strict=True):
            places = np.fromiter(sorted(wanted), np.int64)
            must(len(places) > 0, "a query without a relevant document cannot be judged")
            others = np.ones(len(row), bool)
            others[places] = False
            own = np.sort(row[places])[::-1]
            ahead = (row[others][None, :] >= own[:, None]).sum(1)
            ranks.append(ahead.astype(np.int64) + np.arange(len(own)))
    return ranks


def quality(ranks: Sequence[NDArray[np.int64]]) -> Quality:
    """ranks: of each query's relevant documents, ascending from 0."""
    recall, ndcg, reciprocal = (np.zeros(len(ranks)) for _ in range(3))
    for row, places in enumerate(ranks):
        found = places[places < K]
        ideal = min(K, len(places))
        recall[row] = len(found) / ideal
        ndcg[row] = _gain(found) / _gain(np.arange(ideal))
        reciprocal[row] = 1.0 / (places[0] + 1)
    return Quality(recall, ndcg, reciprocal)


def _gain(places: NDArray[np.int64]) -> float:
    return float((1.0 / np.log2(places + 2.0)).sum())
