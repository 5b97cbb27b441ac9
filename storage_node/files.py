"""Files that survive a crash, and the array file: named numpy arrays in one checksummed file.

    array file   8 bytes   magic "SHOALARR"
                 4 bytes   format version, little endian
                 4 bytes   length of the header
                 header    JSON {"meta": {...}, "arrays": {name: [dtype, shape, offset]}}
                 arrays    little endian, each at a multiple of 64 bytes

The checksum of the whole file stands in the manifest that names it. A full disk is StorageFull.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from shoal.errors import FormatTooNew, ShardStopped, StorageFull

__all__ = [
    "FileSum",
    "FileWriter",
    "check_space",
    "checked_sum",
    "open_array_file",
    "storage_errors",
    "sync_folder",
    "verify_file",
    "write_array_file",
    "write_file",
]

_MAGIC = b"SHOALARR"
_VERSION = 1
_ALIGN = 64
_READ_BYTES = 1 << 20
FileSum = tuple[int, int]  # (bytes, crc32c)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """ENOSPC and the quota's twin become StorageFull; other OSErrors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFull(
                f"Storage is full: no space left to write {path.name}. Reads go on; free disk space "
                "and send the write again."
            ) from error
        raise


def check_space(folder: Path, needed: int) -> None:
    """StorageFull when fewer than `needed` bytes are free on the disk of `folder`."""
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise StorageFull(
            f"Storage is full: {free >> 20} MiB are free on the data disk and {needed >> 20} MiB must "
            "be. Reads go on; free disk space and send the write again."
        )


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (a rename or creation is not, until this returns)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FileWriter:
    """Write a new file piece by piece; `close` fsyncs it (the folder is the caller's to sync)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._crc = self._size = 0
        with storage_errors(path):
            self._file = path.open("wb")

    def write(self, part: bytes | memoryview | NDArray[Any]) -> None:
        whole = np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part
        data = memoryview(whole)
        data = data.cast("B") if data.nbytes else memoryview(b"")
        with storage_errors(self._path):
            for start in range(0, len(data), _READ_BYTES):
                chunk = bytes(data[start : start + _READ_BYTES])
                self._crc = google_crc32c.extend(self._crc, chunk)
                self._file.write(chunk)
        self._size += len(data)

    def close(self) -> FileSum:
        with storage_errors(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return self._size, self._crc

    def abandon(self) -> None:
        """Close after an error, without promises; a file of a full disk must not leak."""
        with contextlib.suppress(OSError):
            self._file.close()


def write_file(path: Path, parts: Iterable[bytes | memoryview | NDArray[Any]]) -> FileSum:
    """Write a new file and fsync it; the folder is the caller's to sync. Returns (bytes, crc32c)."""
    writer = FileWriter(path)
    try:
        for part in parts:
            writer.write(part)
        return writer.close()
    except BaseException:
        writer.abandon()
        raise


def checked_sum(path: Path) -> FileSum:
    """(bytes, crc32c) of a file, read without mapping it."""
    crc, size = 0, 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            crc = google_crc32c.extend(crc, chunk)
            size += len(chunk)
    return size, crc


def verify_file(path: Path, expected: FileSum) -> None:
    """Raises ShardStopped, naming the file, when it is missing or not what was written."""
    if not path.exists():
        raise ShardStopped(f"{path} is missing. Restore it, or the shard, from a copy.")
    if checked_sum(path) != tuple(expected):
        raise ShardStopped(
            f"{path} is damaged: its checksum or length differs from what was written. Restore it, "
            "or the shard, from a copy."
        )


def write_array_file(
    path: Path, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
) -> FileSum:
    """Write arrays (any dtype without objects) and JSON-able meta; fsynced. Deterministic."""
    layout: dict[str, tuple[str, list[int], int]] = {}
    offset = 0
    for name, array in arrays.items():
        offset = -(-offset // _ALIGN) * _ALIGN
        layout[name] = (array.dtype.newbyteorder("<").str, list(array.shape), offset)
        offset += array.nbytes
    header = json.dumps({"meta": meta, "arrays": layout}, separators=(",", ":")).encode()
    start = -(-(len(_MAGIC) + 8 + len(header)) // _ALIGN) * _ALIGN
    header = header.ljust(start - len(_MAGIC) - 8)

    def parts() -> Iterator[bytes | NDArray[Any]]:
        yield _MAGIC + struct.pack("<II", _VERSION, len(header)) + header
        position = 0
        for name, array in arrays.items():
            yield bytes(layout[name][2] - position)
            yield array.astype(array.dtype.newbyteorder("<"), copy=False)
            position = layout[name][2] + array.nbytes

    return write_file(path, parts())


def open_array_file(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays (read-only, memory-mapped) and meta. The caller has checked the checksum, or will."""
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise ShardStopped(f"{path} is empty: it was damaged after it was written") from error
    if data[:8] != _MAGIC:
        raise ShardStopped(f"{path} is not a Shoal array file: its first bytes are damaged")
    version, header_bytes = struct.unpack_from("<II", data, 8)
    if version > _VERSION:
        raise FormatTooNew(f"{path} has format {version}; this Shoal reads up to {_VERSION}")
    start = 16 + header_bytes
    header = json.loads(data[16:start])
    arrays = {}
    for name, (dtype, shape, offset) in header["arrays"].items():
        count = int(np.prod(shape))
        flat = np.frombuffer(data, np.dtype(dtype), count, start + offset) if count else None
        arrays[name] = (np.empty(0, dtype) if flat is None else flat).reshape(shape)
    return arrays, header["meta"]
