"""The collections: what there is, and how one comes and goes without a crash leaving half of it.

    create   txn: record (creating) + shard records + next id   nobody may use it yet
             storage: create every shard
             txn: record (active)                               now it exists
    delete   txn: remove the records                            now it is gone
             storage: drop every shard
    start    a record still `creating` is removed: its creator was never told that it exists.
             Shard folders that no record names are removed by the storage node.

Names are changed under a lock per catalog; the metadata store's compare-and-swap is what guards
against other coordinators.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel, JsonValue

from shoal.api.models import CreateCollection, CreateFieldIndex, FieldParams
from shoal.errors import AlreadyExists, BadRequest, Busy, InvalidField, NotFound, ShoalError
from shoal.limits import COLLECTIONS_MAX, NAME_LENGTH_MAX
from shoal.metadata.contract import Compare, MetadataStore
from shoal.metadata.schema import (
    COLLECTION_ID_KEY,
    COLLECTIONS_PREFIX,
    CollectionRecord,
    CollectionState,
    IdRecord,
    ShardRecord,
    named_vectors,
    shard_key,
    shard_spec,
    vector_fields,
)
from shoal.storage_api import ShardKey, ShardSpec, Storage
from shoal.telemetry import logger
from shoal.vectors import VectorFields

__all__ = ["Catalog", "Collection"]

T = TypeVar("T")
_log = logger("catalog")

_FORBIDDEN_IN_NAMES = set("/\\") | {chr(code) for code in range(32)} | {"\x7f"}
_TXN_ATTEMPTS_MAX = 16  # of other coordinators changing the same record in between


@dataclass(frozen=True, slots=True)
class Collection:
    """An active collection with what requests need at hand.

    revision  of its record in the metadata store; the guard of the next change.
    """

    record: CollectionRecord
    revision: int
    request: CreateCollection
    fields: VectorFields
    shards: tuple[ShardKey, ...]

    @classmethod
    def of(cls, record: CollectionRecord, revision: int) -> Collection:
        request = record.request()
        return cls(record, revision, request, vector_fields(request), tuple(record.shards()))

    @property
    def name(self) -> str:
        return self.record.name


class Catalog:
    """The collections of one coordinator, read once at start and kept in step with the store."""

    def __init__(self, store: MetadataStore, storage: Storage, default_shard_number: int) -> None:
        self._store = store
        self._storage = storage
        self._default_shard_number = default_shard_number
        self._collections: dict[str, Collection] = {}
        self._lock = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()

    async def load(self) -> None:
        """Read all records; remove those whose creation never finished."""
        entries, _ = await self._store.range(COLLECTIONS_PREFIX)
        for entry in entries:
            record = CollectionRecord.from_bytes(entry.key, entry.value)
            if record.state is CollectionState.ACTIVE:
                self._collections[record.name] = Collection.of(record, entry.revision)
            else:
                _log.warning("unfinished_creation_removed", collection=record.name)
                await self._forget(record, entry.revision)

    def shard_specs(self) -> list[ShardSpec]:
        """Every shard that exists, for the storage node to open."""
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
        """Raises NotFound."""
        found = self._collections.get(name)
        if found is None:
            raise NotFound(f"Not found: Collection `{name}` doesn't exist!")
        return found

    def exists(self, name: str) -> bool:
        return name in self._collections

    async def create(self, name: str, request: CreateCollection) -> None:
        """Raises AlreadyExists, InvalidField for a bad name or setting, StorageFull."""
        _check_name(name, "collection")
        _check_request(request)
        await self._to_end(self._create(name, request))

    async def delete(self, name: str) -> bool:
        """False when there is none. The collection is gone when this returns, and its data
        unreachable at once; a crash in between leaves files that the next start removes."""
        return await self._to_end(self._delete(name))

    async def set_index(self, name: str, field: str, params: dict[str, JsonValue] | None) -> None:
        """Write down, or with None remove, a payload index. Results never depend on it."""
        await self._to_end(self._set_index(name, field, params))

    async def close(self) -> None:
        """Wait for the changes under way."""
        await asyncio.gather(*self._changes, return_exceptions=True)

    async def _to_end(self, change: Coroutine[Any, Any, T]) -> T:
        """Run a change to its end also when the caller gives up (a timeout, a client that went
        away): cut in the middle, store, shards and memory would disagree."""
        task = asyncio.ensure_future(change)
        self._changes.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._changes.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.debug("change_refused", error=str(error))  # the caller may have gone: seen here

    async def _create(self, name: str, request: CreateCollection) -> None:
        async with self._lock:
            if name in self._collections:
                raise _already_exists(name)
            if len(self._collections) >= COLLECTIONS_MAX:
                raise BadRequest(
                    f"Wrong input: there are {COLLECTIONS_MAX} collections, the most that one "
                    "server holds: delete one, or keep tenants apart by a payload field"
                )
            record, revision = await self._reserve(name, request)
            try:
                for key in record.shards():
                    await self._storage.create_shard(shard_spec(record, key.shard))
                active = record.model_copy(update={"state": CollectionState.ACTIVE})
                done = await self._store.txn(
                    [Compare(record.key, revision)], {record.key: active.to_bytes()}
                )
            except BaseException:
                await self._undo(record, revision)
                raise
            if not done.ok:
                raise Busy(f"Collection `{name}` was changed by somebody else: try again")
            self._collections[name] = Collection.of(active, done.revision)

    async def _delete(self, name: str) -> bool:
        async with self._lock:
            collection = self._collections.get(name)
            if collection is None:
                return False
            if not await self._forget(collection.record, collection.revision):
                raise Busy(f"Collection `{name}` was changed by somebody else: try again")
            del self._collections[name]
            for key in collection.shards:
                await self._storage.drop_shard(key)
            return True

    async def _set_index(self, name: str, field: str, params: dict[str, JsonValue] | None) -> None:
        async with self._lock:
            collection = self.get(name)
            schema = dict(collection.record.payload_schema)
            if params is None:
                if schema.pop(field, None) is None:
                    return
            else:
                schema[field] = params
            record = collection.record.model_copy(update={"payload_schema": schema})
            done = await self._store.txn(
                [Compare(record.key, collection.revision)], {record.key: record.to_bytes()}
            )
            if not done.ok:
                raise Busy(f"Collection `{name}` was changed by somebody else: try again")
            self._collections[name] = replace(collection, record=record, revision=done.revision)

    async def _reserve(self, name: str, request: CreateCollection) -> tuple[CollectionRecord, int]:
        """Take an id and the name, in one transaction. Returns the record and its revision."""
        for _ in range(_TXN_ATTEMPTS_MAX):
            current = await self._store.get(COLLECTION_ID_KEY)
            ids = IdRecord() if current is None else IdRecord.from_bytes(current.key, current.value)
            record = CollectionRecord(
                id=ids.next_id,
                name=name,
                state=CollectionState.CREATING,
                shard_number=request.shard_number or self._default_shard_number,
                config=request.model_dump(mode="json", exclude_unset=True),
            )
            shards = [ShardRecord(collection_id=record.id, shard=k.shard) for k in record.shards()]
            done = await self._store.txn(
                [
                    Compare(record.key, 0),
                    Compare(COLLECTION_ID_KEY, 0 if current is None else current.revision),
                ],
                {
                    record.key: record.to_bytes(),
                    COLLECTION_ID_KEY: IdRecord(next_id=ids.next_id + 1).to_bytes(),
                    **{shard.key: shard.to_bytes() for shard in shards},
                },
            )
            if done.ok:
                return record, done.revision
            if await self._store.get(record.key) is not None:
                raise _already_exists(name)
        raise Busy("other coordinators are creating collections: try again")

    async def _forget(self, record: CollectionRecord, revision: int) -> bool:
        keys = [record.key, *(shard_key(record.id, key.shard) for key in record.shards())]
        return (await self._store.txn([Compare(record.key, revision)], {}, keys)).ok

    async def _undo(self, record: CollectionRecord, revision: int) -> None:
        """After a failed creation. What fails here is left to the next start."""
        try:
            await self._forget(record, revision)
            for key in record.shards():
                await self._storage.drop_shard(key)
        except ShoalError as error:
            _log.warning("creation_not_undone", collection=record.name, why=error.message)


def _already_exists(name: str) -> AlreadyExists:
    return AlreadyExists(f"Wrong input: Collection `{name}` already exists!")


def _check_name(name: str, what: str) -> None:
    if not name or len(name.encode()) > NAME_LENGTH_MAX or name in (".", ".."):
        raise InvalidField(
            f"Validation error in JSON body: [{what} name: must have 1 to {NAME_LENGTH_MAX} bytes "
            "and not be a dot or two]"
        )
    bad = sorted(set(name) & _FORBIDDEN_IN_NAMES)
    if bad:
        raise InvalidField(
            f"Validation error in JSON body: [{what} name: may not contain {bad[0]!r}]"
        )


def _check_request(request: CreateCollection) -> None:
    vectors = named_vectors(request)
    sparse = request.sparse_vectors or {}
    for name in [*vectors, *sparse]:
        if name:
            _check_name(name, "vector")
    if both := sorted(vectors.keys() & sparse.keys()):
        raise BadRequest(
            f"Wrong input: `{both[0]}` is both a dense and a sparse vector: rename one"
        )
    if request.sharding_method == "custom":
        raise BadRequest(
            "Wrong input: `sharding_method` custom is not supported by this version of Shoal: "
            "points are spread by a hash of their id"
        )
    if (request.write_consistency_factor or 1) > 1:
        raise BadRequest(
            "Wrong input: `write_consistency_factor` above 1 cannot be met by one machine: every "
            "write would be refused"
        )
    if (request.replication_factor or 1) > 1:
        _log.warning("one_replica_only", replication_factor=request.replication_factor)
    if unknown := sorted(_unknown_fields(request)):
        _log.warning("settings_kept_without_effect", settings=", ".join(unknown))


def _unknown_fields(block: BaseModel, path: str = "") -> list[str]:
    """Paths of settings that were sent and that no code here reads."""
    found = [path + name for name in block.model_extra or ()]
    for name, value in block:
        values: Mapping[str, Any] = value if isinstance(value, dict) else {"": value}
        for inner, part in values.items():
            if isinstance(part, BaseModel):
                found += _unknown_fields(
                    part, f"{path}{name}.{inner}." if inner else f"{path}{name}."
                )
    return found


def index_params(request: CreateFieldIndex) -> dict[str, JsonValue]:
    """The payload index as it is written down."""
    schema = request.field_schema
    if isinstance(schema, FieldParams):
        params: dict[str, JsonValue] = schema.model_dump(mode="json", exclude_unset=True)
        return params
    return {"type": schema.value}
