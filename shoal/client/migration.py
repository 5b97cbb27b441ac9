"""Changing the model of a vector of a live collection: `client.migration(collection, vector)`.

What happens there, and when to do what, is told in docs/encoder.md, "Changing the model".
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeAlias

from google.protobuf.message import Message

from shoal.client import encode
from shoal.client.core import Core
from shoal.client.encode import Filter
from shoal.client.values import PointId
from shoal.errors import BadRequest, TimedOut
from shoal.ids import PointIds, format_id
from shoal.ranking import Interval
from shoal.v1 import migrations_pb2 as pb
from shoal.wire import ops_pb2 as wire

__all__ = [
    "AsyncMigration",
    "CompareQuery",
    "Compared",
    "DifferentAnswers",
    "Interval",
    "MigratedModel",
    "MigrationStatus",
    "RankingQuality",
]

_LOOK_S_MIN, _LOOK_S_MAX = 0.05, 2.0  # of `wait`, between two looks; each counts the collection

Phase: TypeAlias = Literal["preparing", "copying", "dropping"]

_PHASES: dict[int, Phase] = {
    pb.MIGRATION_PHASE_PREPARING: "preparing",
    pb.MIGRATION_PHASE_COPYING: "copying",
    pb.MIGRATION_PHASE_DROPPING: "dropping",
}
_MAY_BE_UNSET = (
    *("points_per_second_max", "points", "done", "left", "only_other", "without_text"),
    *("points_per_second", "seconds_left", "copied_by", "error"),
)


# -- in and out -----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class CompareQuery:
    """relevant: point id -> gain, for nDCG; points that are not among them count 0."""

    text: str
    filter: Filter | None = None
    relevant: Mapping[PointId, float] | None = None


@dataclass(frozen=True, slots=True)
class MigratedModel:
    """size: numbers of its vectors. fingerprint: of its weights."""

    model: str
    fingerprint: str | None
    size: int


@dataclass(frozen=True, slots=True)
class MigrationStatus:
    """How far it is. Answers to a change count nothing: from `points` on everything is None there.

    current, other  what the vector's name means, and what is kept beside it.
    complete        the other model may be searched by name.
    recorded_queries  that the server could compare with.
    points          that have the current vector. done: that have both. left: that lack the other.
    only_other      that lack the current one, and are not found now.
    without_text    of those that lack one: that cannot get it.
    points_per_second  lately. error: why the copy waits.
    """

    vector: str
    phase: Phase
    switched: bool
    complete: bool
    current: MigratedModel
    other: MigratedModel
    text_field: str
    started_at: datetime
    recorded_queries: int
    points_per_second_max: float | None = None
    points: int | None = None
    done: int | None = None
    left: int | None = None
    only_other: int | None = None
    without_text: int | None = None
    points_per_second: float | None = None
    seconds_left: float | None = None
    copied_by: str | None = None
    error: str | None = None

    @property
    def copied(self) -> bool:
        """Every point that has a text has the vectors of both models."""
        if self.phase != "copying" or self.left is None:
            return False
        # Before the first switch nobody makes the current vector of points that lack it.
        lacking = self.left + (self.only_other or 0 if self.complete else 0)
        return lacking <= (self.without_text or 0)


@dataclass(frozen=True, slots=True)
class RankingQuality:
    """nDCG@limit over the judged queries. gain: other - current, query by query."""

    queries: int
    current: Interval
    other: Interval
    gain: Interval


@dataclass(frozen=True, slots=True)
class DifferentAnswers:
    """current, other: ids, best first."""

    text: str
    overlap: float
    current: Sequence[PointId]
    other: Sequence[PointId]


@dataclass(frozen=True, slots=True)
class Compared:
    """overlap: share of the first `limit` points that both models give. left: points that still lack
    the other vector, so that its answers cannot hold them. ndcg: None without judgments.
    most_different: up to ten, the least overlap first."""

    current: str
    other: str
    limit: int
    queries: int
    source: Literal["given", "recorded"]
    left: int
    overlap: Interval
    ndcg: RankingQuality | None
    most_different: Sequence[DifferentAnswers]


# -- the handle -----------------------------------------------------------------------------------
class AsyncMigration:
    """The change of the model of one vector; `AsyncClient.migration` makes it. It is a name, and
    holds nothing: all state is the server's, so any client may go on with what another began.

        change = client.migration("notes")
        await change.start("mine", "text")
        await change.wait(timeout_s=3600)
        print(await change.compare())
        await change.switch()
        await change.drop("all-MiniLM-L6-v2")  # until then: rollback

    **Retries.** `status`, `wait` and `compare` are repeated as reads are. The others are repeated only
    when they have certainly not happened: somebody else may have gone on in between, and would find
    that undone. After an error with `maybe_applied` ask `status`.

    All but `status` and `wait` need the key that may write.
    """

    def __init__(self, core: Core, collection: str, vector: str) -> None:
        self._core, self._collection, self._vector = core, collection, vector

    async def start(
        self,
        model: str,
        text_field: str,
        *,
        fingerprint: str | None = None,
        current_model: str | None = None,
        points_per_second: float | None = None,
        timeout_s: float | None = None,
    ) -> MigrationStatus:
        """Begin: from now on writes bring vectors of both models, and a copy in the background makes
        those that are missing. Of a change to that model that is under way: change its rate, and
        nothing else.

        model              as the server's encoders know it. fingerprint: of its weights, where several
                           of that name are served.
        text_field         JSON path, in the payload, of the text to make vectors of.
        current_model      of a vector that is not bound to a model yet.
        points_per_second  at most, by the copy. 0: it waits; math.inf: no bound. None: as it is, which
                           is no bound at the beginning.

        Raises BadRequest for what cannot be changed, NotFound without such a collection.
        """
        request = pb.StartMigrationRequest(
            collection=self._collection,
            vector=self._vector,
            model=model,
            fingerprint=fingerprint,
            text_field=text_field,
            current_model=current_model,
            points_per_second=points_per_second,
        )
        return await self._changed("Start", request, timeout_s)

    async def status(self, *, timeout_s: float | None = None) -> MigrationStatus:
        """How far it is, counted now. Raises NotFound when none is under way, or it is over."""
        request = pb.MigrationStatusRequest(collection=self._collection, vector=self._vector)
        answer = pb.MigrationStatus
        return _status(await self._core.ask("Migrations/Status", request, answer, timeout_s))

    async def wait(self, *, timeout_s: float) -> MigrationStatus:
        """Until every point that has a text has the vectors of both models (`status.copied`). After
        `start` for a switch, after `switch` for a drop.

        Raises TimedOut, which says how far it is and leaves it going on; NotFound when it is over.
        """
        clock = asyncio.get_running_loop().time
        deadline, pause_s = clock() + timeout_s, _LOOK_S_MIN
        while True:
            left_s = max(0.001, deadline - clock())
            status = await self.status(timeout_s=min(self._core.timeout_s, left_s))
            if status.copied:
                return status
            if clock() + pause_s >= deadline:
                why = f": {status.error}" if status.error else ""
                lacking = (status.left or 0) + (status.only_other or 0)
                error = TimedOut(
                    f"Timeout: {timeout_s:g} s over, and {lacking} points of `{self._collection}` still "
                    f"lack the vector of one of the models ({status.phase}; it goes on){why}"
                )
                error.maybe_applied = False
                raise error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_S_MAX)

    async def compare(
        self,
        queries: Sequence[CompareQuery | str] | None = None,
        *,
        limit: int = 10,
        exact: bool = False,
        timeout_s: float | None = None,
    ) -> Compared:
        """Ask both models the same, and compare the first `limit` points of their answers.

        queries  texts, or with filters and judgments. None: text queries that this server has seen
                 since the start. exact: do not use the index.
        Cost     two embeddings and two searches a query. One comparison at a time: Busy.
        """
        if limit < 1:
            raise BadRequest("Wrong input: limit must be at least 1")
        request = pb.CompareModelsRequest(
            collection=self._collection,
            vector=self._vector,
            given=None if queries is None else _queries(queries),
            limit=limit,
            exact=exact,
        )
        answer = pb.ComparedModels
        return _compared(await self._core.ask("Migrations/Compare", request, answer, timeout_s))

    async def switch(
        self, *, allow_missing: bool = False, timeout_s: float | None = None
    ) -> MigrationStatus:
        """From now on the vector's name means the other model. Raises BadRequest while points lack its
        vector, unless `allow_missing`: searches do not find these then."""
        request = pb.SwitchModelRequest(
            collection=self._collection, vector=self._vector, allow_missing=allow_missing
        )
        return await self._changed("Switch", request, timeout_s)

    async def rollback(self, *, timeout_s: float | None = None) -> MigrationStatus:
        """The vector's name means the model that it had before the switch."""
        request = pb.RollbackModelRequest(collection=self._collection, vector=self._vector)
        return await self._changed("Rollback", request, timeout_s)

    async def drop(
        self, model: str, *, allow_missing: bool = False, timeout_s: float | None = None
    ) -> MigrationStatus:
        """End it: forget the vectors of `model` (name or fingerprint), which must be the one that is
        not in use. When they are gone, `status` raises NotFound. Raises BadRequest while points have no
        other vector, unless `allow_missing`: those without a text keep none then."""
        request = pb.DropModelRequest(
            collection=self._collection,
            vector=self._vector,
            model=model,
            allow_missing=allow_missing,
        )
        return await self._changed("Drop", request, timeout_s)

    async def _changed(
        self, action: str, request: Message, timeout_s: float | None
    ) -> MigrationStatus:
        answer = pb.MigrationStatus
        return _status(await self._core.change(f"Migrations/{action}", request, answer, timeout_s))


