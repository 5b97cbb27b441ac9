"""A storage node as a member of a cluster: what the metadata says happens to its replicas.

    shards/{collection}/{n}   names this node     -> open it, tell it its configuration
                              in `joining`        -> an empty replica; the primary fills it
                              in `leaving`        -> delete it, then take ourselves out of `leaving`
                              not at all          -> kept as it is: it may come back by its log
                              the record is gone  -> the collection was deleted: delete it

A node that is about to stop says so (`depart`, then its own record): it takes no more writes, the
monitor makes others lead its shards, primaries take it out of their in-sync sets, and then it goes.

A replica is deleted only for a record that we saw, or that the metadata store must have had: one
that lost everything (a new etcd under an old address) deletes nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from shoal import limits, telemetry
from shoal.errors import BadRequest, InvariantError, NotFound, ShoalError
from shoal.files_api import FileChunk, FileSnapshot, FileSource
from shoal.index_api import IndexBuilder
from shoal.metadata.contract import Compare, Event, KeyValue, MetadataStore, Uncertain
from shoal.metadata.schema import (
    COLLECTION_ID_KEY,
    COLLECTIONS_PREFIX,
    NODES_PREFIX,
    SHARDS_PREFIX,
    CollectionRecord,
    IdRecord,
    NodeRecord,
    NodeRole,
    ShardRecord,
    shard_key,
    shard_spec,
)
from shoal.metadata.watched import Watched
from shoal.node.v1.replication_pb2 import ReplicaMessage
from shoal.settings import StorageSettings
from shoal.storage_api import ShardKey, ShardSpec
from storage_node.node import StorageNode
from storage_node.outgoing import Outgoing, clear_outgoing
from storage_node.replica import Config, Message, Timing
from storage_node.replica_wire import decode_message, encode_message
from storage_node.shard import Shard
from storage_node.shared_builder import SharedBuilder
from storage_node.transfer import discard, download, finish_install, install
from storage_node.unread import Unread

__all__ = ["ClusterNode"]

_log = telemetry.logger("member")
_RETRY_S = 1.0
_LOOK_S = 0.02  # between two looks at who waits for this node while it stops
_EXPIRE_S = 60.0  # between two looks for snapshots that nobody fetches from any more
_REPAIR_S = 10.0  # after a replica that could not be opened or deleted: a full disk, most likely


class ClusterNode:
    """A `StorageNode` and its membership.

    node_id       its name in the metadata store
    send          the bus: (to, message, bytes) -> whether it was taken
    sources       node id -> its files: of replicas that cannot come back by the log, and indexes
    builder       builds indexes here while there is no index node; None: no indexes
    metadata_lost how long ago the metadata store was last heard from, in seconds; 0 while it answers
    """

    alone = False

    def __init__(
        self,
        directory: Path,
        *,
        node_id: str,
        store: MetadataStore,
        send: Callable[[str, ReplicaMessage, int], bool],
        sources: Callable[[str], FileSource],
        metadata_lost: Callable[[], float],
        builder: IndexBuilder | None,
        settings: StorageSettings,
        timing: Timing | None = None,
    ) -> None:
        self.node = node_id
        self.timing = timing or Timing(replica_timeout_s=settings.replica_timeout_s)
        self._outgoing = Outgoing(bytes_per_s=settings.transfer_bytes_per_s_max)
        self._builder = None
        if builder is not None:
            self._builder = SharedBuilder(
                store, node_id=node_id, sources=sources, outgoing=self._outgoing, local=builder
            )
        self.storage = StorageNode(
            directory, builder=self._builder, settings=settings, membership=self
        )
        self._store, self._send, self._sources = store, send, sources
        self._metadata_lost, self._settings = metadata_lost, settings
        self._unread = Unread()
        self._fetching: dict[ShardKey, asyncio.Task[None]] = {}
        self._repairing: set[ShardKey] = set()  # reconciled again in a while
        self._records = Watched(
            store, [COLLECTIONS_PREFIX, SHARDS_PREFIX, NODES_PREFIX], on_change=self._on_change
        )
        self._others: dict[str, NodeRecord] = {}  # that run, by id
        self._departing: frozenset[str] = frozenset()  # until they are back
        self._heard = asyncio.Event()  # a record has changed
        self._collections: dict[int, CollectionRecord] = {}
        self._locks: dict[ShardKey, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = False

    # -- life -------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Open what is on the disk and in the metadata, and follow the metadata from here on. That
        the data folder belongs to this cluster was checked before."""
        self.storage.prepare()
        if self._builder is not None:
            await self._builder.start()
        await self._records.start()
        known = {key for key in self._wanted() if self.storage.folder(key).exists()}
        await self._delete_orphans(known)
        await asyncio.gather(*(self._reconcile(key) for key in self._wanted()))
        self._started = True
        for key in self._wanted():  # what changed while they were being opened
            self._spawn(self._reconcile(key))
        self._spawn(self._tick())

    async def close(self) -> None:
        await self._records.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.storage.close()
        await self._outgoing.close()
        if self._builder is not None:
            await self._builder.close()

    # -- the end of a node --------------------------------------------------------------------------
    @property
    def held_up(self) -> list[ShardKey]:
        """The shards for which others would have to wait if this node stopped now, and could be
        spared that: there is another replica in sync that goes on."""
        return [key for key in self._wanted() if self._is_missed(key)]

    def _is_missed(self, key: ShardKey) -> bool:
        found = self._record(key)
        if found is None:
            return False
        record = found[0]
        staying = {n for n in record.in_sync if n in self._others and n not in self._departing}
        if record.primary == self.node:
            monitors = any(node.role is NodeRole.MONITOR for node in self._others.values())
            return monitors and bool(staying - {self.node})
        # A primary does not stay behind as the only one, see Replica.
        alone = len(set(record.in_sync) - self._departing - {self.node}) < 2
        return self.node in record.in_sync and record.primary in staying and not alone

    async def depart(self) -> None:
        """This node is about to stop: where others can take over it takes no more writes. Returns when
        those under way are done, after limits.CLOSE_WAIT_S at most: whoever waits for one when
        another primary takes over is told that it may have happened."""
        self._tell_departing(self._departing | {self.node})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limits.CLOSE_WAIT_S):
                await asyncio.gather(*(shard.settled() for shard in self.storage.shards()))

    async def until_spared(self) -> None:
        """Return when nobody is held up any more. After `depart`, and when the record of this node
        says `draining`."""
        left = self.held_up
        while left:
            self._heard.clear()
            await self._heard.wait()
            await asyncio.sleep(_LOOK_S)  # hundreds of records may change one by one
            left = [key for key in left if self._is_missed(key)]

    def _tell_departing(self, nodes: frozenset[str]) -> None:
        if nodes != self._departing:
            self._departing = nodes
            for shard in self.storage.shards():
                shard.departing(nodes)

    def _hear_of_node(self, event: Event) -> None:
        """One that went away after it said so still counts as departing, until it is back."""
        node = event.key.removeprefix(NODES_PREFIX)
        if node == self.node:
            return  # perhaps of an earlier life; this one knows by itself
        if event.value is None:
            self._others.pop(node, None)
            return
        try:
            record = NodeRecord.from_bytes(event.key, event.value)
        except ShoalError as error:
            _log.warning("node_record_not_read", node=node, why=error.message)
            return
        self._others[node] = record
        departing = self._departing | {node} if record.draining else self._departing - {node}
        self._tell_departing(departing)

    async def _delete_orphans(self, known: set[ShardKey]) -> None:
        """Replicas of collections that were deleted while this node was away."""
        entry = await self._store.get(COLLECTION_ID_KEY)
        ids = IdRecord() if entry is None else IdRecord.from_bytes(entry.key, entry.value)
        kept = known | {
            key for key in self.storage.found_on_disk() if key.collection_id >= ids.next_id
        }
        for key in kept - known:
            _log.error("replica_unknown", folder=self.storage.folder(key))
        self.storage.delete_all_but(list(kept))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("member_task_failed", error=error)

    async def _tick(self) -> None:
        expires = 0.0
        while True:
            await asyncio.sleep(self.timing.heartbeat_s / 2)
            for shard in self.storage.shards():
                shard.tick()
            if (now := asyncio.get_running_loop().time()) >= expires:
                expires = now + _EXPIRE_S
                self._spawn(self._outgoing.expire())  # no heartbeat waits for a disk

    # -- what the records say ---------------------------------------------------------------------
    def _on_change(self, events: Sequence[Event]) -> None:
        self._heard.set()
        for event in events:
            if event.key.startswith(NODES_PREFIX):
                self._hear_of_node(event)
            elif event.key.startswith(COLLECTIONS_PREFIX):
                if event.value is not None:
                    record = CollectionRecord.from_bytes(event.key, event.value)
                    self._collections[record.id] = record
                    if self._started:
                        for key in record.shards():
                            self._spawn(self._reconcile(key))
            elif self._started and (shard := _parse(event.key)) is not None:
                self._spawn(self._reconcile(shard))

    def _wanted(self) -> list[ShardKey]:
        """Every shard that has a record."""
        found = (_parse(k) for k in self._records.entries if k.startswith(SHARDS_PREFIX))
        return [key for key in found if key is not None]

    def _record(self, key: ShardKey) -> tuple[ShardRecord, int] | None:
        entry = self._records.entries.get(shard_key(key.collection_id, key.shard))
        return None if entry is None else _read(entry)

    def _spec(self, key: ShardKey) -> ShardSpec | None:
        record = self._collections.get(key.collection_id)
        return None if record is None else shard_spec(record, key.shard)

    async def _reconcile(self, key: ShardKey) -> None:
        """Make this node agree with the record, as it is now. What a disk or the metadata store does
        not let happen is tried again: no news of the record need come."""
        try:
            async with self._locks.setdefault(key, asyncio.Lock()):
                await self._agree(key)
        except (ShoalError, OSError) as error:
            _log.error("replica_waits", shard=key, why=str(error), retry_s=_REPAIR_S)
            self._reconcile_later(key)

    async def _agree(self, key: ShardKey) -> None:
        found = self._record(key)
        shard = self.storage.find(key)
        if found is None:
            if shard is not None or self.storage.folder(key).exists():
                _log.info("replica_deleted", shard=key, why="its collection was deleted")
                await self._drop(key)
            self._locks.pop(key, None)
            return
        record, revision = found
        if self.node in record.leaving and self.node not in record.members():
            await self._leave(key, record, revision)
        elif shard is not None:
            shard.configure(self._config(record, revision))
        else:
            await self._open(key, record)

    def _reconcile_later(self, key: ShardKey) -> None:
        async def reconcile() -> None:
            await asyncio.sleep(_REPAIR_S)
            self._repairing.discard(key)
            await self._reconcile(key)

        if key not in self._repairing:
            self._repairing.add(key)
            self._spawn(reconcile())

    async def _drop(self, key: ShardKey) -> None:
        """The download first: it would make anew what is deleted."""
        fetching = self._fetching.get(key)
        if fetching is not None:
            fetching.cancel()
            await asyncio.wait([fetching])
            self._fetching.pop(key, None)  # it may not even have begun
        await self.storage.drop_shard(key)

    async def _open(self, key: ShardKey, record: ShardRecord) -> None:
        spec = self._spec(key)
        if spec is None:
            return  # the collection's record is on its way
        if self.storage.folder(key).exists():
            # A crash may have come while an empty one was being made: nothing is lost with it.
            await self._reopen(key, spec, new=self.node in record.joining)
        elif self.node in record.joining:
            _log.info("replica_joins", shard=key, primary=record.primary)
            self.storage.make_folder(key)
            await self.storage.open_shard(spec, new=True)
        elif self.node in record.in_sync and self._started:
            return  # being created; the coordinator asks for it in a moment
        elif self.node in record.in_sync:
            _log.error(
                "replica_lost",
                shard=key,
                why="this node should hold the shard and has no data for it; the others go on "
                "without it, and it gets a new copy when the monitor decides so",
            )

    async def opened(self, shard: Shard) -> None:
        """Read the record anew: an old one could make a replica follow a primary of the past."""
        key = shard.spec.key
        shard.departing(self._departing)
        while True:
            try:
                entry = await self._store.get(shard_key(key.collection_id, key.shard))
            except ShoalError as error:
                _log.warning("record_not_read", shard=key, why=error.message)
                await asyncio.sleep(_RETRY_S)
                continue
            if entry is not None:
                shard.configure(self._config(*_read(entry)))
            return

    def _config(self, record: ShardRecord, revision: int) -> Config:
        collection = self._collections.get(record.collection_id)
        factor = None if collection is None else collection.request().write_consistency_factor
        return Config(
            revision,
            record.term,
            record.primary,
            frozenset(record.in_sync),
            frozenset(record.joining),
            writers_min=factor or 1,
        )

    async def _leave(self, key: ShardKey, record: ShardRecord, revision: int) -> None:
        _log.info("replica_deleted", shard=key, why="the cluster has enough copies without it")
        await self._drop(key)
        left = record.model_copy(update={"leaving": [n for n in record.leaving if n != self.node]})
        # When it was changed meanwhile, it comes again.
        await self._store.txn([Compare(record.key, revision)], {record.key: left.to_bytes()})

    # -- what replicas ask of their node ----------------------------------------------------------
    @property
    def metadata_lost_s(self) -> float:
        return self._metadata_lost()

    def send(self, shard: ShardKey, to: str, message: Message) -> None:
        body = encode_message(message)
        envelope = ReplicaMessage(
            sender=self.node,
            to=to,
            collection_id=shard.collection_id,
            shard=shard.shard,
            body=body,
        )
        self._send(to, envelope, len(body))  # a lost one is sent again when nobody answers

    def deliver(self, message: ReplicaMessage) -> None:
        """From the bus. Raises BadRequest for what no replica of this version says; the shard's
        status tells of it, see ReplicaStatus.unread."""
        if message.to != self.node:
            raise BadRequest(f"Bad request: a message for {message.to!r} came to {self.node!r}")
        key = ShardKey(message.collection_id, message.shard)
        shard = self.storage.find(key)
        if shard is None:
            return
        try:
            said = decode_message(message.body)
        except BadRequest:
            self._unread.note(key, message.sender, time.monotonic())
            raise
        shard.receive(message.sender, said)

    def unread(self, shard: ShardKey) -> str:
        return self._unread.sender(shard, time.monotonic())

    async def propose(self, shard: ShardKey, config: Config) -> Config:
        """Returns the record as it is afterwards, ours or another. An uncertain change is repeated:
        both tries compare the same revision, so it happens once at most, and when the second one is
        refused the record tells which it was."""
        key = shard_key(shard.collection_id, shard.shard)
        entry = await self._store.get(key)
        if entry is None:
            raise NotFound(f"the record {key} is gone: its collection was deleted")
        record, revision = _read(entry)
        if revision != config.revision:
            return self._config(record, revision)
        changed = record.model_copy(
            update={
                "term": config.term,
                "primary": config.primary,
                "in_sync": sorted(config.in_sync),
                "joining": sorted(config.joining),
            }
        )
        while True:
            try:
                done = await self._store.txn([Compare(key, revision)], {key: changed.to_bytes()})
            except Uncertain:
                await asyncio.sleep(_RETRY_S)
                continue
            break
        if done.ok:
            _log.info("record_changed", shard=key, term=config.term, in_sync=sorted(config.in_sync))
            return self._config(changed, done.revision)
        entry = await self._store.get(key)
        if entry is None:
            raise NotFound(f"the record {key} is gone: its collection was deleted")
        return self._config(*_read(entry))

    # -- files of replicas ------------------------------------------------------------------------
    def fetch_files(self, shard: ShardKey, source: str) -> None:
        if shard not in self._fetching:
            self._fetching[shard] = self._spawn(self._join_by_files(shard, source))

    async def _join_by_files(self, key: ShardKey, source: str) -> None:
        """Take over the files of the primary; the log from there on then comes by itself. Without
        success the replica is opened anew as it was: the primary says again that it needs files, and
        the download goes on where it ended."""
        complete = False
        try:
            complete = await self._download(key, source)
            async with self._locks.setdefault(key, asyncio.Lock()):
                found, spec = self._record(key), self._spec(key)
                if found is None or spec is None:
                    return  # deleted meanwhile
                await self.storage.close_shard(key)
                if self.node not in found[0].joining:
                    await asyncio.to_thread(discard, self.storage.folder(key))
                elif complete:
                    await asyncio.to_thread(install, self.storage.folder(key))
                await self._reopen(key, spec)
        except (ShoalError, OSError) as error:
            _log.error("replica_not_taken_over", shard=key, why=str(error), retry_s=_REPAIR_S)
            self._reconcile_later(key)
        finally:
            self._fetching.pop(key, None)

    async def _download(self, key: ShardKey, source: str) -> bool:
        """Whether everything is here. No error of disk, wire or ours may keep the replica from being
        opened again: its part in the replication is over."""
        _log.info("replica_is_fetched", shard=key, source=source)
        try:
            await download(
                self._sources(source),
                key,
                self.storage.folder(key),
                disk_free_bytes_min=self._settings.disk_free_bytes_min,
            )
            return True
        except (ShoalError, OSError, InvariantError) as error:
            _log.warning("replica_not_fetched", shard=key, source=source, why=str(error))
            await asyncio.sleep(_RETRY_S)
            return False

    async def _reopen(self, key: ShardKey, spec: ShardSpec, *, new: bool = False) -> None:
        folder = self.storage.folder(key)
        await asyncio.to_thread(finish_install, folder)
        await asyncio.to_thread(clear_outgoing, folder)
        await self.storage.open_shard(spec, new=new)

    async def snapshot(self, shard: ShardKey) -> FileSnapshot:
        """The files of a replica here, see shoal/files_api.py."""
        found = self.storage.find(shard)
        if found is None:
            raise NotFound(f"shard {shard.shard} of {shard.collection_id} is not on {self.node}")
        found.check_serving()
        return await self._outgoing.snapshot(found.folder, lambda: found.manifest)

    def fetch(self, snapshot_id: str, path: str, offset: int) -> AsyncIterator[FileChunk]:
        return self._outgoing.fetch(snapshot_id, path, offset)

    async def release(self, snapshot_id: str) -> None:
        await self._outgoing.release(snapshot_id)


def _parse(key: str) -> ShardKey | None:
    parts = key.removeprefix(SHARDS_PREFIX).split("/")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        return None
    return ShardKey(int(parts[0]), int(parts[1]))


def _read(entry: KeyValue) -> tuple[ShardRecord, int]:
    return ShardRecord.from_bytes(entry.key, entry.value), entry.revision
