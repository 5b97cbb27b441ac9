"""The receiving side of a file transfer: a replica's files from another node, whole or not at all.

    download    shard/incoming/{segment}/{file}              finished and checked
                                       {file}.{crc}.part     begun; grows chunk by chunk
                                       {file}.{crc}.sums     length and crc32c of each chunk in it
                shard/incoming/MANIFEST                      everything is there
    install     incoming/ ─rename─▶ installing/              from here on it must be finished
                a new log, files to segments/, the shard's MANIFEST, installing/ away

A download may stop anywhere, with the process or with the other node, and go on later: what is there
is checked and kept, also when the other node has moved on and offers another set. It changes nothing
of the replica that is in place. An install, once begun, is finished at the next start by
`finish_install`, before the shard is opened; it can be repeated from any point.

Nothing from the wire names a file: paths are made from segment numbers and plain names that are
checked first. Sizes are checked against the free space before a byte is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import google_crc32c
from pydantic import ValidationError

from shoal import limits, telemetry
from shoal.errors import (
    Busy,
    FormatTooNew,
    NotFound,
    ShardStopped,
    ShoalError,
    StorageFull,
    Unavailable,
    must,
)
from shoal.files_api import FileChunk, FileSnapshot, FileSource, SnapshotFile
from shoal.storage_api import ShardKey
from storage_node.faults import fault_point
from storage_node.files import checked_sum, storage_errors, sync_folder
from storage_node.log import Log
from storage_node.manifest import Manifest, read_manifest, write_manifest
from storage_node.outgoing import snapshot_files

__all__ = ["Progress", "begin_log", "discard", "download", "finish_install", "install"]

_log = telemetry.logger("transfer")
_T = TypeVar("_T")
_INCOMING, _INSTALLING = "incoming", "installing"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")  # of a file of a segment
_SUM = struct.Struct("<II")  # length and crc32c of a chunk
_CHUNK_TRIES = 5  # in a row without a good byte
_FILE_TRIES = 2  # whole files that do not fit their checksum: then it is damaged over there
_SNAPSHOT_TRIES = 10  # of one download; each keeps what fits
_BUSY_TRIES = 100  # in a row; the other node says how long to wait


@dataclass(slots=True)
class Progress:
    """Of one download, for people and metrics. bytes_total: of the set; bytes_kept: that were there
    already; bytes_received: that came over the wire, the damaged ones too."""

    bytes_total: int = 0
    bytes_kept: int = 0
    bytes_received: int = 0
    chunks_damaged: int = 0
    snapshots: int = 0


async def download(
    source: FileSource,
    shard: ShardKey,
    folder: Path,
    *,
    disk_free_bytes_min: int = limits.DISK_FREE_BYTES_MIN,
    progress: Progress | None = None,
    in_thread: Callable[..., Awaitable[object]] = asyncio.to_thread,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> Manifest:
    """Fetch what the replica at `source` consists of into `folder`/incoming; `install` takes it over.

    folder               of the shard here; may hold an older replica, whose files are used.
    disk_free_bytes_min  is left free. One download per shard at a time.
    Raises  StorageFull: no room, before anything came, or later. Unavailable: the source went away,
            or what it sends is damaged or makes no sense. Call again later: it goes on from there.
            NotFound: the source has no such replica. FormatTooNew: a newer Shoal wrote it.
    """
    run = _Download(source, shard, folder, disk_free_bytes_min, progress or Progress())
    run.in_thread, run.sleep = in_thread, sleep
    return await run.run()


class _Download:
    def __init__(
        self, source: FileSource, shard: ShardKey, folder: Path, free_bytes: int, progress: Progress
    ) -> None:
        self.in_thread: Callable[..., Awaitable[object]] = asyncio.to_thread
        self.sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
        self._source, self._shard, self._folder = source, shard, folder
        self._free_bytes, self._progress = free_bytes, progress
        self._incoming = folder / _INCOMING
        self._good: set[SnapshotFile] = set()  # in incoming, and known to be right

    async def run(self) -> Manifest:
        for _ in range(_SNAPSHOT_TRIES):
            snapshot = await self._patiently(lambda: self._source.snapshot(self._shard))
            self._progress.snapshots += 1
            manifest = _checked_manifest(snapshot, self._shard)
            try:
                await self._fetch_all(snapshot, manifest)
            except NotFound:
                _log.warning("snapshot_gone", shard=self._folder, id=snapshot.id)
                continue  # it was idle for too long, or its node restarted; a new one will do
            except Exception:
                await self._release(snapshot)
                raise
            await self._release(snapshot)
            return manifest
        raise Unavailable(
            f"The other node dropped {_SNAPSHOT_TRIES} snapshots while they were copied; what came "
            "is kept."
        )

    async def _release(self, snapshot: FileSnapshot) -> None:
        with contextlib.suppress(ShoalError):  # then it goes when it has been idle
            await self._source.release(snapshot.id)

    async def _fetch_all(self, snapshot: FileSnapshot, manifest: Manifest) -> None:
        files = list(snapshot_files(manifest))
        self._progress.bytes_total = sum(file.size for file in files)
        missing = await self._do(self._prepare, files)
        kept = self._progress.bytes_total - sum(file.size for file in missing)
        self._progress.bytes_kept = kept
        for file in missing:
            await self._fetch_file(snapshot, file)
            self._good.add(file)
        await self._do(_complete, self._incoming, manifest)

    # -- one file ---------------------------------------------------------------------------------
    async def _fetch_file(self, snapshot: FileSnapshot, file: SnapshotFile) -> None:
        for _ in range(_FILE_TRIES):
            part = _Part(self._incoming, file)
            try:
                await self._do(part.open)
                await self._fill(snapshot, file, part)
                if await self._do(part.finish):
                    return
            finally:
                part.close()
            _log.warning("file_damaged", shard=self._folder, path=file.path)
        raise Unavailable(
            f"{file.path} does not fit its checksum after {_FILE_TRIES} attempts: it is damaged on "
            "the other node."
        )

    async def _fill(self, snapshot: FileSnapshot, file: SnapshotFile, part: _Part) -> None:
        tries = 0
        while part.size < file.size:
            before = part.size
            damage = await self._patiently(partial(self._fetch_from, snapshot, file, part))
            if damage is None and part.size == file.size:
                return
            tries = 1 if part.size > before else tries + 1
            self._progress.chunks_damaged += damage is not None
            why = damage or "it ended too early"
            _log.warning("chunk_damaged", shard=self._folder, path=file.path, why=why)
            if tries >= _CHUNK_TRIES:
                raise Unavailable(f"{file.path} at offset {part.size}: {why}, {tries} times.")

    async def _fetch_from(
        self, snapshot: FileSnapshot, file: SnapshotFile, part: _Part
    ) -> str | None:
        """Go on until the end or the first thing wrong, which is returned."""
        chunks = self._source.fetch(snapshot.id, file.path, part.size)
        try:
            async for chunk in chunks:
                self._progress.bytes_received += len(chunk.data)
                wrong = _wrong(chunk, part.size, file.size)
                if wrong is not None:
                    return wrong
                await self._do(part.append, chunk)
                fault_point("transfer.after_chunk")
        finally:
            close = getattr(chunks, "aclose", None)  # a generator's; frees the slot over there
            if close is not None:
                await close()
        return None

    # -- helpers ----------------------------------------------------------------------------------
    async def _patiently(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        """Ask; wait as long as a busy node says, and ask again."""
        for _ in range(_BUSY_TRIES):
            try:
                return await ask()
            except Busy as error:
                await self.sleep(error.retry_after_s)
        raise Unavailable(f"The other node has been busy {_BUSY_TRIES} times in a row.")

    async def _do(self, work: Callable[..., _T], *arguments: object) -> _T:
        """File work in a thread. It is over when this returns, also when we are cancelled: a later
        download must not meet it."""
        job = asyncio.ensure_future(self.in_thread(work, *arguments))
        try:
            return cast(_T, await asyncio.shield(job))
        except asyncio.CancelledError:
            await asyncio.wait([job])
            raise

    def _prepare(self, files: list[SnapshotFile]) -> list[SnapshotFile]:
        """Make incoming hold nothing but what this set needs; what is missing of it."""
        incoming = self._incoming
        incoming.mkdir(parents=True, exist_ok=True)
        (incoming / "MANIFEST").unlink(missing_ok=True)  # it is about to change
        sync_folder(incoming)
        wanted = {file.path: file for file in files}
        _remove_others(incoming, wanted)
        missing = [file for file in files if not self._have(file)]
        needed = sum(file.size - _part_size(incoming, file) for file in missing)
        status = os.statvfs(incoming)
        free = status.f_bavail * status.f_frsize
        if needed and free - needed < self._free_bytes:
            raise StorageFull(
                f"Storage is full: a copy of {self._folder} needs {needed >> 20} MiB, {free >> 20} MiB "
                f"are free and {self._free_bytes >> 20} MiB are kept free. Free disk space; the copy "
                "goes on by itself."
            )
        return missing

    def _have(self, file: SnapshotFile) -> bool:
        target = self._incoming / file.path
        if file in self._good and target.exists():
            return True
        self._good.discard(file)
        if _fits(target, file):
            self._good.add(file)
            return True
        target.unlink(missing_ok=True)
        present = self._folder / "segments" / file.path
        if not _fits(present, file):
            return False
        target.parent.mkdir(exist_ok=True)
        with storage_errors(target):
            os.link(present, target)
        self._good.add(file)
        return True


# -- what comes over the wire ---------------------------------------------------------------------
def _checked_manifest(snapshot: FileSnapshot, shard: ShardKey) -> Manifest:
    """The manifest, if it makes sense and every name in it is a plain one."""

    def refuse(why: str) -> Unavailable:
        return Unavailable(f"The other node sent a manifest of shard {shard} that {why}.")

    if len(snapshot.manifest) > limits.MANIFEST_BYTES_MAX:
        raise refuse(f"is larger than {limits.MANIFEST_BYTES_MAX} bytes")
    try:
        manifest = Manifest.model_validate_json(snapshot.manifest)
    except ValidationError as error:
        raise refuse(f"cannot be read: {error.errors()[0]['msg']}") from error
    if manifest.format > Manifest.model_fields["format"].default:
        raise FormatTooNew(
            f"the other node's manifest has format {manifest.format}: upgrade this one"
        )
    if (manifest.collection_id, manifest.shard) != (shard.collection_id, shard.shard):
        raise refuse("belongs to another shard")
    ids = [record.segment_id for record in manifest.segments]
    if len(set(ids)) != len(ids) or any(segment < 0 for segment in ids):
        raise refuse("numbers its segments wrongly")
    for record in manifest.segments:
        for name, (size, crc) in record.files.items():
            plain = _NAME.fullmatch(name) and not name.endswith((".part", ".sums"))
            if not plain or size < 0 or not 0 <= crc < 2**32:
                raise refuse(f"names the file {name!r} of {size} bytes")
    if set(snapshot.files) != set(snapshot_files(manifest)):
        raise refuse("does not fit the list of files beside it")
    return manifest


def _wrong(chunk: FileChunk, expected_offset: int, size: int) -> str | None:
    end = chunk.offset + len(chunk.data)
    if chunk.offset != expected_offset:
        return f"offset {chunk.offset} came in place of {expected_offset}"
    if not chunk.data or len(chunk.data) > limits.TRANSFER_CHUNK_BYTES or end > size:
        return f"{len(chunk.data)} bytes came at {chunk.offset} of {size}"
    if google_crc32c.value(chunk.data) != chunk.crc32c:
        return f"the chunk at {chunk.offset} does not fit its checksum"
    return None


# -- files on their way ---------------------------------------------------------------------------
def _part_path(incoming: Path, file: SnapshotFile) -> Path:
    return incoming / f"{file.path}.{file.crc32c:08x}.part"


def _part_size(incoming: Path, file: SnapshotFile) -> int:
    try:
        return min(_part_path(incoming, file).stat().st_size, file.size)
    except FileNotFoundError:
        return 0


class _Part:
    """A file that is being received. What an earlier attempt left is checked chunk by chunk and cut
    where the first one is wrong. Chunks are not synced one by one: a power cut costs what it costs,
    and is found here."""

    def __init__(self, incoming: Path, file: SnapshotFile) -> None:
        self._file, self._target = file, incoming / file.path
        self._path = _part_path(incoming, file)
        self._sums_path = self._path.with_suffix(".sums")
        self._open = contextlib.ExitStack()
        self.size = self._crc = 0

    def open(self) -> None:
        with storage_errors(self._path):
            self._path.parent.mkdir(exist_ok=True)
            self._data = self._open.enter_context(self._path.open("a+b", buffering=0))
            self._sums = self._open.enter_context(self._sums_path.open("a+b", buffering=0))
        self._check()

    def _check(self) -> None:
        self._data.seek(0)
        self._sums.seek(0)
        good = 0
        while len(entry := self._sums.read(_SUM.size)) == _SUM.size:
            length, crc = _SUM.unpack(entry)
            if length > limits.TRANSFER_CHUNK_BYTES or self.size + length > self._file.size:
                break
            data = self._data.read(length)
            if len(data) != length or google_crc32c.value(data) != crc:
                break
            self._crc = google_crc32c.extend(self._crc, data)
            self.size += length
            good += 1
        self._data.truncate(self.size)
        self._sums.truncate(good * _SUM.size)

    def append(self, chunk: FileChunk) -> None:
        """The data first: a sum without its data would be cut off all the same."""
        with storage_errors(self._path):
            _write_all(self._data, chunk.data)
            _write_all(self._sums, _SUM.pack(len(chunk.data), chunk.crc32c))
        self._crc = google_crc32c.extend(self._crc, chunk.data)
        self.size += len(chunk.data)

    def finish(self) -> bool:
        """Give the file its name, durably but for the folder. False: it does not fit its checksum,
        and nothing is left of it."""
        fits = (self.size, self._crc) == (self._file.size, self._file.crc32c)
        if fits:
            with storage_errors(self._path):
                os.fsync(self._data.fileno())
            os.replace(self._path, self._target)
            fault_point("transfer.after_file")
        self._path.unlink(missing_ok=True)
        self._sums_path.unlink(missing_ok=True)
        return fits

    def close(self) -> None:
        self._open.close()


def _write_all(file: object, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]  # type: ignore[attr-defined]


def _fits(path: Path, file: SnapshotFile) -> bool:
    try:
        return path.stat().st_size == file.size and checked_sum(path) == (file.size, file.crc32c)
    except FileNotFoundError:
        return False


def _remove_others(incoming: Path, wanted: dict[str, SnapshotFile]) -> None:
    """Whatever no longer belongs to the set. A part is kept when file and checksum are the same."""
    keep = set(wanted)
    for file in wanted.values():
        part = _part_path(Path(), file)
        keep |= {part.as_posix(), part.with_suffix(".sums").as_posix()}
    for entry in list(incoming.iterdir()):
        if not entry.is_dir() or entry.is_symlink():
            entry.unlink()
            continue
        for inner in list(entry.iterdir()):
            if f"{entry.name}/{inner.name}" not in keep:
                shutil.rmtree(inner) if inner.is_dir() else inner.unlink()
        if not any(entry.iterdir()):
            entry.rmdir()


def _complete(incoming: Path, manifest: Manifest) -> None:
    """Everything is durable, then its manifest."""
    with storage_errors(incoming):
        for record in manifest.segments:
            (incoming / str(record.segment_id)).mkdir(exist_ok=True)  # one without files
            sync_folder(incoming / str(record.segment_id))
        sync_folder(incoming)
        write_manifest(incoming, manifest)
        sync_folder(incoming.parent)
    fault_point("transfer.after_complete")


# -- taking it over -------------------------------------------------------------------------------
def begin_log(folder: Path, manifest: Manifest) -> None:
    """An empty log that goes on after the manifest's checkpoint, in place of any other."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder / "log")
    log = Log(folder / "log")
    must(not list(log.open(manifest.checkpoint, new=True)), "a new log holds entries")
    log.close()


