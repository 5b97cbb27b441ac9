"""The sending side of a file transfer: sets of files that stay as they are while they are copied.

    shard/outgoing/{snapshot}/{segment}/{file}     hard links to the files of one manifest

Segment files never change, so a link is a copy that costs nothing; a merge may delete the original
meanwhile. A snapshot goes when it is released, when nobody asked for it for `idle_s`, and at the
next start. All transfers of a node share its bandwidth and a few slots.

A path from the wire is only ever looked up among the paths of its snapshot; it never reaches the
file system by itself.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from shoal import limits, telemetry
from shoal.errors import BadRequest, Busy, NotFound, ShardStopped, Unavailable
from shoal.files_api import FileChunk, FileSnapshot, SnapshotFile
from storage_node.faults import fault_point
from storage_node.files import storage_errors
from storage_node.manifest import Manifest

__all__ = ["Outgoing", "TokenBucket", "clear_outgoing", "snapshot_files"]

_log = telemetry.logger("transfer")
_FOLDER = "outgoing"
_TRIES = 5  # a seal or a merge may replace files while they are linked
_BURST_BYTES = 4 * limits.TRANSFER_CHUNK_BYTES  # what may go at once after a pause


class TokenBucket:
    """A limit on bytes per second, with a burst. Pure: it is told the time and says how long to wait.

    bytes_per_s  None: no limit.
    """

    def __init__(self, bytes_per_s: float | None, burst_bytes: int = _BURST_BYTES) -> None:
        self._bytes_per_s, self._burst_bytes = bytes_per_s, burst_bytes
        self._empty_until_s = float("-inf")  # when the bytes given so far will have been earned

    def take(self, size: int, now_s: float) -> float:
        """Book `size` bytes; seconds to wait before sending them. In the order of the calls."""
        if self._bytes_per_s is None:
            return 0.0
        burst_s = self._burst_bytes / self._bytes_per_s
        self._empty_until_s = max(self._empty_until_s, now_s - burst_s) + size / self._bytes_per_s
        return max(0.0, self._empty_until_s - now_s)


def snapshot_files(manifest: Manifest) -> Iterator[SnapshotFile]:
    """Every file that the manifest names."""
    for record in manifest.segments:
        for name, (size, crc) in record.files.items():
            yield SnapshotFile(f"{record.segment_id}/{name}", size, crc)


def clear_outgoing(folder: Path) -> None:
    """Delete what an earlier process left of snapshots of the shard in `folder`."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)


@dataclass(slots=True)
class _Held:
    folder: Path
    files: dict[str, int]  # path -> size
    used_s: float
    fetches: int = 0


