"""A storage node: the shards of one folder, behind `shoal.storage_api.Storage`.

    shards/{collection_id}/{shard}/   see storage_node/shard.py

A damaged shard is stopped, not the node. Reads that are expected to be short run where they are
called, on the event loop: a hop to another thread costs more than they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path

from shoal import telemetry
from shoal.api.filter import Filter
from shoal.batch import PointBatch
from shoal.errors import AlreadyExists, NotFound, Unavailable
from shoal.faiss_index import use_one_thread
from shoal.ids import PointIds
from shoal.index_api import IndexBuilder
from shoal.settings import StorageSettings
from shoal.storage_api import (
    Hits,
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
from storage_node.searching import (
    count_points,
    expected_floats,
    is_quick,
    scroll,
    search,
    take_rows,
)
from storage_node.shard import Shard

__all__ = ["StorageNode"]

_log = telemetry.logger("storage")
_INLINE_FLOATS_MAX = 1_500_000  # about 0.3 ms of scanning: below, a thread costs more than it gives
_INLINE_TAKE_MAX = 500


class StorageNode:
    def __init__(
        self, directory: Path, *, builder: IndexBuilder | None, settings: StorageSettings
    ) -> None:
        self._directory, self._builder, self._settings = directory, builder, settings
        self._lanes = Lanes()
        SHARED.bytes_max = settings.filter_cache_bytes_max
        self._shards: dict[ShardKey, Shard] = {}

    async def start(self, specs: Sequence[ShardSpec]) -> None:
        """Open the shards that the catalog knows, and delete what it does not know: a collection
        that was deleted, or one whose creation never ended."""
        use_one_thread()
        _allow_many_files()
        self._directory.mkdir(parents=True, exist_ok=True)
        wanted = {str(self._folder(spec.key).relative_to(self._directory)) for spec in specs}
        for collection in self._directory.iterdir():
            for folder in collection.iterdir():
                if str(folder.relative_to(self._directory)) not in wanted:
                    _log.warning("orphan_deleted", folder=folder)
                    shutil.rmtree(folder)
            if not any(collection.iterdir()):
                collection.rmdir()
        await asyncio.gather(*(self._open(spec, new=False) for spec in specs))

    async def close(self) -> None:
        await asyncio.gather(*(shard.close() for shard in self._shards.values()))
        self._shards.clear()
        await self._lanes.close()

    async def _open(self, spec: ShardSpec, *, new: bool) -> None:
        shard = Shard(self._folder(spec.key), spec, self._settings, self._builder, self._lanes)
        self._shards[spec.key] = shard
        await shard.open(new=new)

    def _folder(self, key: ShardKey) -> Path:
        return self._directory / str(key.collection_id) / str(key.shard)

    def _shard(self, key: ShardKey) -> Shard:
        shard = self._shards.get(key)
        if shard is None:
            raise NotFound(
                f"shard {key.shard} of collection {key.collection_id} is not on this node"
            )
        shard.check_serving()
        return shard

    # -- Storage ----------------------------------------------------------------------------------
    async def create_shard(self, spec: ShardSpec) -> None:
        if spec.key in self._shards:
            raise AlreadyExists(f"shard {spec.key} exists on this node")
        folder = self._folder(spec.key)
        folder.mkdir(parents=True, exist_ok=True)
        for parent in (folder.parent, self._directory):
            sync_folder(parent)
        await self._open(spec, new=True)
        shard = self._shards[spec.key]
        if shard.stopped is not None:  # the disk is full, most likely: leave nothing half made
            await self.drop_shard(spec.key)
            raise shard.stop_error or Unavailable(shard.stopped)

    async def drop_shard(self, shard: ShardKey) -> None:
        """Gone when it returns; reads under way finish on their maps. Unknown: nothing to do."""
        found = self._shards.pop(shard, None)
        if found is not None:
            await found.close()
        folder = self._folder(shard)

        def remove() -> None:
            if folder.exists():
                shutil.rmtree(folder)
            with contextlib.suppress(OSError):  # its collection has other shards
                folder.parent.rmdir()

        await self._lanes.files(remove)

    async def write(self, shard: ShardKey, op: Write) -> WriteResult:
        return await self._shard(shard).write(op)

    async def search(self, shard: ShardKey, query: Search) -> Hits:
        snapshot = self._shard(shard).state.snapshot()
        few = expected_floats(snapshot, query) <= _INLINE_FLOATS_MAX
        if few and is_quick(snapshot, query.filter):
            return search(snapshot, query)
        return await self._lanes.search(search, snapshot, query)

    async def scroll(self, shard: ShardKey, query: Scroll) -> PointBatch:
        snapshot = self._shard(shard).state.snapshot()
        if query.limit <= 100 and is_quick(snapshot, query.filter):
            return scroll(snapshot, query)
        return await self._lanes.search(scroll, snapshot, query)

    async def count(self, shard: ShardKey, filter: Filter | None) -> int:
        state = self._shard(shard).state
        if filter is None:
            return state.point_count
        return await self._lanes.search(count_points, state.snapshot(), filter)

    async def retrieve(
        self,
        shard: ShardKey,
        ids: PointIds,
        with_payload: bool,
        with_vectors: bool | tuple[str, ...],
    ) -> PointBatch:
        state = self._shard(shard).state
        snapshot, places = state.snapshot(), [p for p in state.locate(ids) if p is not None]
        if len(places) <= _INLINE_TAKE_MAX:
            return take_rows(snapshot, places, with_payload, with_vectors)
        return await self._lanes.search(take_rows, snapshot, places, with_payload, with_vectors)

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
