"""Indexes from index nodes: one is built for all replicas of a shard, away from the searches.

    first replica   offers its file of vectors, writes the job into the metadata
    the others      find the job
    all             wait until it is done, fetch the index, check it
    the index node  deletes the job when that is a while ago (limits.INDEX_ARTIFACT_KEEP_S)

A replica that waits repairs what others left behind: it offers its own file when the source is gone,
and puts a job back whose index node is gone. Without any index node, or after too many failures, it
builds for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from shoal import limits, telemetry
from shoal.errors import NotFound, ShoalError, Unavailable
from shoal.files_api import FileSource, fetch_file
from shoal.index_api import BuildJob, IndexBuilder, IndexOf
from shoal.metadata.contract import Compare, Event, MetadataStore
from shoal.metadata.schema import (
    INDEX_JOBS_PREFIX,
    NODES_PREFIX,
    IndexJobRecord,
    IndexJobState,
    NodeRecord,
    NodeRole,
    index_job_key,
    node_key,
)
from shoal.metadata.watched import Watched
from storage_node.files import checked_sum
from storage_node.outgoing import Outgoing

__all__ = ["SharedBuilder"]

_log = telemetry.logger("index")
_LOOK_S = 2.0  # also without news: a node that is gone makes none


class SharedBuilder:
    """Implements `IndexBuilder` for the replicas of one node of a cluster.

    sources   node id -> its files: index nodes, for what they built
    outgoing  where this node's files are offered
    local     builds here when nobody else does
    """

    def __init__(
        self,
        store: MetadataStore,
        *,
        node_id: str,
        sources: Callable[[str], FileSource],
        outgoing: Outgoing,
        local: IndexBuilder,
    ) -> None:
        self._store, self._node_id = store, node_id
        self._sources, self._outgoing, self._local = sources, outgoing, local
        self._changed = asyncio.Event()
        self._watched = Watched(store, [INDEX_JOBS_PREFIX, NODES_PREFIX], on_change=self._on_change)
        self._alone_since: float | None = None

    async def start(self) -> None:
        await self._watched.start()

    async def close(self) -> None:
        await self._watched.close()
        await self._local.close()

    def _on_change(self, _: Sequence[Event]) -> None:
        self._changed.set()

    async def build(self, job: BuildJob) -> None:
        if job.of is None:
            await self._local.build(job)
            return
        offer = _Offer(self._outgoing)
        try:
            while not await self._advance(job, job.of, offer):
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await self._changed.wait()
        finally:
            await offer.release()

    async def _advance(self, job: BuildJob, of: IndexOf, offer: _Offer) -> bool:
        """One look at the job; True when the index is there."""
        entry = await self._store.get(index_job_key(of.shard, of.segment, of.file))
        if self._nobody_builds():
            _log.info("index_built_here", job=str(of), why="there is no index node")
            await self._local.build(job)
            return True
        if entry is None:
            await self._ask(job, of, offer)
            return False
        record = IndexJobRecord.from_bytes(entry.key, entry.value)
        if record.failures >= limits.INDEX_JOB_FAILURES_MAX or not await offer.fits(job, record):
            await self._local.build(job)
            return True
        if record.state is IndexJobState.DONE:
            return await self._fetch(job, record, entry.revision)
        if record.state is IndexJobState.BUILDING:
            return False  # whoever builds it, or the next index node, says what became of it
        if not record.source or (
            record.source != self._node_id and not self._is_alive(record.source, None)
        ):
            mine = await offer.make(job)
            changed = record.model_copy(update={"source": self._node_id, "offer": mine})
            await self._change(entry.revision, changed)
        elif record.source == self._node_id and record.offer != offer.id:
            # Ours, from before a restart: that offer is gone.
            mine = await offer.make(job)
            await self._change(entry.revision, record.model_copy(update={"offer": mine}))
        return False

    async def _ask(self, job: BuildJob, of: IndexOf, offer: _Offer) -> None:
        mine = await offer.make(job)
        record = IndexJobRecord(
            collection_id=of.shard.collection_id,
            shard=of.shard.shard,
            segment=of.segment,
            file=of.file,
            vectors=await offer.sums(job),
            count=job.count,
            dim=job.dim,
            distance=job.distance,
            m=job.m,
            ef_construct=job.ef_construct,
            source=self._node_id,
            offer=mine,
        )
        await self._change(0, record)

    async def _change(self, revision: int, record: IndexJobRecord) -> None:
        """Lost races are seen at the next look."""
        await self._store.txn([Compare(record.key, revision)], {record.key: record.to_bytes()})

    async def _fetch(self, job: BuildJob, record: IndexJobRecord, revision: int) -> bool:
        assert record.artifact is not None
        expected = record.artifact.size, record.artifact.crc32c
        try:
            source = self._sources(record.owner)
            await fetch_file(source, record.key, record.file, job.output, expected)
        except (Unavailable, NotFound) as error:
            if isinstance(error, NotFound) or not self._is_alive(record.owner, record.incarnation):
                _log.warning("index_lost", job=record.key, owner=record.owner, why=error.message)
                again = record.model_copy(
                    update={
                        "state": IndexJobState.WAITING,
                        "owner": "",
                        "incarnation": "",
                        "artifact": None,
                        "source": "",
                        "offer": "",
                    }
                )
                await self._change(revision, again)
            return False
        _log.info("index_fetched", job=record.key, owner=record.owner)
        return True

    def _is_alive(self, node: str, incarnation: str | None) -> bool:
        entry = self._watched.entries.get(node_key(node))
        if entry is None:
            return False
        found = NodeRecord.from_bytes(entry.key, entry.value)
        return incarnation is None or found.incarnation == incarnation

    def _nobody_builds(self) -> bool:
        """There has been no index node for a while."""
        nodes = (
            NodeRecord.from_bytes(key, entry.value)
            for key, entry in self._watched.entries.items()
            if key.startswith(NODES_PREFIX)
        )
        now = asyncio.get_running_loop().time()
        if any(node.role is NodeRole.INDEX and not node.draining for node in nodes):
            self._alone_since = None
            return False
        if self._alone_since is None:
            self._alone_since = now
        return now - self._alone_since >= limits.INDEX_JOB_WAIT_S


class _Offer:
    """This node's file of vectors, held for index nodes while the build is waited for."""

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self.id: str | None = None
        self._sums: tuple[int, int] | None = None

    async def make(self, job: BuildJob) -> str:
        if self.id is None:
            shard_folder: Path = job.vectors.parents[2]  # shard/segments/{id}/vectors.N
            self.id = await self._outgoing.offer(shard_folder, job.vectors)
        return self.id

    async def sums(self, job: BuildJob) -> tuple[int, int]:
        if self._sums is None:
            self._sums = await asyncio.to_thread(checked_sum, job.vectors)
        return self._sums

    async def fits(self, job: BuildJob, record: IndexJobRecord) -> bool:
        """Whether the job is about the same vectors as we have. It always is while replicas agree."""
        if tuple(record.vectors) == await self.sums(job):
            return True
        _log.error("index_of_other_vectors", job=record.key)
        return False

    async def release(self) -> None:
        if self.id is not None:
            with contextlib.suppress(ShoalError):
                await self._outgoing.release(self.id)
