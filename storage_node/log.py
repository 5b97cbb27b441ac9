"""The write-ahead log of one replica of a shard.

    log/00000000000000000001.log   named after the first sequence number that it may hold

A group of entries is one write and one fsync, and the next group is written only after that fsync.
Hence, when a group is unreadable:
  - nothing readable after it  -> it was never acknowledged (a torn tail): cut it off;
  - a readable group after it  -> it had been acknowledged and is damaged: refuse to open.
The one case that this cannot tell apart is damage to the very last group; docs/failure_model.md
says so. The bytes are described in storage_node/log_format.py.

Files whose entries are all in segments are kept for a while (`retain_bytes`): a replica that comes
back after a short absence catches up from them. Their damage costs this replica nothing.
"""

from __future__ import annotations

import contextlib
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shoal import limits, telemetry
from shoal.errors import ShardStopped, ShoalError, must
from storage_node.faults import fault_point
from storage_node.files import storage_errors, sync_folder
from storage_node.log_format import (
    FILE_HEADER_BYTES,
    Group,
    decode_file_header,
    decode_group,
    encode_file_header,
    encode_group,
    groups_from,
)

__all__ = ["LOG_FILE_BYTES_MIN", "EntriesGone", "Group", "Log", "Terms"]

_log = telemetry.logger("storage")
Terms = tuple[tuple[int, int], ...]  # (term, the first sequence number in it), ascending
LOG_FILE_BYTES_MIN = FILE_HEADER_BYTES  # of a file without entries
_MARK_BYTES = 256 * limits.KIB  # what a read passes over at most before it is where it begins
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC


class EntriesGone(ShoalError):
    """The log does not hold these entries any more: whoever needs them takes the shard's files."""


@dataclass(slots=True)
class _File:
    """size: bytes that are durable. marks: (first sequence number, offset) of some of its groups."""

    path: Path
    first: int
    size: int
    marks: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.marks.append((self.first, FILE_HEADER_BYTES))

    def add_group(self, first: int, length: int) -> None:
        if self.size - self.marks[-1][1] >= _MARK_BYTES:
            self.marks.append((first, self.size))
        self.size += length


