"""Run one call on both sides and say how the answers differ, or "" when they are equal.

What counts as equal:
- payloads: the same JSON value, types included (1, 1.0 and true are three things);
- vectors: the same within float32 rounding;
- scrolls, retrieves, counts: the same ids in the same order;
- searches: see `_hits_differ`. Points with equal scores may stand in any order;
- refusals: both sides refuse. Texts and statuses are not compared here, but 5xx is never right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qdrant_client import QdrantClient
from qdrant_client import models as m
from qdrant_client.http.exceptions import UnexpectedResponse
from world import Call

__all__ = ["Answer", "Recall", "differ", "perform", "same_contents"]

ORACLE_LIMIT = 100_000
_EPSILON = 1e-4  # absolute and relative; sums of a few dozen float32 products stay far below


@dataclass(frozen=True)
class Answer:
    value: Any = None
    refused: str | None = None  # why; None = it was done

    def __str__(self) -> str:
        return f"refused: {self.refused}" if self.refused is not None else repr(self.value)


@dataclass
class Recall:
    """How many of the true best points the approximate searches of a run have found."""

    wanted: int = 0
    found: int = 0

    @property
    def ratio(self) -> float:
        return self.found / self.wanted if self.wanted else 1.0


def perform(client: QdrantClient, name: str, call: Call) -> Answer:
    """The answer of one side. What is neither an answer nor a refusal is raised."""
    try:
        return Answer(getattr(client, call.method)(name, **call.arguments))
    except UnexpectedResponse as error:
        if error.status_code is None or error.status_code >= 500:
            raise
        return Answer(refused=f"{error.status_code} {error.content!r}")
    except (ValueError, KeyError) as error:  # what the in-process mode raises
        return Answer(refused=f"{type(error).__name__}: {error}")


def differ(
    ours: Answer, theirs: Answer, call: Call, oracle: QdrantClient, name: str, recall: Recall | None
) -> str:
    """recall: given when this search may be approximate; its finds are counted there."""
    if (ours.refused is None) != (theirs.refused is None):
        return f"ours {ours}\noracle {theirs}"
    if ours.refused is not None or call.writes:
        return ""
    if call.method == "count":
        same = ours.value.count == theirs.value.count
        return "" if same else f"count: ours {ours.value.count}, oracle {theirs.value.count}"
    if call.method == "scroll":
        (our_page, our_next), (their_page, their_next) = ours.value, theirs.value
        if our_next != their_next:
            return f"next page: ours {our_next!r}, oracle {their_next!r}"
        return _records_differ(our_page, their_page)
    if call.method == "retrieve":
        return _records_differ(ours.value, theirs.value)
    if call.arguments["query"] is None:
        return _records_differ(ours.value.points, theirs.value.points)
    return _hits_differ(ours.value.points, theirs.value.points, call, oracle, name, recall)


def same_contents(ours: QdrantClient, oracle: QdrantClient, name: str) -> str:
    """Compare every point with all that it has, page by page, and the total."""
    offset: Any = None
    while True:
        arguments = {"limit": 64, "offset": offset, "with_payload": True, "with_vectors": True}
        our_page, our_next = ours.scroll(name, **arguments)
        their_page, their_next = oracle.scroll(name, **arguments)
        if problem := _records_differ(our_page, their_page):
            return problem
        if our_next != their_next:
            return f"next page after {offset!r}: ours {our_next!r}, oracle {their_next!r}"
        if our_next is None:
            break
        offset = our_next
    counted, expected = ours.count(name).count, oracle.count(name).count
    return "" if counted == expected else f"count: ours {counted}, oracle {expected}"


def _records_differ(ours: list[Any], theirs: list[Any]) -> str:
    our_ids, their_ids = [r.id for r in ours], [r.id for r in theirs]
    if our_ids != their_ids:
        return f"ids: ours {our_ids}\noracle {their_ids}"
    for our, their in zip(ours, theirs, strict=True):
        if problem := _point_differs(our, their):
            return problem
    return ""


def _point_differs(ours: Any, theirs: Any) -> str:
    if not same_json(ours.payload, theirs.payload):
        return f"payload of {ours.id!r}: ours {ours.payload!r}\noracle {theirs.payload!r}"
    if not _same_vectors(ours.vector, theirs.vector):
        return f"vectors of {ours.id!r}: ours {ours.vector!r}\noracle {theirs.vector!r}"
    return ""


def _hits_differ(
    ours: list[Any],
    theirs: list[Any],
    call: Call,
    oracle: QdrantClient,
    name: str,
    recall: Recall | None,
) -> str:
    """Each hit must be a match with the score, payload and vectors that the oracle gives it in its
    full ranking; no hit twice; as many hits as the oracle; best first. An exact search must also
    have the oracle's score at every rank, which leaves freedom only among equal scores."""
    everything = {**call.arguments, "limit": ORACLE_LIMIT, "offset": None, "score_threshold": None}
    ranking = {hit.id: hit for hit in oracle.query_points(name, **everything).points}
    ids = [hit.id for hit in ours]
    if len(set(ids)) != len(ids):
        return f"a point twice in one answer: {ids}"
    if len(ours) != len(theirs):
        return f"{len(ours)} hits, oracle {len(theirs)}: ours {_brief(ours)}\n{_brief(theirs)}"
    for hit in ours:
        if hit.id not in ranking:
            return f"{hit.id!r} does not match at all; ours {_brief(ours)}"
        if not _close(hit.score, ranking[hit.id].score):
            return f"score of {hit.id!r}: ours {hit.score}, oracle {ranking[hit.id].score}"
        if problem := _point_differs(hit, ranking[hit.id]):
            return problem
    scores = [hit.score for hit in ours]
    if scores != sorted(scores) and scores != sorted(scores, reverse=True):
        return f"not best first: {scores}"
    if recall is None:
        pairs = zip(ours, theirs, strict=True)
        if not all(_close(our.score, their.score) for our, their in pairs):
            return f"scores: ours {_brief(ours)}\noracle {_brief(theirs)}"
        return ""
    recall.wanted += len(theirs)
    good = [their.score for their in theirs]
    recall.found += sum(any(_close(score, g) for g in good) for score in scores)
    return ""


def _brief(hits: list[Any]) -> list[tuple[Any, float]]:
    return [(hit.id, round(hit.score, 5)) for hit in hits]


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_EPSILON, abs_tol=_EPSILON)


def same_json(a: Any, b: Any) -> bool:
    """Equal JSON values, with the types that Python's == mixes up kept apart."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return bool(a == b)


def _same_vectors(a: Any, b: Any) -> bool:
    if isinstance(a, m.SparseVector) and isinstance(b, m.SparseVector):
        return a.indices == b.indices and _same_vectors(a.values, b.values)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_vectors(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same_vectors, a, b))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return _close(a, b)
    return a is None and b is None