class Outgoing:
    """All snapshots that this node holds for others.

    bytes_per_s  of all transfers together; None: no limit.
    in_thread    runs file work; the event loop never waits for the disk.
    clock        seconds that never go back. sleep: as asyncio.sleep.
    """

    def __init__(
        self,
        *,
        bytes_per_s: float | None = None,
        idle_s: float = limits.SNAPSHOT_IDLE_S,
        in_thread: Callable[..., Awaitable[object]] = asyncio.to_thread,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._bucket, self._idle_s = TokenBucket(bytes_per_s), idle_s
        self._in_thread, self._clock, self._sleep = in_thread, clock, sleep
        self._held: dict[str, _Held] = {}
        self._making = 0
        self._fetches = 0
        self._slots = asyncio.Semaphore(limits.TRANSFERS_MAX)

    async def snapshot(self, folder: Path, manifest: Callable[[], Manifest]) -> FileSnapshot:
        """Hold on to the files of the shard in `folder`.

        manifest  gives the one that is in force at the moment of the call.
        Raises    Busy: SNAPSHOTS_MAX are held. Unavailable: the files were replaced again and again
                  meanwhile. StorageFull.
        """
        await self.expire()
        if len(self._held) + self._making >= limits.SNAPSHOTS_MAX:
            raise Busy(
                f"this node keeps {limits.SNAPSHOTS_MAX} snapshots for others: ask again later",
                retry_after_s=5.0,
            )
        self._making += 1
        try:
            for _ in range(_TRIES):
                taken = manifest()
                name = secrets.token_hex(8)
                here = folder / _FOLDER / name
                if not await self._in_thread(_link_all, folder, here, taken):
                    continue
                files = tuple(snapshot_files(taken))
                sizes = {file.path: file.size for file in files}
                self._held[name] = _Held(here, sizes, self._clock())
                _log.info("snapshot", shard=folder, id=name, bytes=sum(sizes.values()))
                return FileSnapshot(name, taken.model_dump_json().encode(), files)
        finally:
            self._making -= 1
        raise Unavailable(f"the files of {folder} changed while they were linked: ask again")

    async def offer(self, folder: Path, file: Path) -> str:
        """Hold on to one file of the shard in `folder`, until `release`: the id. Its path is its
        name. Raises StorageFull."""
        name = secrets.token_hex(8)
        here = folder / _FOLDER / name

        def link() -> int:
            with storage_errors(here):
                here.mkdir(parents=True)
                os.link(file, here / file.name)
            return file.stat().st_size

        size = await self._in_thread(link)
        assert isinstance(size, int)
        self._held[name] = _Held(here, {file.name: size}, float("inf"))
        return name

    async def fetch(self, snapshot_id: str, path: str, offset: int) -> AsyncIterator[FileChunk]:
        """See shoal/files_api.py. At most TRANSFERS_MAX send at once; the others wait their turn."""
        held = self._held.get(snapshot_id)
        size = held.files.get(path) if held is not None else None
        if held is None or size is None:
            raise NotFound(f"no snapshot {snapshot_id!r} with a file {path!r} (any more)")
        if not 0 <= offset <= size:
            raise BadRequest(f"Bad request: offset {offset} of a file of {size} bytes")
        if self._fetches >= limits.TRANSFERS_MAX + limits.TRANSFERS_WAITING_MAX:
            raise Busy("too many files are being fetched from this node: ask again later")
        self._fetches += 1
        held.fetches += 1
        try:
            async with self._slots:
                while offset < size:
                    chunk = await self._read(held, path, offset, size)
                    offset += len(chunk.data)
                    yield chunk
        finally:
            self._fetches -= 1
            held.fetches -= 1
            if held.used_s != float("inf"):  # an offer stays until it is released
                held.used_s = self._clock()

    async def _read(self, held: _Held, path: str, offset: int, size: int) -> FileChunk:
        wanted = min(limits.TRANSFER_CHUNK_BYTES, size - offset)
        wait_s = self._bucket.take(wanted, self._clock())
        if wait_s > 0:
            await self._sleep(wait_s)
        try:
            data = await self._in_thread(_read_part, held.folder / path, offset, wanted)
        except FileNotFoundError:
            raise NotFound("the snapshot was released while it was read") from None
        assert isinstance(data, bytes)
        if len(data) != wanted:
            raise ShardStopped(f"{held.folder / path} is shorter than its manifest says")
        return FileChunk(offset, data, google_crc32c.value(data))

    async def release(self, snapshot_id: str) -> None:
        """Delete the links. Unknown: nothing to do."""
        held = self._held.pop(snapshot_id, None)
        if held is not None:
            await self._in_thread(_remove, held.folder)

    async def expire(self) -> None:
        """Release what nobody has asked for since `idle_s`. Call it now and then; every new snapshot
        does too."""
        now_s = self._clock()
        idle = [
            name
            for name, held in self._held.items()
            if held.fetches == 0 and now_s - held.used_s >= self._idle_s
        ]
        for name in idle:
            _log.warning("snapshot_expired", id=name, idle_s=self._idle_s)
            await self.release(name)

    async def close(self) -> None:
        for name in list(self._held):
            await self.release(name)


def _link_all(folder: Path, here: Path, manifest: Manifest) -> bool:
    """False, and nothing is left, when one of the files has just been replaced."""
    try:
        with storage_errors(here):
            here.mkdir(parents=True)
            for record in manifest.segments:
                segment = str(record.segment_id)
                (here / segment).mkdir()
                for name in record.files:
                    os.link(folder / "segments" / segment / name, here / segment / name)
                    fault_point("outgoing.after_link")
    except FileNotFoundError:
        _remove(here)
        return False
    except BaseException:
        _remove(here)
        raise
    return True


def _read_part(path: Path, offset: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