class Log:
    """One thread at a time appends, rotates, cuts or resets; any thread may at the same time read,
    trim, and ask for terms and size. After an error from `append` or `cut` other than StorageFull
    the log is `broken` and accepts nothing more: what the disk holds is not known.

    retain_bytes: of the newest files to keep although no recovery needs them.
    """

    def __init__(self, folder: Path, *, retain_bytes: int = 0) -> None:
        self.folder, self.retain_bytes = folder, retain_bytes
        self.next_sequence = 1
        self.broken = False
        self.appended_bytes = 0  # since the last `rotate`
        self._terms: list[tuple[int, int]] = []
        self._files: list[_File] = []  # ascending, without gaps; entries go to the last
        self._shape = threading.Lock()  # held while files are read, begun or removed
        self._file: int | None = None
        self._salt = b""

    # -- opening ----------------------------------------------------------------------------------
    def open(self, after: int, *, new: bool, terms: Terms = ()) -> Iterator[Group]:
        """Yield every group that holds an entry past `after`; then the log is ready to append.

        Cuts a torn tail. Raises ShardStopped, naming file and offset, where an acknowledged
        group past `after` is damaged or missing. new: there may be no log yet. terms: where those
        up to `after` begin, since files that began them may be gone.
        """
        self._terms = list(terms)
        self.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder.parent)
        for path in self.folder.glob("*.log.new"):
            path.unlink()  # of a cut that a crash cut off
        paths = sorted(self.folder.glob("*.log"))
        if not new and not paths:
            raise ShardStopped(f"{self.folder} holds no log file. Restore it, or the shard.")
        if paths and int(paths[0].stem) > after + 1:
            raise ShardStopped(
                f"{self.folder}: log entries {after + 1} to {int(paths[0].stem) - 1} are missing. "
                "Restore the file that held them, or the shard, from a copy."
            )
        needed = max(bisect_right([int(path.stem) for path in paths], after + 1) - 1, 0)
        self._files = [_File(p, int(p.stem), p.stat().st_size) for p in paths[:needed]]
        expected: int | None = None
        for path in paths[needed:]:
            data = path.read_bytes()
            last_file = path is paths[-1]
            header = decode_file_header(path, data)
            if header is None:
                self._remove_unfinished(path, len(data), last_file)
                continue
            salt, first = header
            if expected is not None and first != expected:
                raise ShardStopped(f"{path}: log entries {expected} to {first - 1} are missing")
            file = _File(path, first, FILE_HEADER_BYTES)
            expected = first
            while file.size < len(data):
                group, end = decode_group(data, file.size, salt)
                if group is None or group.first != expected:
                    self._cut_or_refuse(path, data, file.size, salt, last_file)
                    break
                file.add_group(group.first, end - file.size)
                expected = group.end
                if expected > after + 1:
                    self._note_term(group.term, group.first)
                    yield group
            self._files.append(file)
            if last_file:
                self._file, self._salt = os.open(path, _APPEND), salt
                os.fsync(self._file)  # a crash may have come between its last write and fsync
        self.next_sequence = max(after + 1, expected or 1)
        if expected is not None and expected <= after:
            # The checkpoint is ahead of the log (its files were trimmed): begin a new file.
            self._close_file()
        if self._file is None:
            self._begin_file()

    def _remove_unfinished(self, path: Path, size: int, last_file: bool) -> None:
        # A group is written only after the header was synced: a file that is longer had a good
        # header once. A shorter one was being made when the crash came.
        if not last_file or size > FILE_HEADER_BYTES:
            raise ShardStopped(
                f"{path}: the log is damaged at offset 0, in the header of the file. Nothing "
                "was changed. Restore this file or the shard from a copy."
            )
        path.unlink()
        sync_folder(self.folder)

    def _cut_or_refuse(
        self, path: Path, data: bytes, offset: int, salt: bytes, last_file: bool
    ) -> None:
        later = data.find(salt, offset + 1)
        while later != -1 and decode_group(data, later, salt)[0] is None:
            later = data.find(salt, later + 1)
        if later != -1 or not last_file:
            raise ShardStopped(
                f"{path}: the log is damaged at offset {offset}, before entries that were "
                "acknowledged. Nothing was changed. Restore this file or the shard from a copy."
            )
        with path.open("r+b") as file:
            file.truncate(offset)
            os.fsync(file.fileno())

    # -- terms ------------------------------------------------------------------------------------
    @property
    def terms(self) -> Terms:
        """Where each term begins: the newest LOG_TERMS_MAX, trimmed files included."""
        return tuple(self._terms)

    def term_at(self, sequence: int) -> int:
        """The term of an entry; 0 before the first, -1 where it is no longer known."""
        if sequence == 0:
            return 0
        terms = self.terms
        found = bisect_right(terms, sequence, key=lambda term: term[1]) - 1
        return terms[found][0] if found >= 0 else -1

    def _note_term(self, term: int, first: int) -> None:
        newest = self._terms[-1][0] if self._terms else 0
        if term != newest:
            must(term > newest, f"{self.folder}: term {term} after {newest} at entry {first}")
            self._terms.append((term, first))
            del self._terms[: -limits.LOG_TERMS_MAX]

    # -- appending --------------------------------------------------------------------------------
    def append(self, entries: Sequence[bytes], term: int, first: int | None = None) -> int:
        """Write entries as one group, fsync, and return the first one's sequence number. `first`:
        what that number has to be.

        StorageFull: nothing was written and the log is as before. Any other OSError: broken.
        """
        self._check_usable()
        must(len(entries) > 0, "a group without entries")
        must(first in (None, self.next_sequence), f"entry {first} cannot be {self.next_sequence}")
        first = self.next_sequence
        must(not self._terms or term >= self._terms[-1][0], f"{self.folder}: term {term} is over")
        group = encode_group(first, term, entries, self._salt)
        file = self._files[-1]
        try:
            self._write(group)
        except BaseException:
            self._undo_write(file)
            raise
        fault_point("log.after_write")
        assert self._file is not None
        try:
            os.fdatasync(self._file)
        except OSError:
            # After a failed fsync the kernel may have dropped the pages: what is on the disk is
            # unknown, so nothing may be acknowledged by this log again until it is re-read.
            self.broken = True
            raise
        fault_point("log.after_fsync")
        self._note_term(term, first)
        file.add_group(first, len(group))
        self.appended_bytes += len(group)
        self.next_sequence = first + len(entries)  # last: readers go by it
        return first

    def _check_usable(self) -> None:
        if self.broken or self._file is None:
            raise ShardStopped(f"{self.folder}: the log failed earlier and is closed")

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        view = memoryview(data)
        with storage_errors(self.folder):
            while view:
                view = view[os.write(self._file, view) :]

    def _undo_write(self, file: _File) -> None:
        assert self._file is not None
        try:
            os.ftruncate(self._file, file.size)
        except OSError:
            self.broken = True

    def rotate(self) -> None:
        """Begin a new file, so that `trim` can drop the entries up to here once they are elsewhere.
        StorageFull leaves the log as it was."""
        if self._files[-1].first < self.next_sequence:
            previous = self._file
            with self._shape:
                self._begin_file()
            if previous is not None:
                os.close(previous)
        self.appended_bytes = 0

    def _begin_file(self) -> None:
        """Entries go to a new file from now on. After an error all is as before."""
        path = self.folder / f"{self.next_sequence:020d}.log"
        header, salt = encode_file_header(self.next_sequence)
        with storage_errors(path):
            descriptor = os.open(path, _APPEND | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                os.write(descriptor, header)
                os.fsync(descriptor)
                sync_folder(self.folder)
            except BaseException:
                os.close(descriptor)
                path.unlink(missing_ok=True)
                raise
        self._file, self._salt = descriptor, salt
        self._files.append(_File(path, self.next_sequence, len(header)))

    # -- removing ---------------------------------------------------------------------------------
    def cut(self, after: int) -> None:
        """Remove every entry past `after`: they were never committed. Durable when it returns.

        After a crash on the way the log ends somewhere between `after` and where it ended, and the
        cut can be made again; so too after StorageFull. Any other error: broken.
        """
        self._check_usable()
        if after + 1 >= self.next_sequence:
            return
        must(after + 1 >= self._files[0].first, f"{self.folder}: entry {after} is gone already")
        try:
            with self._shape:
                self._remove_files(after)
                if after + 1 < self.next_sequence:
                    self._cut_file(after)
        except ShoalError:
            raise
        except BaseException:
            self.broken = True
            raise

    def _remove_files(self, after: int) -> None:
        """Those behind the file of entry after + 1, the last one first: what is left has no gaps."""
        while self._files[-1].first > after + 1:
            file = self._files.pop()
            self._forget(file.first)
            file.path.unlink()
            sync_folder(self.folder)
            fault_point("log.cut_after_remove")
            self._close_file()
        if self._file is None:
            last = self._files[-1]
            with last.path.open("rb") as opened:
                header = decode_file_header(last.path, opened.read(FILE_HEADER_BYTES))
            must(header is not None, f"{last.path}: the header is damaged")
            assert header is not None
            self._file, self._salt = os.open(last.path, _APPEND), header[0]
            self.appended_bytes = last.size

    def _cut_file(self, after: int) -> None:
        """Write the last file anew, without its entries past `after`. Under a new salt: blocks that
        the file system gives back after a crash cannot pass for groups of it."""
        old = self._files[-1]
        header, salt = encode_file_header(old.first)
        new, end = _File(old.path, old.first, len(header)), old.first
        path = old.path.with_suffix(".log.new")
        with storage_errors(path):
            descriptor = os.open(path, _APPEND | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                with os.fdopen(os.dup(descriptor), "wb") as file:
                    file.write(header)
                    for group in self._groups(old, old.first, after + 1):
                        kept = group.between(old.first, after + 1)
                        data = encode_group(kept.first, kept.term, kept.entries, salt)
                        file.write(data)
                        new.add_group(kept.first, len(data))
                        end = kept.end
                if end != after + 1:
                    raise ShardStopped(f"{old.path}: entry {end} is damaged. Restore the shard.")
                os.fsync(descriptor)
            except BaseException:
                os.close(descriptor)
                path.unlink(missing_ok=True)
                raise
        fault_point("log.cut_before_rename")
        os.replace(path, old.path)
        sync_folder(self.folder)
        fault_point("log.cut_after_rename")
        self._close_file()
        self._file, self._salt = descriptor, salt
        self._files[-1] = new
        self._forget(after + 1)
        self.appended_bytes = min(self.appended_bytes, new.size)

    def _forget(self, end: int) -> None:
        """The log ends before entry `end`."""
        self.next_sequence = end
        while self._terms and self._terms[-1][1] >= end:
            self._terms.pop()

    def reset(self, first: int, terms: Terms = ()) -> None:
        """Begin anew, without entries, before entry `first`; terms: those that began earlier.

        For a replica whose files came from another. Not one step: a crash on the way leaves a log
        that fits no manifest, so call it before the manifest of the new files is there.
        """
        with self._shape:
            self._close_file()
            self._files.clear()
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self.folder.iterdir(), reverse=True):
                path.unlink()
            self.next_sequence, self._terms, self.broken = first, list(terms), False
            self.appended_bytes = 0
            self._begin_file()

    def trim(self, upto: int) -> None:
        """Delete old files whose entries are all <= `upto`, as long as retain_bytes are left; never
        the one being written. Call it with what is in segments and their manifest."""
        with self._shape:
            left = sum(file.size for file in self._files)
            while len(self._files) > 1 and self._files[1].first <= upto + 1:
                left -= self._files[0].size
                if left < self.retain_bytes:
                    break
                self._files.pop(0).path.unlink()
        fault_point("log.after_trim")

    # -- reading ----------------------------------------------------------------------------------
    @property
    def first_sequence(self) -> int:
        """The oldest entry that `read` may find; next_sequence when there is none."""
        return self._files[0].first

    def read(self, first: int, bytes_max: int) -> list[Group]:
        """Durable entries from `first` on: about bytes_max, but one at least; [] past the end.

        Raises EntriesGone where they were trimmed away, or the disk has damaged them. Cost: what it
        returns and 256 KiB; it waits for a `trim`, `cut` or other `read`, not for `append`.
        """
        with self._shape:
            end = self.next_sequence
            number = bisect_right(self._files, first, key=lambda file: file.first) - 1
            if first >= end:
                return []
            if number < 0:
                raise EntriesGone(f"{self.folder}: entry {first} is older than the log")
            found: list[Group] = []
            for file in self._files[number:]:
                for group in self._groups(file, first, end):
                    part = _begin_of(group.between(first, end), bytes_max, always=not found)
                    if part.entries:
                        found.append(part)
                    bytes_max -= sum(map(len, part.entries))
                    first = part.end
                    if first < group.end:
                        return found
            if first < end:
                _log.error("log_damaged", folder=self.folder, entry=first)
            if not found:
                raise EntriesGone(f"{self.folder}: entry {first} cannot be read any more")
            return found

    def _groups(self, file: _File, first: int, end: int) -> Iterator[Group]:
        """Whole groups of a file with entries of first .. end - 1, without gaps from `first` on."""
        mark = bisect_right(file.marks, first, key=lambda mark: mark[0]) - 1
        with file.path.open("rb", buffering=_MARK_BYTES) as opened:
            header = decode_file_header(file.path, opened.read(FILE_HEADER_BYTES))
            if header is None:
                return
            opened.seek(file.marks[max(mark, 0)][1])
            for group in groups_from(opened, header[0], first, end):
                if group.first > first:
                    return
                first = group.end
                yield group

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


def _begin_of(group: Group, bytes_max: int, *, always: bool) -> Group:
    """The first entries of a group that take bytes_max together. always: one at least."""
    count = size = 0
    for entry in group.entries:
        size += len(entry)
        if size > bytes_max and not (always and count == 0):
            break
        count += 1
    return group.between(group.first, group.first + count)