# -- messages -------------------------------------------------------------------------------------
def _queries(queries: Sequence[CompareQuery | str]) -> pb.CompareModelsRequest.Queries:
    message = pb.CompareModelsRequest.Queries()
    for given in queries:
        query = CompareQuery(given) if isinstance(given, str) else given
        relevant = query.relevant or {}
        message.queries.add(
            text=query.text,
            filter=encode.filter_bytes(query.filter),
            relevant=encode.wire_ids(list(relevant)),
            gains=relevant.values(),
        )
    return message


def _status(message: pb.MigrationStatus) -> MigrationStatus:
    given: Any = {name: getattr(message, name) for name in _MAY_BE_UNSET if message.HasField(name)}
    return MigrationStatus(
        vector=message.vector,
        phase=_PHASES.get(message.phase, "preparing"),  # a newer server may have more
        switched=message.switched,
        complete=message.complete,
        current=_model(message.current),
        other=_model(message.other),
        text_field=message.text_field,
        started_at=datetime.fromisoformat(message.started_at),
        recorded_queries=message.recorded_queries,
        **given,
    )


def _model(message: pb.MigratedModel) -> MigratedModel:
    fingerprint = message.fingerprint if message.HasField("fingerprint") else None
    return MigratedModel(message.model, fingerprint, message.size)


def _compared(message: pb.ComparedModels) -> Compared:
    quality = message.ndcg
    return Compared(
        current=message.current,
        other=message.other,
        limit=message.limit,
        queries=message.queries,
        source="given" if message.source == pb.QUERY_SOURCE_GIVEN else "recorded",
        left=message.left,
        overlap=_interval(message.overlap),
        ndcg=RankingQuality(
            quality.queries,
            _interval(quality.current),
            _interval(quality.other),
            _interval(quality.gain),
        )
        if message.HasField("ndcg")
        else None,
        most_different=[
            DifferentAnswers(one.text, one.overlap, _ids(one.current), _ids(one.other))
            for one in message.most_different
        ],
    )


def _interval(message: pb.Interval) -> Interval:
    return Interval(message.mean, message.low, message.high)


def _ids(message: wire.PointIds) -> list[PointId]:
    keys = PointIds.from_wire(message).keys()
    return [format_id(key) for key in keys]
