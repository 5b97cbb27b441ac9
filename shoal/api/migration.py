"""Requests and answers of changing the model of a vector; see coordinator/migrations.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from shoal.api.filter import FilterField
from shoal.api.models import Strict
from shoal.limits import COMPARED_QUERIES_MAX, GAIN_MAX, SCROLL_LIMIT_MAX, TEXT_BYTES_MAX

__all__ = [
    "CompareQuery",
    "CompareRequest",
    "Compared",
    "DifferentAnswers",
    "DropRequest",
    "MigrateRequest",
    "MigrationStatus",
    "RankingQuality",
    "RollbackRequest",
    "SwitchRequest",
]


class MigrateRequest(Strict):
    """model: as this server's encoders know it; fingerprint: of its weights, where several of that name
    are served. text_field: JSON path of the text in the payload. current_model: of a vector that is not
    bound to one yet. points_per_second: at most, by the background copy; 0: it waits."""

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    fingerprint: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    text_field: Annotated[str, Field(min_length=1, max_length=1024)]
    current_model: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    points_per_second: Annotated[float, Field(ge=0, le=1e6)] | None = None


class SwitchRequest(Strict):
    """allow_missing: also while points lack the new vector; searches do not find these then."""

    allow_missing: bool = False


class RollbackRequest(Strict):
    """Nothing to say."""


class DropRequest(Strict):
    """model: name or fingerprint of the one whose vectors are dropped, to be sure. allow_missing: also
    while points have no other vector; those without a text keep none then."""

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    allow_missing: bool = False


class CompareQuery(Strict):
    """relevant: point id -> gain, for nDCG; points that are not there count 0."""

    text: Annotated[str, Field(min_length=1, max_length=TEXT_BYTES_MAX)]
    filter: FilterField | None = None
    relevant: (
        Annotated[
            dict[str, Annotated[float, Field(ge=0, le=GAIN_MAX)]],
            Field(max_length=SCROLL_LIMIT_MAX),
        ]
        | None
    ) = None


class CompareRequest(Strict):
    """queries: None takes those that this coordinator has seen since the migration began.
    limit: the k of overlap@k and nDCG@k. exact: without an index."""

    queries: (
        Annotated[list[CompareQuery], Field(min_length=1, max_length=COMPARED_QUERIES_MAX)] | None
    ) = None
    limit: Annotated[int, Field(ge=1, le=1_000)] = 10
    exact: bool = False


class MigrationStatus(BaseModel):
    """current: what the vector's name means. other: what is kept beside it. points: that have the
    current vector; done: that have both; left: that lack the other; only_other: that lack the current
    one, and are not found now; answers to a change count nothing. without_text: of these, that cannot
    get it. error: why the copy waits."""

    vector: str
    phase: Literal["preparing", "copying", "dropping"]
    switched: bool
    complete: bool
    current: dict[str, str | int | None]
    other: dict[str, str | int | None]
    text_field: str
    points_per_second_max: float | None = None
    started_at: str
    points: int | None = None
    done: int | None = None
    left: int | None = None
    only_other: int | None = None
    without_text: int | None = None
    points_per_second: float | None = None
    seconds_left: float | None = None
    copied_by: str | None = None
    error: str | None = None
    recorded_queries: int


class RankingQuality(BaseModel):
    """nDCG@limit: means with 95 % bootstrap intervals over the judged queries. gain: other - current,
    query by query."""

    queries: int
    current: dict[str, float]
    other: dict[str, float]
    gain: dict[str, float]


class DifferentAnswers(BaseModel):
    text: str
    overlap: float
    current: list[int | str]
    other: list[int | str]


class Compared(BaseModel):
    """overlap: share of the first `limit` points that both models give, mean with a 95 % bootstrap
    interval. left: points that still lack the other vector, so that its answers cannot hold them."""

    current: str
    other: str
    limit: int
    queries: int
    source: Literal["given", "recorded"]
    left: int
    overlap: dict[str, float]
    ndcg: RankingQuality | None = None
    most_different: list[DifferentAnswers]
