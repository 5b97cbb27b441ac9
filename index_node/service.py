"""An index node: takes jobs from the metadata, builds, and gives the result away.

    claim (compare-and-swap) → fetch the vectors from a replica → child process builds → checked
    → the record says "done", and where → replicas fetch it → the record and the file go

One job at a time, with all the threads that the settings allow. Nothing is kept over a restart: what
was being built is taken by another index node as soon as this one's registration is gone, and a
finished index that nobody could fetch is built again.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import grpc.aio

from index_node.jobs import claimed, failed, next_job
from shoal import limits, telemetry
from shoal.errors import BadRequest, NotFound, ShoalError
from shoal.files_api import FileChunk, FileSource, fetch_file
from shoal.index_api import BuildJob, IndexBuilder
from shoal.metadata.contract import Compare, KeyValue, MetadataStore
from shoal.metadata.schema import (
    INDEX_JOBS_PREFIX,
    NODES_PREFIX,
    IndexArtifact,
    IndexJobRecord,
    IndexJobState,
    NodeRecord,
    NodeRole,
)
from shoal.metadata.watched import Watched
from shoal.node.v1 import node_pb2 as pb
from shoal.rpc import codec
from shoal.rpc.faults import rpc_code, to_trailer

__all__ = ["IndexNode"]

_log = telemetry.logger("index")
_RETRY_S = 1.0
_JANITOR_S = 10.0


class IndexNode:
    """node_id, incarnation  as registered: others take this node's jobs when that is gone
    sources                  node id -> the files that it offers
    scratch                  an empty folder of its own; needs room for one file of vectors
    """

    def __init__(
        self,
        store: MetadataStore,
        *,
        node_id: str,
        incarnation: str,
        sources: Callable[[str], FileSource],
        builder: IndexBuilder,
        scratch: Path,
        threads: int,
    ) -> None:
        self._store, self._sources, self._builder = store, sources, builder
        self._node_id, self._incarnation = node_id, incarnation
        self._scratch, self._threads = scratch, threads
        self._changed = asyncio.Event()
        self._watched = Watched(
            store, [INDEX_JOBS_PREFIX, NODES_PREFIX], on_change=lambda _: self._changed.set()
        )
        self._artifacts: dict[str, tuple[Path, float]] = {}  # key of the job -> file, since when
        self._built = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        await self._watched.start()
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._clean())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._watched.close()

    # -- building ---------------------------------------------------------------------------------
    async def _work(self) -> None:
        while True:
            self._changed.clear()
            try:
                found = next_job(self._jobs(), self._incarnations())
                if found is None:
                    await self._changed.wait()
                else:
                    await self._take(*found)
            except Exception as error:  # ours too: who is alive and idle helps nobody
                _log.error("index_job_failed", error=error)
                await asyncio.sleep(_RETRY_S)

    def _jobs(self) -> list[tuple[IndexJobRecord, int]]:
        entries = self._watched.entries
        return [_read(e) for key, e in entries.items() if key.startswith(INDEX_JOBS_PREFIX)]

    def _incarnations(self) -> set[str]:
        entries = self._watched.entries
        nodes = [
            NodeRecord.from_bytes(key, entry.value)
            for key, entry in entries.items()
            if key.startswith(NODES_PREFIX)
        ]
        return {node.incarnation for node in nodes if node.role is NodeRole.INDEX} | {
            self._incarnation
        }

    async def _take(self, job: IndexJobRecord, revision: int) -> None:
        mine = claimed(job, self._node_id, self._incarnation)
        done = await self._store.txn([Compare(job.key, revision)], {job.key: mine.to_bytes()})
        if not done.ok:
            await self._seen(done.revision)
            return
        started = time.monotonic()
        try:
            output = await self._build(mine)
            size, crc = await asyncio.to_thread(_sum, output)
        except _SourceGone as error:
            _log.warning("index_source_gone", job=job.key, why=str(error))
            await self._end(mine, lambda job: failed(job, source_gone=True))
        except Exception as error:  # a full disk too: as long as it is ours nobody else takes it
            _log.error("index_failed", job=job.key, error=error)
            await self._end(mine, lambda job: failed(job, source_gone=False))
        else:
            artifact = IndexArtifact(
                size=size, crc32c=crc, built_on="cpu", seconds=time.monotonic() - started
            )
            self._artifacts[job.key] = output, time.monotonic()
            _log.info("index_built", job=job.key, rows=job.count, seconds=artifact.seconds)
            finished = {"state": IndexJobState.DONE, "artifact": artifact}
            await self._end(mine, lambda job: job.model_copy(update=finished))

    async def _end(
        self, mine: IndexJobRecord, after: Callable[[IndexJobRecord], IndexJobRecord]
    ) -> None:
        """Write down how it ended, if the job still is ours; replicas may have changed its source.
        Until that has worked nobody else takes the job: we are alive."""
        while True:
            try:
                entry = await self._store.get(mine.key)
                if entry is None:
                    return
                job, revision = _read(entry)
                if job.incarnation != self._incarnation:
                    return
                done = await self._store.txn(
                    [Compare(job.key, revision)], {job.key: after(job).to_bytes()}
                )
            except ShoalError as error:
                _log.warning("index_job_not_ended", job=mine.key, why=error.message)
                await asyncio.sleep(_RETRY_S)
                continue
            if done.ok:
                await self._seen(done.revision)
                return

    async def _seen(self, revision: int) -> None:
        """Wait a moment for the watch to show that change: else the same job is tried again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RETRY_S):
                while self._watched.revision < revision:
                    self._changed.clear()
                    await self._changed.wait()

    async def _build(self, job: IndexJobRecord) -> Path:
        self._built += 1
        folder = self._scratch / str(self._built)
        folder.mkdir()
        vectors, output = folder / "vectors", folder / job.file
        try:
            try:
                source = self._sources(job.source)
                await fetch_file(source, job.offer, _offered(job), vectors, job.vectors)
            except ShoalError as error:
                raise _SourceGone(error.message) from error
            await self._builder.build(
                BuildJob(
                    vectors=vectors,
                    count=job.count,
                    dim=job.dim,
                    distance=job.distance,
                    m=job.m,
                    ef_construct=job.ef_construct,
                    output=output,
                    threads=self._threads,
                )
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        vectors.unlink()
        return output

    # -- giving away ------------------------------------------------------------------------------
    async def fetch(self, snapshot_id: str, path: str, offset: int) -> AsyncIterator[FileChunk]:
        """The finished index of the job `snapshot_id` (the key of its record)."""
        found = self._artifacts.get(snapshot_id)
        if found is None or path != found[0].name:
            raise NotFound(f"{snapshot_id} is not built here, or no longer kept")
        with found[0].open("rb") as file:
            if not 0 <= offset <= found[0].stat().st_size:
                raise BadRequest(f"Bad request: offset {offset} is outside the file")
            file.seek(offset)
            while data := await asyncio.to_thread(file.read, limits.TRANSFER_CHUNK_BYTES):
                yield FileChunk(offset, data, google_crc32c.value(data))
                offset += len(data)

    def handlers(self) -> grpc.GenericRpcHandler:
        """`Fetch` of proto/shoal/node/v1, as far as an index node has it."""

        async def serve(request: pb.FetchRequest, context: Any) -> AsyncIterator[bytes]:
            try:
                async for chunk in self.fetch(request.snapshot_id, request.path, request.offset):
                    yield codec.encode_chunk(chunk).SerializeToString()
            except ShoalError as error:
                await context.abort(rpc_code(error), error.message, to_trailer(error))

        fetch: Any = grpc.unary_stream_rpc_method_handler(serve, pb.FetchRequest.FromString, None)
        return grpc.method_handlers_generic_handler("shoal.node.v1.StorageNode", {"Fetch": fetch})

    async def _clean(self) -> None:
        """What was built is kept for a while; then record and file go. So does a job that has had no
        source for so long, or that nobody builds any more: nobody waits for it."""
        unwanted: dict[str, float] = {}  # key -> since when, as seen here
        while True:
            await asyncio.sleep(_JANITOR_S)
            now, records = time.monotonic(), {job.key: (job, r) for job, r in self._jobs()}
            for key, (path, since) in list(self._artifacts.items()):
                if now - since < limits.INDEX_ARTIFACT_KEEP_S and key in records:
                    continue
                job, revision = records.get(key, (None, 0))
                if job is not None and job.incarnation == self._incarnation:
                    await self._delete(key, revision)
                del self._artifacts[key]
                await asyncio.to_thread(shutil.rmtree, path.parent, True)
            now_unwanted = [
                key
                for key, (job, _) in records.items()
                if not job.source or job.failures >= limits.INDEX_JOB_FAILURES_MAX
            ]
            unwanted = {key: unwanted.get(key, now) for key in now_unwanted}
            for key, since in unwanted.items():
                if now - since >= limits.INDEX_ARTIFACT_KEEP_S:
                    await self._delete(key, records[key][1])

    async def _delete(self, key: str, revision: int) -> None:
        with contextlib.suppress(ShoalError):  # the next round tries again
            await self._store.txn([Compare(key, revision)], {}, [key])


class _SourceGone(Exception):
    """Whoever offered the vectors does not give them."""


def _offered(job: IndexJobRecord) -> str:
    """The name of the file of vectors, which has the number of the index."""
    return "vectors." + job.file.rpartition(".")[2]


def _sum(path: Path) -> tuple[int, int]:
    size, crc = 0, 0
    with path.open("rb") as file:
        while data := file.read(limits.TRANSFER_CHUNK_BYTES):
            size += len(data)
            crc = google_crc32c.extend(crc, data)
    return size, crc


def _read(entry: KeyValue) -> tuple[IndexJobRecord, int]:
    return IndexJobRecord.from_bytes(entry.key, entry.value), entry.revision
