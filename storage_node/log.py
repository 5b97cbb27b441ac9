"""The write-ahead log of one shard.

    log/00000000000000000001.log   named after the first sequence number that it may hold

    file    magic "SHOALLOG", version u32, crc u32, salt 8 bytes, first sequence u64
    group   salt 8 bytes, body length u32, crc32c u32, first sequence u64, term u64, count u32, 0 u32
            body: count x (length u32, entry bytes), padded to 8 bytes

A group is one write and one fsync, and the next group is written only after that fsync. Hence, when
a group is unreadable:
  - nothing readable after it  -> it was never acknowledged (a torn tail): cut it off;
  - a readable group after it  -> it had been acknowledged and is damaged: refuse to open.
The one case that this cannot tell apart is damage to the very last group; docs/failure_model.md
says so. Every file has its own random salt, so that bytes which a user stored cannot pass for a group.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import google_crc32c

from shoal.errors import FormatTooNew, ShardStopped
from storage_node.faults import fault_point
from storage_node.files import storage_errors, sync_folder

__all__ = ["LOG_FILE_BYTES_MIN", "Group", "Log"]

_MAGIC = b"SHOALLOG"
_VERSION = 1
_FILE_HEADER = struct.Struct("<8sII8sQ")
_GROUP_HEADER = struct.Struct("<8sIIQQII")
_CRC_FROM = 16  # the checksum covers the group from here on: everything after itself
_LENGTH = struct.Struct("<I")
LOG_FILE_BYTES_MIN = _FILE_HEADER.size  # of a file without entries


@dataclass(frozen=True, slots=True)
class Group:
    """Entries with the sequence numbers first, first + 1, … that became durable together."""

    first: int
    term: int
    entries: tuple[bytes, ...]


class Log:
    """Not thread-safe: one caller at a time. After an error from `append` other than StorageFull
    the log is `broken` and accepts nothing more: what the disk holds is not known."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.next_sequence = 1
        self.broken = False
        self._file: int | None = None
        self._size = 0
        self._salt = b""
        self.appended_bytes = 0  # since the last `rotate`

    # -- opening ----------------------------------------------------------------------------------
    def open(self, after: int, *, new: bool) -> Iterator[Group]:
        """Yield every group that holds an entry past `after`; then the log is ready to append.

        Cuts a torn tail. Raises ShardStopped, naming file and offset, where an acknowledged
        group is damaged or missing. new: there may be no log yet.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder.parent)
        paths = sorted(self.folder.glob("*.log"))
        if not new and not paths:
            raise ShardStopped(f"{self.folder} holds no log file. Restore it, or the shard.")
        if paths and int(paths[0].stem) > after + 1:
            raise ShardStopped(
                f"{self.folder}: log entries {after + 1} to {int(paths[0].stem) - 1} are missing. "
                "Restore the file that held them, or the shard, from a copy."
            )
        expected: int | None = None
        for position, path in enumerate(paths):
            last_file = position == len(paths) - 1
            data = path.read_bytes()
            header = self._read_file_header(path, data)
            if header is None:
                # A group is written only after the header was synced: a file that is longer had a
                # good header once. A shorter one was being made when the crash came.
                if not last_file or len(data) > _FILE_HEADER.size:
                    raise ShardStopped(
                        f"{path}: the log is damaged at offset 0, in the header of the file. Nothing "
                        "was changed. Restore this file or the shard from a copy."
                    )
                path.unlink()
                sync_folder(self.folder)
                continue
            salt, first = header
            if expected is not None and first != expected:
                raise ShardStopped(f"{path}: log entries {expected} to {first - 1} are missing")
            expected = first
            offset = _FILE_HEADER.size
            while offset < len(data):
                group, end = _read_group(data, offset, salt)
                if group is None or group.first != expected:
                    self._cut_or_refuse(path, data, offset, salt, last_file)
                    data = data[:offset]
                    break
                expected = group.first + len(group.entries)
                if expected > after + 1:
                    yield group
                offset = end
            if last_file:
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
                self._size, self._salt = len(data), salt
        self.next_sequence = max(after + 1, expected or 1)
        if expected is not None and expected <= after:
            # The checkpoint is ahead of the log (its files were trimmed): begin a new file.
            self._close_file()
        if self._file is None:
            self._begin_file()

    def _read_file_header(self, path: Path, data: bytes) -> tuple[bytes, int] | None:
        if len(data) < _FILE_HEADER.size:
            return None
        magic, version, crc, salt, first = _FILE_HEADER.unpack_from(data)
        if magic != _MAGIC or crc != _header_crc(version, data[16 : _FILE_HEADER.size]):
            return None
        if version > _VERSION:
            raise FormatTooNew(f"{path} has format {version}; this Shoal reads up to {_VERSION}")
        return salt, first

    def _cut_or_refuse(
        self, path: Path, data: bytes, offset: int, salt: bytes, last_file: bool
    ) -> None:
        later = data.find(salt, offset + 1)
        while later != -1 and _read_group(data, later, salt)[0] is None:
            later = data.find(salt, later + 1)
        if later != -1 or not last_file:
            raise ShardStopped(
                f"{path}: the log is damaged at offset {offset}, before entries that were "
                "acknowledged. Nothing was changed. Restore this file or the shard from a copy."
            )
        with path.open("r+b") as file:
            file.truncate(offset)
            os.fsync(file.fileno())

    # -- appending --------------------------------------------------------------------------------
    def append(self, entries: Sequence[bytes], term: int) -> int:
        """Write entries as one group, fsync, and return the first one's sequence number.

        StorageFull: nothing was written and the log is as before. Any other OSError: broken.
        """
        if self.broken or self._file is None:
            raise ShardStopped(f"{self.folder}: the log failed earlier and is closed")
        first = self.next_sequence
        parts = [piece for entry in entries for piece in (_LENGTH.pack(len(entry)), entry)]
        body = b"".join(parts)
        body += bytes(-len(body) % 8)
        tail = struct.pack("<QQII", first, term, len(entries), 0)
        crc = google_crc32c.extend(google_crc32c.value(tail), body)
        group = self._salt + struct.pack("<II", len(body), crc) + tail + body
        try:
            self._write(group)
        except BaseException:
            self._undo_write()
            raise
        fault_point("log.after_write")
        try:
            os.fdatasync(self._file)
        except OSError:
            # After a failed fsync the kernel may have dropped the pages: what is on the disk is
            # unknown, so nothing may be acknowledged by this log again until it is re-read.
            self.broken = True
            raise
        fault_point("log.after_fsync")
        self._size += len(group)
        self.appended_bytes += len(group)
        self.next_sequence = first + len(entries)
        return first

    def _write(self, group: bytes) -> None:
        assert self._file is not None
        view = memoryview(group)
        with storage_errors(self.folder):
            while view:
                view = view[os.write(self._file, view) :]

    def _undo_write(self) -> None:
        assert self._file is not None
        try:
            os.ftruncate(self._file, self._size)
        except OSError:
            self.broken = True

    def rotate(self) -> None:
        """Begin a new file, so that `trim` can drop the entries up to here once they are elsewhere.
        StorageFull leaves the log as it was."""
        previous = self._file, self._size, self._salt
        try:
            self._begin_file()
        except BaseException:
            self._file, self._size, self._salt = previous
            raise
        self.appended_bytes = 0
        if previous[0] is not None:
            os.close(previous[0])

    def _begin_file(self) -> None:
        path = self.folder / f"{self.next_sequence:020d}.log"
        salt = os.urandom(8)
        tail = salt + struct.pack("<Q", self.next_sequence)
        header = _MAGIC + struct.pack("<II", _VERSION, _header_crc(_VERSION, tail)) + tail
        with storage_errors(path):
            descriptor = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644
            )
            try:
                os.write(descriptor, header)
                os.fsync(descriptor)
                sync_folder(self.folder)
            except BaseException:
                os.close(descriptor)
                path.unlink(missing_ok=True)
                raise
        self._file, self._size, self._salt = descriptor, len(header), salt

    def trim(self, upto: int) -> None:
        """Delete the files whose entries are all <= `upto`; never the one being written."""
        paths = sorted(self.folder.glob("*.log"))
        for path, following in pairwise(paths):
            if int(following.stem) <= upto + 1:
                path.unlink()
        fault_point("log.after_trim")

    def size_on_disk(self) -> int:
        """Any thread may ask, also while `trim` deletes."""
        total = 0
        for path in self.folder.glob("*.log"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def close(self) -> None:
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _header_crc(version: int, tail: bytes) -> int:
    return int(google_crc32c.value(_MAGIC + struct.pack("<I", version) + tail))


def _read_group(data: bytes, offset: int, salt: bytes) -> tuple[Group | None, int]:
    """The group at `offset` and the offset after it; None when it is not whole."""
    if offset + _GROUP_HEADER.size > len(data):
        return None, offset
    found, length, crc, first, term, count, _ = _GROUP_HEADER.unpack_from(data, offset)
    start = offset + _GROUP_HEADER.size
    end = start + length
    if found != salt or end > len(data):
        return None, offset
    if google_crc32c.value(data[offset + _CRC_FROM : end]) != crc:
        return None, offset
    entries = []
    position = start
    for _ in range(count):
        (size,) = _LENGTH.unpack_from(data, position)
        position += 4
        entries.append(data[position : position + size])
        position += size
    return Group(first, term, tuple(entries)), end
