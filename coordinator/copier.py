"""The background half of a migration: tell the shards, make the vectors that are missing, clean up.

    preparing   AlterVectors(add) to every shard ─▶ record: copying
    copying     each shard: points that have one vector and lack the other ─▶ their text ─▶ encoder
                ─▶ UpdateVectors(if_versions), again and again until the migration ends
    dropping    a moment for requests under way ─▶ AlterVectors(drop) ─▶ record: over

One coordinator of a cluster does it for all (MIGRATIONS_LEADER_KEY). Nothing depends on its being the
only one: every step may be done twice, and a point that a client has changed since it was read is left
for the next look, by its version. After a switch the copy looks both ways: a coordinator that heard of
the migration late may have written one vector only.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from coordinator.catalog import Catalog, Collection
from coordinator.generations import Pair, Stored, pair_of, text_of
from coordinator.texts import Texts, second_block
from shoal import limits
from shoal.api.filter import Filter, parse_filter
from shoal.batch import PointBatch
from shoal.errors import Busy, NotFound, ShoalError, VectorsChanged
from shoal.ids import UUID_BIT
from shoal.metadata.contract import Compare, MetadataStore
from shoal.metadata.leadership import Leadership
from shoal.metadata.schema import (
    CollectionRecord,
    Migration,
    MigrationPhase,
    MigrationProgress,
    migration_key,
    named_vectors,
    stored_name,
    vector_spec,
)
from shoal.storage_api import AlterVectors, Read, Scroll, ShardKey, Storage, UpdateVectors
from shoal.telemetry import logger

__all__ = ["Advance", "Copier", "Progress", "following", "missing"]

_PAGE_FIRST = 16
_FULL_PASS_EVERY = 16  # looks at all points, also where only those without a text seem to be left
_CATCH_UP_S = 0.02
_TURNS_PER_S = 10  # under a rate: who searches meanwhile waits for few texts at once
_LOOK_S = 1.0  # between two looks at who leads
_BACKOFF_S_MIN, _BACKOFF_S_MAX = 0.5, 30.0
_FOREVER_S = 30.0  # at a rate of 0, between two looks whether the collection is there at all

_log = logger("migration")

# How a record goes on: (record, collection, vector, phase or None for the end) -> record.
Advance = Callable[[CollectionRecord, Collection, str, MigrationPhase | None], CollectionRecord]


def missing(have: Stored, lack: Stored) -> Filter:
    """Points that have the one vector and not the other, by stored names."""
    return parse_filter(
        {"must": [{"has_vector": have.name}], "must_not": [{"has_vector": lack.name}]}
    )


def following(key: int) -> int | None:
    """The next key that a point can have: numbers, then UUIDs. None after the last."""
    if key == (1 << 64) - 1:
        return UUID_BIT
    return None if key == 2 * UUID_BIT - 1 else key + 1


@dataclass(slots=True)
class Progress:
    """Of one migration, since this coordinator does it. rate: points per second, of late."""

    copied: int = 0
    without_text: int = 0
    error: str = ""
    window_began: float = 0.0
    window_copied: int = 0
    rate: float = 0.0
    told_at: float = float("-inf")
    told: tuple[int, int, str] = (-1, -1, "")


class Copier:
    """Of one coordinator; works while `leadership` is ours, or always where it is None.

    advance  coordinator/migrations.py, `advanced`.
    """

    def __init__(
        self,
        catalog: Catalog,
        store: MetadataStore,
        storage: Storage,
        texts: Texts,
        *,
        node_id: str,
        advance: Advance,
        leadership: Leadership | None,
    ) -> None:
        self._catalog, self._store, self._storage, self._texts = catalog, store, storage, texts
        self._node_id, self._advance = node_id, advance
        self._leadership = leadership
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._under_way: dict[tuple[int, str], asyncio.Task[None]] = {}
        self._carrying: dict[tuple[int, str], _Carrying] = {}
        self.room = asyncio.Semaphore(limits.MIGRATIONS_AT_ONCE)  # in the encoder

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="migrations")

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        await self._stop_all()
        if self._leadership is not None:
            await self._leadership.resign()

    def progress(self) -> dict[tuple[str, str], Progress]:
        """Of the migrations that we do, by the names of collection and vector."""
        return {(work.name, vector): work.progress for (_, vector), work in self._carrying.items()}

    def wake(self) -> None:
        """A record has changed."""
        self._changed.set()
        for work in self._carrying.values():
            work.changed.set()

    # -- who does what ----------------------------------------------------------------------------
    async def _run(self) -> None:
        while True:
            try:
                busy = await self._look()
            except Exception as error:  # else nobody would copy any more, in silence
                _log.error("migrations_failed", error=error)
                busy = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S if busy else None):
                    await self._changed.wait()

    async def _look(self) -> bool:
        """Start what is to be done. False when there is nothing."""
        self._changed.clear()
        wanted = {
            (collection.record.id, vector): collection.name
            for collection in self._catalog.collections()
            for vector, migrated in collection.record.migrated.items()
            if migrated.migration is not None
        }
        if wanted and not await self._ours():
            await self._stop_all()
        else:
            self._under_way = {k: task for k, task in self._under_way.items() if not task.done()}
            for key, name in wanted.items():
                if key not in self._under_way:
                    self._under_way[key] = asyncio.create_task(self._carry(name, *key))
        return bool(wanted)

    async def _ours(self) -> bool:
        if self._leadership is None:
            return True
        try:
            return await self._leadership.campaign()
        except ShoalError as error:
            _log.warning("migrations_without_leader", why=error.message)
            return False

    async def _stop_all(self) -> None:
        tasks, self._under_way = list(self._under_way.values()), {}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _carry(self, name: str, collection_id: int, vector: str) -> None:
        """One migration to its end, whatever fails on the way."""
        work = self._carrying[collection_id, vector] = _Carrying(self, name, collection_id, vector)
        try:
            await self._carry_on(work, name, vector)
        finally:
            if self._carrying.get((collection_id, vector)) is work:
                del self._carrying[collection_id, vector]

    async def _carry_on(self, work: _Carrying, name: str, vector: str) -> None:
        backoff_s = _BACKOFF_S_MIN
        while True:
            try:
                if not await work.step():
                    return
                backoff_s = _BACKOFF_S_MIN
            except NotFound:
                return  # the collection, or the migration
            except VectorsChanged:
                await work.catch_up()
            except ShoalError as error:
                pause_s = error.retry_after_s if isinstance(error, Busy) else backoff_s
                _log.warning("migration_waits", collection=name, vector=vector, why=error.message)
                await work.tell(error.message)
                await asyncio.sleep(pause_s)
                backoff_s = min(2 * backoff_s, _BACKOFF_S_MAX)
            except Exception as error:
                _log.error("migration_failed", collection=name, vector=vector, error=error)
                await work.tell(f"a bug in Shoal, written to the log of {self._node_id}: {error}")
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _BACKOFF_S_MAX)


class _Carrying:
    """What one migration is at."""

    def __init__(self, copier: Copier, name: str, collection_id: int, vector: str) -> None:
        self._copier, self.name, self._id, self._vector = copier, name, collection_id, vector
        self._catalog, self._storage = copier._catalog, copier._storage
        self.progress = Progress()
        self._pause_s = limits.COPY_PAUSE_S_MIN
        self._page = _PAGE_FIRST  # points to ask for at once: nobody says how large payloads are
        self._fenced = -1  # the epoch that all shards were told of
        self._without_text: dict[ShardKey, int] = {}  # of a pass that copied nothing
        self._passes = 0
        self._let_through = (float("-inf"), 0)  # when points were last, and how many
        self.changed = asyncio.Event()  # some record

    def _now(self) -> tuple[Collection, Migration]:
        """Raises NotFound when the collection or the migration is over."""
        collection = self._catalog.get(self.name)
        found = collection.record.migrated.get(self._vector)
        if collection.record.id != self._id or found is None or found.migration is None:
            raise NotFound(f"Not found: the migration of {self.name}/{self._vector} is over")
        return collection, found.migration

    async def step(self) -> bool:
        """One phase, or one look at all points. False when there is nothing more to do."""
        collection, migration = self._now()
        match migration.phase:
            case MigrationPhase.PREPARING:
                await self._prepare(collection, migration)
            case MigrationPhase.COPYING:
                await self._fence(collection)
                await self._copy_all(collection)
            case MigrationPhase.DROPPING:
                await self._drop(collection, migration)
                return False
        return True

    async def _prepare(self, collection: Collection, migration: Migration) -> None:
        request = collection.record.request()
        as_created = named_vectors(request)[self._vector]
        params = as_created.model_copy(update={"size": migration.other.size})
        name = stored_name(self._vector, migration.other.number)
        await self._alter(collection, AlterVectors(add={name: vector_spec(params, request)}))
        await self._go_on(collection, MigrationPhase.COPYING)

    async def _fence(self, collection: Collection) -> None:
        """From here on no write is applied that was made under an older record: such a one may leave a
        vector that is out of date, or bring one that is gone. Nothing is copied before."""
        epoch = collection.record.epoch
        if self._fenced != epoch:
            await self._alter(collection, AlterVectors(epoch=epoch))
            self._fenced = epoch
            self._without_text.clear()

    async def _drop(self, collection: Collection, migration: Migration) -> None:
        await self._fence(collection)
        for shard in collection.shards:  # those that would be left without any, as far as can be
            async for _ in self._copy_shard(shard, backwards=True):
                await self.tell()
        # Requests that began before may still read what is dropped, and so may coordinators that
        # have not heard of it yet.
        await asyncio.sleep(limits.DROP_GRACE_S)
        name = stored_name(self._vector, migration.other.number)
        await self._alter(collection, AlterVectors(drop=(name,)))
        await self._copier._store.txn([], {}, [migration_key(self._id, self._vector)])
        await self._go_on(collection, None)

    async def _alter(self, collection: Collection, alter: AlterVectors) -> None:
        for shard in collection.shards:
            await self._storage.write(shard, alter)

    async def _go_on(self, collection: Collection, phase: MigrationPhase | None) -> None:
        def change(record: CollectionRecord) -> CollectionRecord:
            return self._copier._advance(record, collection, self._vector, phase)

        await self._catalog.change(self.name, change)
        _log.info("migration", collection=self.name, vector=self._vector, phase=phase or "over")

    async def catch_up(self) -> None:
        """Shards know of a later record than we do."""
        with contextlib.suppress(ShoalError):  # the watch will tell
            await self._catalog.reread(self.name)
        await asyncio.sleep(_CATCH_UP_S)

    # -- copying ----------------------------------------------------------------------------------
    async def _copy_all(self, collection: Collection) -> None:
        """Every shard once, then a pause that grows while there is nothing to do."""
        before, everywhere = self.progress.copied, self._passes % _FULL_PASS_EVERY == 0
        self._passes += 1
        for shard in collection.shards:
            if everywhere or await self._worth_a_look(shard):
                await self._copy_both_ways(shard)
        progress = self.progress
        progress.without_text, progress.error = sum(self._without_text.values()), ""
        if progress.copied > before:
            self._pause_s = limits.COPY_PAUSE_S_MIN
        else:
            progress.rate = 0.0
        await self.tell()
        if await self._wait(self._pause_s, collection):
            self._pause_s = min(2 * self._pause_s, limits.COPY_PAUSE_S_MAX)
        else:  # a switch makes the copy look the other way, and for latecomers
            self._pause_s = limits.COPY_PAUSE_S_MIN

    async def _wait(self, seconds: float, known: Collection) -> bool:
        """So long (True), or until the record is another one than that of `known` (False)."""
        deadline = asyncio.get_running_loop().time() + seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while True:
                    self.changed.clear()
                    if self._now()[0] is not known:  # perhaps since before we began to wait
                        return False
                    await self.changed.wait()
        return True

    async def _copy_both_ways(self, shard: ShardKey) -> None:
        without_text = 0
        for backwards in (False, True):
            if backwards and not self._now()[1].complete:
                break
            async for skipped in self._copy_shard(shard, backwards=backwards):
                without_text += skipped
                await self.tell()
        self._without_text[shard] = without_text

    async def _worth_a_look(self, shard: ShardKey) -> bool:
        """Not when as many points lack a vector as had no text the last time: to read all of these
        again at every look would cost more than it finds."""
        known = self._without_text.get(shard)
        pair = self._pair()
        if not known or pair is None or pair.second is None:
            return True
        ways = [missing(pair.given, pair.second)]
        if pair.complete:
            ways.append(missing(pair.second, pair.given))
        strong = Read(strong=True)
        return known != sum([await self._storage.count(shard, way, strong) for way in ways])

    async def _copy_shard(self, shard: ShardKey, *, backwards: bool) -> AsyncIterator[int]:
        """Gives after each batch how many of its points have no text. Ends early when the record asks
        for another fence."""
        start: int | None = 0
        while start is not None:
            pair = self._pair()
            if pair is None:
                return
            if backwards:
                pair = pair.exchanged()
            points = await self._lacking(shard, pair, start)
            if not len(points):
                return
            start = following(points.ids.key(len(points) - 1))
            yield len(points) - await self._copy(shard, points, pair)

    def _pair(self) -> Pair | None:
        """Both generations; None when the record is another one than shards were told of."""
        collection, migration = self._now()
        if collection.record.epoch != self._fenced:
            return None
        current = collection.record.migrated[self._vector].current
        return pair_of(self._vector, current, migration, collection.fields.dense[self._vector])

    async def _lacking(self, shard: ShardKey, pair: Pair, start: int) -> PointBatch:
        assert pair.second is not None
        _, migration = self._now()
        rate = migration.points_per_second or math.inf
        wanted = Scroll(
            limit=math.ceil(min(rate / _TURNS_PER_S, self._page)),
            start=start,
            filter=missing(pair.given, pair.second),
            with_payload=True,
        )
        try:
            points = await self._storage.scroll(shard, wanted, Read(strong=True))
        except ShoalError:
            self._page = max(1, self._page // 2)  # perhaps it was more than a message may hold
            raise
        if len(points.payload) > limits.COPY_PAGE_BYTES_TARGET:
            self._page = max(1, self._page // 2)
        else:
            self._page = min(limits.COPY_POINTS, 2 * self._page)
        return points

    async def _copy(self, shard: ShardKey, points: PointBatch, pair: Pair) -> int:
        """Make the second vector of these points. Returns how many had a text."""
        to = pair.second
        assert to is not None
        assert points.versions is not None
        texts = [text_of(points.payload_of(row), pair.text_field) for row in range(len(points))]
        rows = np.array([row for row, text in enumerate(texts) if text is not None], np.int64)
        if not len(rows):
            return 0
        if not await self._turn(len(rows)):
            return len(rows)
        epoch = self._fenced
        async with self._copier.room:
            embedded = await self._copier._texts.encode(
                [text for text in texts if text is not None], to.model.model, to.model.fingerprint
            )
        batch = PointBatch(points.ids.take(rows))
        batch.dense[to.name] = second_block(len(rows), list(range(len(rows))), embedded.vectors, to)
        write = UpdateVectors(batch, if_versions=points.versions[rows], epoch=epoch)
        await self._storage.write(shard, write)
        self.progress.copied += len(rows)
        self.progress.error = ""
        return len(rows)

    async def _turn(self, count: int) -> bool:
        """Wait until the rate budget, as it is by then, has room for so many points. There is none while
        vectors are about to be dropped. False when the record asks for another fence."""
        loop = asyncio.get_running_loop()
        while True:
            collection, migration = self._now()
            rate, now = migration.points_per_second, loop.time()
            if migration.phase is MigrationPhase.DROPPING:
                return True
            if collection.record.epoch != self._fenced:
                return False
            at, points = self._let_through
            pause_s = 0.0 if rate is None else _FOREVER_S if rate <= 0 else at + points / rate - now
            if pause_s <= 0:
                self._let_through = (now, count)
                return True
            await self.tell()
            await self._wait(min(pause_s, _FOREVER_S), collection)

    # -- telling ----------------------------------------------------------------------------------
    async def tell(self, error: str | None = None) -> None:
        """Say how far it is, in the metadata store, now and then, and at once what is wrong."""
        progress, now = self.progress, asyncio.get_running_loop().time()
        if error is not None:
            progress.error = error
        told = (progress.copied, progress.without_text, progress.error)
        if told == progress.told or (
            now - progress.told_at < limits.PROGRESS_S and progress.error == progress.told[2]
        ):
            return
        if progress.window_began:
            passed = max(now - progress.window_began, 1e-3)
            progress.rate = (progress.copied - progress.window_copied) / passed
        progress.window_began, progress.window_copied = now, progress.copied
        record = MigrationProgress(
            node=self._copier._node_id,
            at=datetime.now(UTC),
            copied=progress.copied,
            without_text=progress.without_text,
            points_per_second=progress.rate,
            error=progress.error,
        )
        puts = {migration_key(self._id, self._vector): record.to_bytes()}
        try:
            collection, _ = self._now()  # the guard: nothing is left behind by one that is over
            guard = Compare(collection.record.key, collection.revision)
            if (await self._copier._store.txn([guard], puts)).ok:
                progress.told_at, progress.told = now, told
        except ShoalError as refused:  # it is for people only
            _log.info("progress_not_told", why=refused.message)
