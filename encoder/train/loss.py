"""InfoNCE over the whole batch, whatever number of processes holds it.

    rank 0: q0 q1 | p0 p1 | n..   ──┐
    rank 1: q2 q3 | p2 p3 | n..   ──┴─ all_gather ─▶ Q (B, d), D = [P; N] (B + B·h, d)

                 loss = mean_i −log softmax(scale · Q_i D^T)[i]

Every rank computes the loss of all B queries and keeps the gradient of its own rows. Averaging the
parameters' gradients over ranks, as DDP and FSDP do, would then make them `ranks` times too small, so
the rows' gradient is multiplied by their number. No gradient travels through the gather, and the model
may be run a second time, part by part, to carry it back (GradCache; Gao et al. 2021): that is how a
pipeline, or a batch larger than the memory, sees the negatives of the whole batch.

InfoNCE as in van den Oord et al. 2018, negatives from the batch as in Henderson et al. 2017.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from shoal.errors import must

__all__ = ["BatchShape", "Gradient", "blocked_candidates", "gradient_of_rows", "info_nce"]


@dataclass(frozen=True, slots=True)
class BatchShape:
    """pairs and negatives of one process. Rows: queries, positives, then negatives pair by pair."""

    pairs: int
    negatives_per_pair: int = 0

    @property
    def rows(self) -> int:
        return self.pairs * (2 + self.negatives_per_pair)


@dataclass(frozen=True, slots=True)
class Gradient:
    """loss: of the whole batch. rows: (rows, dim) float32, d loss / d own rows, times the ranks."""

    loss: torch.Tensor
    rows: torch.Tensor


def info_nce(
    queries: torch.Tensor,
    documents: torch.Tensor,
    blocked: torch.Tensor,
    *,
    scale: float,
    symmetric: bool = False,
) -> torch.Tensor:
    """queries (B, dim), documents (m, dim), m >= B, rows of length 1 -> the mean loss, a scalar.

    documents[i] is the positive of queries[i]; all the others are its negatives, but those that
    `blocked` (B, m) bool leaves out.
    scale       1 / temperature. Cosines differ by tenths: without it the softmax would be flat.
    symmetric   the mean of this and of the loss of finding the query for its positive.
    """
    logits = (scale * (queries @ documents.T)).masked_fill(blocked, float("-inf"))
    targets = torch.arange(len(queries), device=queries.device)
    loss = cross_entropy(logits, targets)
    if symmetric:
        loss = (loss + cross_entropy(logits[:, : len(queries)].T, targets)) / 2
    return loss


def blocked_candidates(
    queries: Sequence[str],
    documents: Sequence[str],
    positives_of: Mapping[str, AbstractSet[str]],
) -> NDArray[np.bool_]:
    """(B, m) bool: candidates that are no negatives of a query, because they are known to fit it:
    another of its positives, or the same text once more. documents[i] is the positive of queries[i]
    and never blocked for it."""
    columns: dict[str, list[int]] = {}
    for column, text in enumerate(documents):
        columns.setdefault(text, []).append(column)
    blocked = np.zeros((len(queries), len(documents)), bool)
    for row, query in enumerate(queries):
        for text in positives_of.get(query, frozenset()) | {documents[row]}:
            blocked[row, columns.get(text, [])] = True
        blocked[row, row] = False
    return blocked


def gradient_of_rows(
    own: torch.Tensor,
    shape: BatchShape,
    blocked: torch.Tensor,
    *,
    scale: float,
    symmetric: bool,
    group: dist.ProcessGroup | None,
) -> Gradient:
    """The loss over the vectors of all ranks of `group`, and its gradient on this rank's own.

    own      (rows, dim) float32, detached, in the order of BatchShape; the same shape on all ranks.
    blocked  (B, m) bool for the whole batch: pairs of rank 0, then of rank 1, ...; documents are all
             positives in that order, then all negatives.
    group    None: this process is alone, or takes only its own negatives.
    Collective over the group: one all-gather of rows x dim x 4 bytes.
    """
    must(len(own) == shape.rows, f"{len(own)} rows, {shape.rows} announced")
    ranks = 1 if group is None else group.size()
    every = own
    if group is not None and ranks > 1:
        parts = [torch.empty_like(own) for _ in range(ranks)]
        dist.all_gather(parts, own.contiguous(), group=group)
        every = torch.cat(parts)
    with torch.enable_grad():
        every = every.detach().requires_grad_()
        by_rank = every.view(ranks, shape.rows, -1)
        queries = by_rank[:, : shape.pairs].flatten(0, 1)
        positives = by_rank[:, shape.pairs : 2 * shape.pairs].flatten(0, 1)
        negatives = by_rank[:, 2 * shape.pairs :].flatten(0, 1)
        documents = torch.cat([positives, negatives])
        loss = info_nce(queries, documents, blocked, scale=scale, symmetric=symmetric)
        (gradient,) = torch.autograd.grad(loss, every)
    rank = 0 if group is None else group.rank()
    rows = gradient.view(ranks, shape.rows, -1)[rank] * ranks
    return Gradient(loss.detach(), rows)