def install(
    folder: Path,
    *,
    adjust: Callable[[Manifest], Manifest] = lambda manifest: manifest,
    reset_log: Callable[[Path, Manifest], None] = begin_log,
) -> Manifest:
    """Put a finished download in place of the replica in `folder`, which must be closed. Blocking.

    adjust     changes what is this node's own in the manifest, such as the term that it has promised.
    reset_log  makes the log empty behind the manifest's checkpoint; may be called again after a crash.
    Returns    the manifest that is now in force.
    Raises     Unavailable: there is no finished download; nothing was changed. Any other error: the
               replica can only be opened after `finish_install` has succeeded.
    """
    incoming, installing = folder / _INCOMING, folder / _INSTALLING
    if not installing.exists():
        manifest = read_manifest(incoming)
        if manifest is None:
            raise Unavailable(f"{incoming} holds no finished download")
        write_manifest(incoming, adjust(manifest))
        os.rename(incoming, installing)
        sync_folder(folder)
    fault_point("install.after_begin")
    done = finish_install(folder, reset_log=reset_log)
    if done is None:
        raise ShardStopped(f"{installing} holds no manifest. Nothing was changed.")
    return done


def finish_install(
    folder: Path, *, reset_log: Callable[[Path, Manifest], None] = begin_log
) -> Manifest | None:
    """Finish an install that was begun; call it before a shard is opened. Blocking.

    Returns  the manifest that it put in force; None: no install was begun, which costs one look.
    Raises   ShardStopped: a file of it is missing. Whatever `reset_log` raises. StorageFull.
    """
    installing, segments = folder / _INSTALLING, folder / "segments"
    manifest = read_manifest(installing)
    if manifest is None:
        shutil.rmtree(installing, ignore_errors=True)  # the end of one that a crash cut off
        return None
    reset_log(folder, manifest)
    fault_point("install.after_log")
    with storage_errors(segments):
        segments.mkdir(exist_ok=True)
        for record in manifest.segments:
            (segments / str(record.segment_id)).mkdir(exist_ok=True)
        for file in snapshot_files(manifest):
            _take_over(installing / file.path, segments / file.path, file)
        for record in manifest.segments:
            sync_folder(segments / str(record.segment_id))
        sync_folder(segments)
        write_manifest(folder, manifest)
    fault_point("install.after_manifest")
    (installing / "MANIFEST").unlink()  # before the shard may write: it is never done a second time
    sync_folder(installing)
    fault_point("install.after_end")
    shutil.rmtree(installing, ignore_errors=True)
    _log.info("installed", shard=folder, checkpoint=manifest.checkpoint)
    return manifest


def _take_over(source: Path, target: Path, file: SnapshotFile) -> None:
    if source.exists():
        os.replace(source, target)
    elif not target.exists() or target.stat().st_size != file.size:
        raise ShardStopped(f"{source} is missing. Restore it, or delete this replica.")
    fault_point("install.after_file")


def discard(folder: Path) -> None:
    """Delete a download that is not wanted any more, finished or not. Never an install."""
    shutil.rmtree(folder / _INCOMING, ignore_errors=True)
