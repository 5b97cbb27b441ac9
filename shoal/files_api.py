"""What is asked of a node for the files of a replica: a set that stays as it is while it is copied.

    snapshot(shard)             a consistent set: the manifest, and every file that it names
    fetch(id, path, offset)     one of them, in pieces with checksums, from any offset
    release(id)                 no more of it is wanted

A path is `{segment}/{file}`, the file of one segment; nothing else is ever asked for or answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import google_crc32c

from shoal.errors import Unavailable
from shoal.storage_api import ShardKey

__all__ = ["FileChunk", "FileSnapshot", "FileSource", "SnapshotFile", "fetch_file"]


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """path: `{segment}/{file}`. size in bytes and crc32c of the whole file."""

    path: str
    size: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class FileSnapshot:
    """manifest: JSON of the storage node's `Manifest`. files: all that it names, in any order."""

    id: str
    manifest: bytes
    files: tuple[SnapshotFile, ...]


@dataclass(frozen=True, slots=True)
class FileChunk:
    """data stands at `offset` of the file; at most limits.TRANSFER_CHUNK_BYTES. crc32c: of data."""

    offset: int
    data: bytes
    crc32c: int


class FileSource(Protocol):
    """The files of one node. Every method may raise Unavailable."""

    async def snapshot(self, shard: ShardKey) -> FileSnapshot:
        """Raises  NotFound: this node has no such replica. Busy: too many are out, with a time after
        which to ask again. ShardStopped, StorageFull."""
        ...

    def fetch(self, snapshot_id: str, path: str, offset: int) -> AsyncIterator[FileChunk]:
        """From `offset` to the end of the file, in order and without gaps; nothing at the end.

        Raises  NotFound: no such snapshot (any more: released, or idle for too long), or no such
        path in it. Busy: too many at once. BadRequest: an offset outside the file.
        """
        ...

    async def release(self, snapshot_id: str) -> None:
        """Unknown: nothing to do."""
        ...


async def fetch_file(
    source: FileSource, snapshot_id: str, path: str, target: Path, expected: tuple[int, int]
) -> None:
    """One whole file to `target`, on the disk when it returns; the name is the caller's to sync.

    expected  its size and crc32c. Raises Unavailable, and leaves no file, when what came differs.
    For a file that can be had again; a replica's files go by storage_node/transfer.py, which goes on
    after an interruption. Costs a thread hop per chunk.
    """
    size, crc = 0, 0
    try:
        with target.open("wb") as file:
            async for chunk in source.fetch(snapshot_id, path, 0):
                if chunk.offset != size or google_crc32c.value(chunk.data) != chunk.crc32c:
                    raise Unavailable(f"{path} came damaged at offset {size}: ask again")
                await asyncio.to_thread(file.write, chunk.data)
                size += len(chunk.data)
                crc = google_crc32c.extend(crc, chunk.data)
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        if (size, crc) != tuple(expected):
            raise Unavailable(f"{path} is not the file that was promised: {size} bytes came")
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(target)
        raise
