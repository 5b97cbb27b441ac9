"""The collections: what there is, and how one comes and goes without a crash leaving half of it.

    create   txn: next id                                       ours alone, also if never used
             txn: record (creating) + shard records             nobody may use it yet
             storage: create every shard on every node of its record
             txn: record (active)                               now it exists
    delete   txn: remove the records                            now it is gone
             storage: drop every shard; a node that does not hear of it learns it by itself

Every coordinator follows the records by a watch. All changes are one compare-and-swap on the revision
that was read, so several coordinators may change the same collection; a lock per catalog only spares
them from meeting. Because of that guard a transaction that may have happened can be settled: look,
and try again under the same guard; it takes effect once. When that fails too, the error says that the
change may have happened.

What was heard may be old, so a change begins with a look at the store: a name that another
coordinator has freed can be taken at once.

A creation that died half-way is removed by any coordinator that has seen it unchanged for
`CREATING_S_MAX`, longer than any creation may take. One machine alone removes it at its start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from pydantic import JsonValue

from coordinator.binding import METADATA_KEY, bound_models
from coordinator.creation import check_factors, check_name, check_request, unknown_fields
from coordinator.generations import Pair, exchanged, pairs_of
from coordinator.routing import ShardGone
from shoal.api.models import CreateCollection
from shoal.encoder_api import ModelInfo
from shoal.errors import (
    AlreadyExists,
    BadRequest,
    Busy,
    FormatTooNew,
    InvariantError,
    NotFound,
    ShoalError,
    Unavailable,
)
from shoal.limits import COLLECTIONS_MAX, NAME_LENGTH_MAX
from shoal.metadata.contract import Compare, Event, KeyValue, MetadataStore, Uncertain
from shoal.metadata.schema import (
    COLLECTION_ID_KEY,
    COLLECTIONS_PREFIX,
    NODES_PREFIX,
    SHARDS_PREFIX,
    BoundModel,
    CollectionRecord,
    CollectionState,
    IdRecord,
    NodeRecord,
    ShardRecord,
    collection_key,
    migration_key,
    named_vectors,
    shard_key,
    shard_spec,
    vector_fields,
)
from shoal.metadata.watched import Watched
from shoal.placement import place, shards_by_default, storage_nodes
from shoal.settings import CoordinatorSettings
from shoal.storage_api import ShardKey, ShardSpec, Storage
from shoal.telemetry import logger
from shoal.vectors import VectorFields

__all__ = ["CREATE_S_MAX", "CREATING_S_MAX", "Catalog", "Collection"]

T = TypeVar("T")
_log = logger("catalog")

CREATE_S_MAX = 30.0  # making the shards of a collection; then it is undone
CREATING_S_MAX = 90.0  # a record that has been `creating` for so long belongs to nobody any more
_TXN_ATTEMPTS_MAX = 16  # of other coordinators changing the same record in between


@dataclass(frozen=True, slots=True)
class Collection:
    """An active collection with what requests need at hand.

    revision  of its record in the metadata store; the guard of the next change.
    request   the creation, with the dimensions and models of today.
    fields, pairs  what names of vectors mean; see `with_others`.
    """

    record: CollectionRecord
    revision: int
    request: CreateCollection
    fields: VectorFields
    shards: tuple[ShardKey, ...]
    pairs: Mapping[str, Pair]

    @classmethod
    def of(cls, record: CollectionRecord, revision: int) -> Collection:
        request = _as_of_today(record)
        fields = vector_fields(request)
        pairs = pairs_of(record, fields)
        return cls(record, revision, request, fields, tuple(record.shards()), pairs)

    def with_others(self, names: Sequence[str]) -> Collection:
        """As a request sees it in which these vectors mean their second generation."""
        if not names:
            return self
        fields, pairs = exchanged(self.fields, self.pairs, names)
        return replace(self, fields=fields, pairs=pairs)

    def model_of(self, vector: str) -> BoundModel | None:
        """That the vector, as this request sees it, is bound to."""
        pair = self.pairs.get(vector)
        return self.record.models.get(vector) if pair is None else pair.given.model

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def replication_factor(self) -> int:
        """Replicas of each shard that were asked for."""
        return self.request.replication_factor or 1


def _as_of_today(record: CollectionRecord) -> CreateCollection:
    """The model of a vector stands where the creation has said it, else in the metadata: clients that
    check fields know no `shoal_model`."""
    request = record.request()
    if not record.migrated:
        return request
    vectors = dict(named_vectors(request))
    metadata = dict(request.metadata or {})
    said = metadata.get(METADATA_KEY)
    in_metadata = dict(said) if isinstance(said, dict) else {}
    for name, vector in record.migrated.items():
        changed: dict[str, Any] = {"size": vector.current.size}
        if vectors[name].shoal_model is not None:
            changed["shoal_model"] = vector.current.model.model
        else:
            in_metadata[name] = vector.current.model.model
        vectors[name] = vectors[name].model_copy(update=changed)
    if in_metadata:
        metadata[METADATA_KEY] = in_metadata
    return request.model_copy(
        update={"vectors": vectors.get("", vectors), "metadata": metadata or None}
    )


class Catalog:
    """The collections as one coordinator knows them, kept in step with the store.

    local_node  of a one-machine server: it holds everything, and nobody else changes the catalog.
    """

    def __init__(
        self,
        store: MetadataStore,
        storage: Storage,
        settings: CoordinatorSettings,
        local_node: str | None,
    ) -> None:
        self._store, self._storage, self._settings = store, storage, settings
        self._local_node = local_node
        self.models: Callable[[], Sequence[ModelInfo]] = tuple  # those that could be served now
        self.on_change: Callable[[], None] = lambda: None  # of any record
        self._collections: dict[str, Collection] = {}
        self._gone: dict[str, int] = {}  # deleted here, at this revision; the watch will tell too
        self._unfinished: dict[str, asyncio.TimerHandle] = {}
        self._lock = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()
        self._watched = Watched(store, [COLLECTIONS_PREFIX], on_change=self._heard)

    async def load(self) -> None:
        """Read all records, then follow them."""
        await self._watched.start()
        if self._local_node is None:
            return
        for entry in list(self._watched.entries.values()):
            record = CollectionRecord.from_bytes(entry.key, entry.value)
            if record.state is CollectionState.CREATING:
                await self._remove_unfinished(record, entry.revision)

    async def close(self) -> None:
        """Wait for the changes under way, and follow the records no more."""
        for timer in self._unfinished.values():
            timer.cancel()
        await asyncio.gather(*self._changes, return_exceptions=True)
        await self._watched.close()

    # -- what there is ----------------------------------------------------------------------------
    def shard_specs(self) -> list[ShardSpec]:
        """Every shard that exists."""
        return [
            shard_spec(collection.record, key.shard)
            for collection in self._collections.values()
            for key in collection.shards
        ]

    def names(self) -> list[str]:
        return sorted(self._collections)

    def collections(self) -> list[Collection]:
        return [self._collections[name] for name in self.names()]

    def get(self, name: str) -> Collection:
        """As far as this coordinator has heard; `find` asks. Raises NotFound."""
        found = self._collections.get(name)
        if found is None:
            raise NotFound(f"Not found: Collection `{name}` doesn't exist!")
        return found

    async def find(self, name: str) -> Collection:
        """Also one that another coordinator has made just now: only after the metadata store was
        asked is it said that there is none. Raises NotFound."""
        found = self._collections.get(name)
        if found is not None:
            return found
        if self._local_node is None and len(name.encode("utf-8", "replace")) <= NAME_LENGTH_MAX:
            await self._read(name)
        return self.get(name)

    def exists(self, name: str) -> bool:
        """As far as this coordinator has heard."""
        return name in self._collections

    async def reread(self, name: str) -> None:
        """Take over the record as it is now. Raises Unavailable."""
        await self._read(name)

    async def replaced(self, name: str, gone: ShardGone) -> bool:
        """Whether `name` is another collection by now than the one whose shard is gone. Raises
        NotFound when there is none any more."""
        await self._read(name)
        return self.get(name).record.id != gone.collection_id

    async def _read(self, name: str) -> KeyValue | None:
        """The record as of now, also taken over here."""
        known = self._collections.get(name)  # the watch may tell of a later one meanwhile
        entry = await self._store.get(collection_key(name))
        if entry is not None:
            try:
                record = CollectionRecord.from_bytes(entry.key, entry.value)
            except FormatTooNew as error:
                raise Unavailable(error.message) from None
            self._learn(record, entry.revision)
        elif known is not None:
            self._unlearn(name, known.revision)
        return entry

    # -- following the records --------------------------------------------------------------------
    def _heard(self, events: Sequence[Event]) -> None:
        for event in events:
            name = event.key.removeprefix(COLLECTIONS_PREFIX)
            if event.value is None:
                self._unlearn(name, event.revision)
                if self._gone.get(name, event.revision + 1) <= event.revision:
                    del self._gone[name]
                continue
            try:
                record = CollectionRecord.from_bytes(event.key, event.value)
            except (FormatTooNew, InvariantError) as error:  # the others are none the worse
                _log.error("collection_not_read", collection=name, why=str(error))
                self._collections.pop(name, None)  # what we knew of it is not true any more
                continue
            self._learn(record, event.revision)

    def _learn(self, record: CollectionRecord, revision: int) -> None:
        """A record as it was at `revision`: the watch may tell of it later than we did it."""
        name, known = record.name, self._collections.get(record.name)
        if revision <= self._gone.get(name, 0):
            return
        if known is not None and known.revision >= revision:
            return
        self._settle(name)
        if record.state is CollectionState.ACTIVE:
            self._collections[name] = Collection.of(record, revision)
            self.on_change()
            return
        self._collections.pop(name, None)
        if self._local_node is None:
            self._wait_for_end(record, revision)

    def _unlearn(self, name: str, revision: int) -> None:
        known = self._collections.get(name)
        if known is not None and known.revision > revision:
            return
        self._collections.pop(name, None)
        self._settle(name)
        self.on_change()

    def _settle(self, name: str) -> None:
        timer = self._unfinished.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _wait_for_end(self, record: CollectionRecord, revision: int) -> None:
        self._unfinished[record.name] = asyncio.get_running_loop().call_later(
            CREATING_S_MAX, self._give_up, record, revision
        )

    def _give_up(self, record: CollectionRecord, revision: int) -> None:
        # Again after as long, until something is heard of it: the store may be away just now.
        self._wait_for_end(record, revision)
        self._begin(self._remove_unfinished(record, revision))

    async def _remove_unfinished(self, record: CollectionRecord, revision: int) -> None:
        """Its creator died, or will find that it is too late."""
        done = await self._store.txn(*_removal(record, revision))
        if done.ok:
            self._unlearn(record.name, done.revision)
            _log.warning("unfinished_creation_removed", collection=record.name)
            if self._local_node is None:  # at its start a node removes what no record names
                await self._drop(record.shards())

    # -- changes ----------------------------------------------------------------------------------
    async def create(self, name: str, request: CreateCollection) -> None:
        """Raises AlreadyExists, InvalidField for a bad name or setting, BadRequest for more replicas
        than nodes, StorageFull, Unavailable."""
        check_name(name, "collection")
        check_request(request)
        if unknown := sorted(unknown_fields(request)):
            _log.warning("settings_kept_without_effect", settings=", ".join(unknown))
        await self._to_end(self._create(name, request))

    async def delete(self, name: str) -> bool:
        """False when there is none. The collection is gone when this returns, and its data
        unreachable at once; a crash in between leaves files that the nodes remove."""
        return await self._to_end(self._delete(name))

    async def set_fingerprint(self, name: str, vector: str, fingerprint: str) -> BoundModel | None:
        """Write down which weights a bound vector is of, if nobody has yet. Returns what is written
        down then: those of another coordinator that was first, or None where it is bound no more."""
        await self._to_end(self._set_fingerprint(name, vector, fingerprint))
        return self.get(name).record.models.get(vector)

    async def set_index(self, name: str, field: str, params: dict[str, JsonValue] | None) -> None:
        """Write down, or with None remove, a payload index. Results never depend on it."""
        await self._to_end(self._set_index(name, field, params))

    async def change(
        self, name: str, change: Callable[[CollectionRecord], CollectionRecord | None]
    ) -> Collection:
        """Replace the record by what `change` makes of it, again when others were first. None: as it
        is. Raises NotFound, Busy, what `change` raises; the error says whether it may have happened."""
        await self._to_end(self._change(name, change))
        return self.get(name)

    async def _to_end(self, change: Coroutine[Any, Any, T]) -> T:
        """Run a change to its end also when the caller gives up (a timeout, a client that went
        away): cut in the middle, store, shards and memory would disagree."""
        return await asyncio.shield(self._begin(change))

    def _begin(self, change: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(change)
        self._changes.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._changes.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.debug("change_refused", error=str(error))  # the caller may have gone: seen here

    async def _create(self, name: str, request: CreateCollection) -> None:
        async with self._lock:
            if await self._read(name) is not None:
                raise _already_exists(name)
            if len(self._collections) >= COLLECTIONS_MAX:
                raise BadRequest(
                    f"Wrong input: there are {COLLECTIONS_MAX} collections, the most that one "
                    "server holds: delete one, or keep tenants apart by a payload field"
                )
            record, revision = await self._reserve(name, request)
            try:
                async with asyncio.timeout(CREATE_S_MAX):
                    specs = [shard_spec(record, key.shard) for key in record.shards()]
                    await _together([self._storage.create_shard(spec) for spec in specs])
                await self._swap(record, revision, _activated)
            except TimeoutError:
                await self._undo(record, revision)
                raise Unavailable(
                    f"the storage nodes did not make the shards of `{name}` within "
                    f"{CREATE_S_MAX:g} s, and nothing of it is left: try again"
                ) from None
            except BaseException:
                await self._undo(record, revision)
                raise

    async def _delete(self, name: str) -> bool:
        async with self._lock:
            removing: CollectionRecord | None = None  # by a transaction that was not answered
            with _Doubt(name) as doubt:
                for _ in range(_TXN_ATTEMPTS_MAX):
                    entry = await self._read(name)
                    if removing is not None and (entry is None or _id_of(entry) != removing.id):
                        await self._drop(removing.shards())  # it happened, perhaps late
                        return True
                    if entry is None:
                        return False
                    record = CollectionRecord.from_bytes(entry.key, entry.value)
                    if record.state is CollectionState.CREATING:
                        return False  # nobody was told that it exists
                    try:
                        if await self._remove(record, entry.revision):
                            await self._drop(record.shards())
                            return True
                    except Uncertain:
                        removing, doubt.justified = record, True
                raise _changed_by_others(name)

    async def _remove(self, record: CollectionRecord, revision: int) -> bool:
        """False: somebody else was first with another change. Raises Uncertain."""
        done = await self._store.txn(*_removal(record, revision))
        if done.ok:
            self._unlearn(record.name, done.revision)
            self._gone[record.name] = done.revision
        return done.ok

    async def _drop(self, shards: Iterable[ShardKey]) -> None:
        """Their records are gone, and so are they for everybody: what fails here is made up for by
        the nodes, which hear of it by themselves."""
        try:
            await _together([self._storage.drop_shard(key) for key in shards])
        except ShoalError as error:
            _log.warning("shards_not_dropped", why=error.message)

    async def _change(
        self, name: str, change: Callable[[CollectionRecord], CollectionRecord | None]
    ) -> None:
        async with self._lock:
            await self._read(name)
            found = self.get(name)
            await self._swap(found.record, found.revision, change)

    async def _set_fingerprint(self, name: str, vector: str, fingerprint: str) -> None:
        def changed(record: CollectionRecord) -> CollectionRecord | None:
            bound = record.models.get(vector)
            if bound is None or bound.fingerprint is not None:
                return None
            models = {
                **record.models,
                vector: BoundModel(model=bound.model, fingerprint=fingerprint),
            }
            return record.model_copy(update={"models": models})

        await self._change(name, changed)

    async def _set_index(self, name: str, field: str, params: dict[str, JsonValue] | None) -> None:
        def changed(record: CollectionRecord) -> CollectionRecord | None:
            schema = dict(record.payload_schema)
            if params is None:
                if schema.pop(field, None) is None:
                    return None
            else:
                schema[field] = params
            return record.model_copy(update={"payload_schema": schema})

        await self._change(name, changed)

    async def _swap(
        self,
        record: CollectionRecord,
        revision: int,
        change: Callable[[CollectionRecord], CollectionRecord | None],
    ) -> None:
        """Change a record, again on what others made of it meanwhile. None: no change is needed.
        Raises NotFound when it was deleted, Busy."""
        name = record.name
        with _Doubt(name) as doubt:
            for _ in range(_TXN_ATTEMPTS_MAX):
                wanted = change(record)
                if wanted is None or (wanted == record):
                    return
                guard, put = Compare(record.key, revision), {record.key: wanted.to_bytes()}
                try:
                    done = await self._store.txn([guard], put)
                except Uncertain:
                    doubt.justified = True  # a second try under the same guard cannot double it
                else:
                    if done.ok:
                        self._learn(wanted, done.revision)
                        return
                entry = await self._read(name)
                if entry is None or _id_of(entry) != record.id:
                    raise NotFound(f"Not found: Collection `{name}` was deleted meanwhile!")
                record, revision = (
                    CollectionRecord.from_bytes(entry.key, entry.value),
                    entry.revision,
                )
            raise _changed_by_others(name)

    async def _new_id(self) -> int:
        """For one collection, ever. In a transaction of its own: were it taken together with the
        name, a record with our id could also be that of another who read the same next id."""
        for _ in range(_TXN_ATTEMPTS_MAX):
            current = await self._store.get(COLLECTION_ID_KEY)
            ids = IdRecord() if current is None else IdRecord.from_bytes(current.key, current.value)
            taken = {COLLECTION_ID_KEY: IdRecord(next_id=ids.next_id + 1).to_bytes()}
            guard = Compare(COLLECTION_ID_KEY, 0 if current is None else current.revision)
            try:
                if (await self._store.txn([guard], taken)).ok:
                    return ids.next_id
            except Uncertain:
                pass  # the next one then; there are enough
        raise Busy("other coordinators are creating collections: try again")

    async def _reserve(self, name: str, request: CreateCollection) -> tuple[CollectionRecord, int]:
        """Take the name and the nodes, in one transaction. Returns the record and its revision."""
        record, shards = await self._planned(name, request)
        puts = {record.key: record.to_bytes()}
        puts |= {shard.key: shard.to_bytes() for shard in shards}
        for _ in range(_TXN_ATTEMPTS_MAX):
            try:
                done = await self._store.txn([Compare(record.key, 0)], puts)
            except Uncertain:
                pass  # a record with our id is ours
            else:
                if done.ok:
                    return record, done.revision
            entry = await self._store.get(record.key)
            if entry is not None:
                if _id_of(entry) == record.id:
                    return record, entry.revision
                raise _already_exists(name)
        raise _changed_by_others(name)

    async def _planned(
        self, name: str, request: CreateCollection
    ) -> tuple[CollectionRecord, list[ShardRecord]]:
        """The records of a new collection: how many shards and replicas, and on which nodes."""
        settings, config = self._settings, request.model_dump(mode="json", exclude_unset=True)
        factor = request.replication_factor
        nodes: list[NodeRecord] = []
        if self._local_node is None:
            entries, _ = await self._store.range(NODES_PREFIX)
            nodes = storage_nodes(NodeRecord.from_bytes(e.key, e.value) for e in entries)
            if factor is None:
                factor = max(1, min(settings.default_replication_factor, len(nodes)))
                config["replication_factor"] = factor
        alone = self._local_node is not None
        check_factors(factor or 1, request.write_consistency_factor or 1, alone=alone)
        shard_number = request.shard_number or shards_by_default(
            len(nodes), factor or 1, settings.default_shard_number
        )
        if self._local_node is not None:
            if (factor or 1) > 1:
                _log.warning("one_replica_only", collection=name, replication_factor=factor)
            members = [[self._local_node]] * shard_number
        else:
            entries, _ = await self._store.range(SHARDS_PREFIX)
            present = [ShardRecord.from_bytes(e.key, e.value) for e in entries]
            members = place(shard_number, factor or 1, nodes, present)
        models = bound_models(request, self.models())
        record = CollectionRecord(
            version=2 if models else 1,
            models=models,
            id=await self._new_id(),
            name=name,
            state=CollectionState.CREATING,
            shard_number=shard_number,
            config=config,
        )
        return record, [
            ShardRecord(collection_id=record.id, shard=shard, primary=held_by[0], in_sync=held_by)
            for shard, held_by in enumerate(members)
        ]

    async def _undo(self, record: CollectionRecord, revision: int) -> None:
        """After a failed creation. What fails here is removed like any creation that died."""
        try:
            if await self._remove(record, revision):
                await self._drop(record.shards())
        except ShoalError as error:
            _log.warning("creation_not_undone", collection=record.name, why=error.message)


async def _together(calls: Sequence[Coroutine[Any, Any, None]]) -> None:
    """All calls side by side; all have ended when this returns or raises the first error."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def _removal(
    record: CollectionRecord, revision: int
) -> tuple[list[Compare], Mapping[str, bytes], list[str]]:
    keys = [record.key, *(shard_key(record.id, key.shard) for key in record.shards())]
    keys += [migration_key(record.id, vector) for vector in record.migrated]
    return [Compare(record.key, revision)], {}, keys


def _id_of(entry: KeyValue) -> int:
    return CollectionRecord.from_bytes(entry.key, entry.value).id


def _activated(record: CollectionRecord) -> CollectionRecord:
    return record.model_copy(update={"state": CollectionState.ACTIVE})


def _already_exists(name: str) -> AlreadyExists:
    return AlreadyExists(f"Wrong input: Collection `{name}` already exists!")


def _changed_by_others(name: str) -> Busy:
    return Busy(f"Collection `{name}` is being changed by others: try again")


class _Doubt:
    """Around the attempts at one change. justified: one of them was not answered, so whatever error
    ends them, the change may have happened."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.justified = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.justified and isinstance(error, ShoalError) and not error.maybe_applied:
            error.maybe_applied = True
            error.message += f" The change of `{self._name}` may have been made: look, then decide."
