"""The manifest of a shard: which segments live, and up to which log entry they hold everything.

Two lines: JSON, then its crc32c in hex. Swapped atomically (write, fsync, rename, fsync the folder)
after the files that it names are durable; so at any crash there is one whole manifest, the old or
the new. Every file that a manifest does not name may be deleted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import google_crc32c
from pydantic import BaseModel, ConfigDict, Field

from shoal.errors import FormatTooNew, ShardStopped
from shoal.storage_api import Distance, VectorSpec
from storage_node.faults import fault_point
from storage_node.files import storage_errors, sync_folder

__all__ = [
    "AddedVector",
    "Manifest",
    "PendingMerge",
    "SegmentRecord",
    "read_manifest",
    "write_manifest",
]

_FORMAT = 3  # 1 had no terms and no merges; 2 nothing about vectors
_NAME = "MANIFEST"


class SegmentRecord(BaseModel):
    """One live segment. files: name -> (bytes, crc32c) of every file that must be there, older
    tombstones that a pending merge reads included; those of a vector that was dropped since may be
    gone. tombstones: the file with the rows that were dead at the checkpoint. indexes: vector names.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    segment_id: int
    rows: int
    files: dict[str, tuple[int, int]]
    tombstones: str | None = None
    indexes: tuple[str, ...] = ()


class PendingMerge(BaseModel):
    """A merge that is in the log, as entry `sequence`, and not done. tombstones: for each input the
    file with the rows to leave out (None: none), as of the last checkpoint before the entry; None as
    long as that checkpoint is not installed. columns: the vectors of the output, those of the shard
    at the entry (see vector_set.py); None: all that the shard was created with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequence: int
    inputs: tuple[int, ...]
    output: int
    tombstones: tuple[str | None, ...] | None = None
    columns: dict[str, int] | None = None


class AddedVector(BaseModel):
    """A VectorSpec that the log added, as entry `since`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    since: int
    dim: int
    distance: Distance
    multi: bool
    hnsw_m: int
    hnsw_ef_construct: int
    index_bytes_min: int | None

    def spec(self) -> VectorSpec:
        return VectorSpec(**self.model_dump(exclude={"since"}))


class Manifest(BaseModel):
    """checkpoint: every log entry up to this one is in the segments and their tombstones.
    terms: (term, its first log entry) of those up to the checkpoint, whose log may be trimmed.
    term: of the entries that a shard without other replicas writes. segments: ascending by id.
    merges: pending ones of entries up to the checkpoint, in their order.
    added, dropped: how the vectors of the shard at the checkpoint differ from those that it was
    created with. Added ones in their order; one that was dropped and added again is in both.
    epoch: of the vectors by then."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = _FORMAT
    collection_id: int
    shard: int
    term: int = 1
    checkpoint: int = 0
    terms: tuple[tuple[int, int], ...] = ()
    next_segment_id: int = 1
    segments: tuple[SegmentRecord, ...] = Field(default=())
    merges: tuple[PendingMerge, ...] = ()
    added: dict[str, AddedVector] = Field(default={})
    dropped: tuple[str, ...] = ()
    epoch: int = 0


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Durable when it returns. StorageFull leaves the old one in place."""
    line = manifest.model_dump_json().encode()
    temporary = folder / (_NAME + ".new")
    with storage_errors(temporary):
        with temporary.open("wb") as file:
            file.write(line + b"\n" + f"{google_crc32c.value(line):08x}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        fault_point("manifest.before_rename")
        os.replace(temporary, folder / _NAME)
        sync_folder(folder)
    fault_point("manifest.after_rename")


def read_manifest(folder: Path) -> Manifest | None:
    """None where there is none yet. ShardStopped when it is damaged."""
    path = folder / _NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    line, _, rest = data.partition(b"\n")
    if rest.strip() != f"{google_crc32c.value(line):08x}".encode():
        raise ShardStopped(
            f"{path} is damaged: its checksum does not fit. Restore the shard from a copy."
        )
    fields: dict[str, Any] = json.loads(line)
    if fields.get("format", 0) > _FORMAT:
        raise FormatTooNew(
            f"{path} has format {fields['format']}; this Shoal reads up to {_FORMAT}"
        )
    if fields.get("format") == 1 and fields["checkpoint"]:
        fields["terms"] = [[fields["term"], 1]]
    return Manifest.model_validate(fields | {"format": _FORMAT})
