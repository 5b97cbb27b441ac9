"""The bytes of a log file. What they mean together is storage_node/log.py.

    file    magic "SHOALLOG", version u32, crc u32, salt 8 bytes, first sequence u64
    group   salt 8 bytes, body length u32, crc32c u32, first sequence u64, term u64, count u32, 0 u32
            body: count x (length u32, entry bytes), padded to 8 bytes

Every file has its own random salt, so that bytes which a user stored cannot pass for a group. The
checksum leaves the salt out: a group keeps its bytes when it moves to another file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google_crc32c

from shoal.errors import FormatTooNew

__all__ = [
    "FILE_HEADER_BYTES",
    "Group",
    "decode_file_header",
    "decode_group",
    "encode_file_header",
    "encode_group",
    "groups_from",
]

_MAGIC = b"SHOALLOG"
_VERSION = 1
_FILE_HEADER = struct.Struct("<8sII8sQ")
_GROUP_HEADER = struct.Struct("<8sIIQQII")
_CRC_FROM = 16  # the checksum covers the group from here on: everything after itself
_LENGTH = struct.Struct("<I")
FILE_HEADER_BYTES = _FILE_HEADER.size


@dataclass(frozen=True, slots=True)
class Group:
    """Entries with the sequence numbers first, first + 1, … that became durable together."""

    first: int
    term: int
    entries: tuple[bytes, ...]

    @property
    def end(self) -> int:
        """The sequence number after the last entry."""
        return self.first + len(self.entries)

    def between(self, first: int, end: int) -> Group:
        """Its entries first .. end - 1, as far as it holds them."""
        start = max(first, self.first)
        part = self.entries[start - self.first : max(end - self.first, 0)]
        return Group(start, self.term, part)


def encode_file_header(first: int) -> tuple[bytes, bytes]:
    """The header of a new file, and the salt in it."""
    salt = os.urandom(8)
    tail = salt + struct.pack("<Q", first)
    return _MAGIC + struct.pack("<II", _VERSION, _header_crc(_VERSION, tail)) + tail, salt


def decode_file_header(path: Path, data: bytes) -> tuple[bytes, int] | None:
    """(salt, first sequence number); None when it is not whole."""
    if len(data) < FILE_HEADER_BYTES:
        return None
    magic, version, crc, salt, first = _FILE_HEADER.unpack_from(data)
    if magic != _MAGIC or crc != _header_crc(version, data[16:FILE_HEADER_BYTES]):
        return None
    if version > _VERSION:
        raise FormatTooNew(f"{path} has format {version}; this Shoal reads up to {_VERSION}")
    return salt, first


def _header_crc(version: int, tail: bytes) -> int:
    return int(google_crc32c.value(_MAGIC + struct.pack("<I", version) + tail))


def encode_group(first: int, term: int, entries: Sequence[bytes], salt: bytes) -> bytes:
    parts = [piece for entry in entries for piece in (_LENGTH.pack(len(entry)), entry)]
    body = b"".join(parts)
    body += bytes(-len(body) % 8)
    tail = struct.pack("<QQII", first, term, len(entries), 0)
    crc = google_crc32c.extend(google_crc32c.value(tail), body)
    return salt + struct.pack("<II", len(body), crc) + tail + body


def decode_group(data: bytes, offset: int, salt: bytes) -> tuple[Group | None, int]:
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


def groups_from(file: BinaryIO, salt: bytes, first: int, end: int) -> Iterator[Group]:
    """Groups with entries of first .. end - 1, from where `file` stands at a group. Those before
    are passed over without reading them. Ends at a group that is not whole."""
    while len(header := file.read(_GROUP_HEADER.size)) == _GROUP_HEADER.size:
        found, length, _, begins, _, count, _ = _GROUP_HEADER.unpack(header)
        if found != salt or begins >= end:
            return
        if begins + count <= first:
            file.seek(length, os.SEEK_CUR)
            continue
        group, _ = decode_group(header + file.read(length), 0, salt)
        if group is None:
            return
        yield group
