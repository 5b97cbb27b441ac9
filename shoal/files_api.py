"""What is asked of a node for the files of a replica: a set that stays as it is while it is copied.

    snapshot(shard)             a consistent set: the manifest, and every file that it names
    fetch(id, path, offset)     one of them, in pieces with checksums, from any offset
    release(id)                 no more of it is wanted

A path is `{segment}/{file}`, the file of one segment; nothing else is ever asked for or answered.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from shoal.storage_api import ShardKey

__all__ = ["FileChunk", "FileSnapshot", "FileSource", "SnapshotFile"]


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
