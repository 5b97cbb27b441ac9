"""A storage node: the shard replicas of one folder, behind `shoal.storage_api.Node`.

    shards/{collection_id}/{shard}/   see storage_node/shard.py

Which replicas there should be, and who is primary, is not decided here: alone on one machine every
shard is this node's (`Alone`); in a cluster storage_node/member.py follows the metadata.

A damaged shard is stopped, not the node. Reads that are expected to be short run where they are
called, on the event loop: a hop to another thread costs more than they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shoal import telemetry
from shoal.api.filter import Filter
from shoal.batch import PointBatch
from shoal.errors import InvariantError, NotFound, NotPrimary, Unavailable
from shoal.faiss_index import use_one_thread
from shoal.ids import PointIds
from shoal.index_api import IndexBuilder
from shoal.metadata.schema import LOCAL_NODE
from shoal.settings import StorageSettings
from shoal.storage_api import (
    FreshRead,
    Guard,
    Hits,
    ReplicaStatus,
    Scroll,
    Search,
    ShardInfo,
    ShardKey,
    ShardSpec,
    Write,
    WriteResult,
)
from storage_node.bitmap_cache import SHARED
from storage_node.files import sync_folder
from storage_node.lanes import Lanes
from storage_node.replica import Config, Message, Timing
from storage_node.searching import (
    count_points,
    expected_floats,
    is_quick,
    scroll,
    search,
    take_rows,
)
from storage_node.shard import Membership, Shard
from storage_node.state import ShardState

__all__ = ["Alone", "StorageNode"]

_log = telemetry.logger("storage")
_INLINE_FLOATS_MAX = 1_500_000  # about 0.3 ms of scanning: below, a thread costs more than it gives
_INLINE_TAKE_MAX = 500
_NOW = Guard()  # whatever this replica has applied


class Alone:
    """Membership of a node without others: it is the primary of everything, and its disk decides."""

    node = LOCAL_NODE
    incarnation = 0
    alone = True
    timing = Timing(lease_s=0.0)
    metadata_lost_s = 0.0

    async def opened(self, shard: Shard) -> None:
        only = frozenset((self.node,))
        shard.configure(Config(1, max(1, shard.term), self.node, only))

    def send(self, shard: ShardKey, to: str, message: Message) -> None:
        raise InvariantError(f"a message to {to}, and there are no other nodes")

    async def propose(self, shard: ShardKey, config: Config) -> Config:
        raise InvariantError("a change of a record that does not exist")

    def fetch_files(self, shard: ShardKey, source: str) -> None:
        raise InvariantError(f"files wanted from {source}, and there are no other nodes")

    def unread(self, shard: ShardKey) -> str:
        return ""


class StorageNode:
    def __init__(
        self,
        directory: Path,
        *,
        builder: IndexBuilder | None,
        settings: StorageSettings,
        membership: Membership | None = None,
    ) -> None:
        self.directory, self._builder, self._settings = directory, builder, settings
        self._membership: Membership = membership or Alone()
        self._lanes = Lanes()
        SHARED.bytes_max = settings.filter_cache_bytes_max
        self._shards: dict[ShardKey, Shard] = {}
        self._creating: dict[ShardKey, asyncio.Future[None]] = {}
        self._dropping: dict[ShardKey, asyncio.Future[None]] = {}

    async def start(self, specs: Sequence[ShardSpec]) -> None:
        """Open the shards that the catalog knows, and delete what it does not know: a collection
        that was deleted, or one whose creation never ended."""
        self.prepare()
        self.delete_all_but([spec.key for spec in specs])
        await asyncio.gather(*(self.open_shard(spec, new=False) for spec in specs))

    def prepare(self) -> None:
        """Before anything is opened."""
        use_one_thread()
        _allow_many_files()
        self.directory.mkdir(parents=True, exist_ok=True)

    def found_on_disk(self) -> list[ShardKey]:
        """The replicas that have a folder here, open or not."""
        return [
            ShardKey(int(folder.parent.name), int(folder.name))
            for folder in sorted(self.directory.glob("*/*"))
            if folder.parent.name.isdigit() and folder.name.isdigit()
        ]

    def delete_all_but(self, wanted: Sequence[ShardKey]) -> None:
        for key in set(self.found_on_disk()) - set(wanted):
            _log.warning("orphan_deleted", folder=self.folder(key))
            shutil.rmtree(self.folder(key))
        for collection in self.directory.glob("[0-9]*"):
            with contextlib.suppress(OSError):  # not empty: it has shards
                collection.rmdir()

    async def close(self) -> None:
        for creating in list(self._creating.values()):
            creating.cancel()  # the metadata store may not answer
            await asyncio.wait([creating])
        await asyncio.gather(*(shard.close() for shard in self._shards.values()))
        self._shards.clear()
        await self._lanes.close()

    async def open_shard(self, spec: ShardSpec, *, new: bool, fresh: bool = False) -> Shard:
        """Open the replica in its folder. new: there may be nothing yet. fresh: see Replica."""
        shard = Shard(
            self.folder(spec.key),
            spec,
            self._settings,
            self._builder,
            self._lanes,
            self._membership,
        )
        self._shards[spec.key] = shard
        await shard.open(new=new, fresh=fresh)
        await self._membership.opened(shard)
        return shard

    async def close_shard(self, key: ShardKey) -> None:
        """Its folder is left as it is."""
        shard = self._shards.pop(key, None)
        if shard is not None:
            await shard.close()

    def make_folder(self, key: ShardKey) -> None:
        """For a new replica. Its name is durable when this returns."""
        folder = self.folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        for parent in (folder.parent, self.directory):
            sync_folder(parent)

    def folder(self, key: ShardKey) -> Path:
        return self.directory / str(key.collection_id) / str(key.shard)

    def shards(self) -> list[Shard]:
        return list(self._shards.values())

    def find(self, key: ShardKey) -> Shard | None:
        return self._shards.get(key)

    def _shard(self, key: ShardKey) -> Shard:
        shard = self._shards.get(key)
        if shard is None:
            kind = NotFound if self._membership.alone else NotPrimary  # another node may have it
            raise kind(f"shard {key.shard} of collection {key.collection_id} is not on this node")
        shard.check_serving()
        return shard

    async def _readable(self, key: ShardKey, guard: Guard) -> ShardState:
        shard = self._shard(key)
        if not shard.may_answer(guard):
            await shard.become_fresh(guard)
        return shard.state

    # -- Node -------------------------------------------------------------------------------------
    async def create_shard(self, spec: ShardSpec) -> None:
        """It is there, and knows its configuration, when this returns. What was begun is done to the
        end, also when the caller goes away: half a replica would be taken for a whole one."""
        creating = self._creating.get(spec.key)
        if creating is None:
            found = self._shards.get(spec.key)
            if found is not None:
                found.check_serving()
                return
            creating = self._creating[spec.key] = asyncio.ensure_future(self._create(spec))
            creating.add_done_callback(lambda done: self._created(spec.key, done))
        await asyncio.shield(creating)

    def _created(self, shard: ShardKey, done: asyncio.Future[None]) -> None:
        del self._creating[shard]
        if not done.cancelled() and (error := done.exception()) is not None:
            _log.warning("shard_not_created", shard=shard, why=str(error))

    async def _create(self, spec: ShardSpec) -> None:
        self.make_folder(spec.key)
        shard = await self.open_shard(spec, new=True, fresh=True)
        if shard.stopped is not None:  # the disk is full, most likely: leave nothing half made
            await self._drop(spec.key)
            raise shard.stop_error or Unavailable(shard.stopped)

    async def drop_shard(self, shard: ShardKey) -> None:
        """Gone when it returns; reads under way finish on their maps. Unknown: nothing to do. Asked
        twice at once (by a coordinator, and by the record that is gone) it is done once."""
        dropping = self._dropping.get(shard)
        if dropping is None:
            dropping = self._dropping[shard] = asyncio.ensure_future(self._drop_whole(shard))
            dropping.add_done_callback(lambda _: self._dropping.pop(shard, None))
        await asyncio.shield(dropping)

    async def _drop_whole(self, shard: ShardKey) -> None:
        if (creating := self._creating.get(shard)) is not None:
            await asyncio.wait([creating])
        await self._drop(shard)

    async def _drop(self, shard: ShardKey) -> None:
        found = self._shards.pop(shard, None)
        if found is not None:
            await found.close()
        folder = self.folder(shard)

        def remove() -> None:
            if folder.exists():
                shutil.rmtree(folder)
            with contextlib.suppress(OSError):  # its collection has other shards
                folder.parent.rmdir()

        await self._lanes.files(remove)

    async def write(self, shard: ShardKey, op: Write) -> WriteResult:
        return await self._shard(shard).write(op)

    async def search(self, shard: ShardKey, query: Search, guard: Guard = _NOW) -> FreshRead[Hits]:
        state = await self._readable(shard, guard)
        applied, snapshot = state.applied, state.snapshot()
        few = expected_floats(snapshot, query) <= _INLINE_FLOATS_MAX
        if few and is_quick(snapshot, query.filter):
            return FreshRead(search(snapshot, query), applied)
        return FreshRead(await self._lanes.search(search, snapshot, query), applied)

    async def scroll(
        self, shard: ShardKey, query: Scroll, guard: Guard = _NOW
    ) -> FreshRead[PointBatch]:
        state = await self._readable(shard, guard)
        applied, snapshot = state.applied, state.snapshot()
        if query.limit <= 100 and is_quick(snapshot, query.filter):
            return FreshRead(scroll(snapshot, query), applied)
        return FreshRead(await self._lanes.search(scroll, snapshot, query), applied)

    async def count(
        self, shard: ShardKey, filter: Filter | None, guard: Guard = _NOW
    ) -> FreshRead[int]:
        state = await self._readable(shard, guard)
        applied = state.applied
        if filter is None:
            return FreshRead(state.point_count, applied)
        counted = await self._lanes.search(count_points, state.snapshot(), filter)
        return FreshRead(counted, applied)

    async def retrieve(
        self,
        shard: ShardKey,
        ids: PointIds,
        with_payload: bool,
        with_vectors: bool | tuple[str, ...],
        guard: Guard = _NOW,
    ) -> FreshRead[PointBatch]:
        state = await self._readable(shard, guard)
        applied, snapshot = state.applied, state.snapshot()
        places = [place for place in state.locate(ids) if place is not None]
        if len(places) <= _INLINE_TAKE_MAX:
            return FreshRead(take_rows(snapshot, places, with_payload, with_vectors), applied)
        taken = await self._lanes.search(take_rows, snapshot, places, with_payload, with_vectors)
        return FreshRead(taken, applied)

    async def status(self) -> list[ReplicaStatus]:
        lost_s = self._membership.metadata_lost_s
        unread = self._membership.unread
        return [
            replace(shard.status(lost_s), unread=unread(key)) for key, shard in self._shards.items()
        ]

    async def info(self, shard: ShardKey) -> ShardInfo:
        found = self._shards.get(shard)
        if found is None:
            raise NotFound(f"shard {shard.shard} of collection {shard.collection_id} is not here")
        return found.info()


def _allow_many_files() -> None:
    """A mapped segment holds four descriptors, and the usual soft limit is 1,024: take the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        wanted = hard if hard != resource.RLIM_INFINITY else max(soft, 1 << 20)
        with contextlib.suppress(ValueError, OSError):  # macOS has a lower bound of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
