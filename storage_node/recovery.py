"""Opening a shard: from what is on disk to the state that it had.

Nothing is deleted before it is sure that the manifest is whole. Damage raises ShardStopped with the
file's name; a damaged index is dropped instead, since it is built again from what is there.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from shoal import telemetry
from shoal.errors import ShardStopped, ShoalError, Unavailable
from shoal.storage_api import ShardSpec
from storage_node.entries import decode
from storage_node.files import verify_file
from storage_node.log import LOG_FILE_BYTES_MIN, Log
from storage_node.manifest import Manifest, SegmentRecord, read_manifest, write_manifest
from storage_node.segment import SealedSegment, stored_names, without_files
from storage_node.state import ShardState
from storage_node.vector_set import as_of, columns_of

__all__ = ["Recovered", "recover"]

_log = telemetry.logger("storage")


@dataclass(slots=True)
class Recovered:
    """unverified: segments whose files were not checked, because there were too many bytes.
    tail: (sequence, term, entry) of those on disk that are not known to be committed, in order."""

    state: ShardState
    manifest: Manifest
    unverified: list[SegmentRecord] = field(default_factory=list)
    tail: list[tuple[int, int, bytes]] = field(default_factory=list)


def recover(
    folder: Path,
    spec: ShardSpec,
    log: Log,
    verify_bytes_max: int,
    *,
    new: bool,
    committed: int | None = None,
) -> Recovered:
    """Map the segments, replay the log; with `new` make a shard where there is none. The log is then
    ready to append. spec: what the shard was created with.

    committed: apply entries up to this one, and at least to the checkpoint, and hand back the rest
    as `tail`. None: all; for a shard whose only replica this is.
    """
    segments = folder / "segments"
    segments.mkdir(parents=True, exist_ok=True)
    found = read_manifest(folder)
    if found is None and (
        not new or any(segments.iterdir()) or log.size_on_disk() > LOG_FILE_BYTES_MIN
    ):
        raise ShardStopped(
            f"{folder / 'MANIFEST'} is missing. Nothing was changed. Restore it, or the shard, from "
            "a copy."
        )
    manifest = found or Manifest(collection_id=spec.key.collection_id, shard=spec.key.shard)
    kept = {str(record.segment_id) for record in manifest.segments}
    for path in segments.iterdir():
        if path.name not in kept:
            shutil.rmtree(path)  # a seal or merge that a crash cut off: the log has it all
    state = ShardState(as_of(spec, manifest), manifest.next_segment_id, manifest.checkpoint)
    recovered = Recovered(state, manifest)
    left = verify_bytes_max
    for record in manifest.segments:
        size = sum(length for length, _ in record.files.values())
        state.sealed.append(_open_segment(recovered, segments, record, verify=size <= left))
        left -= size
    created = columns_of(spec)
    state.merges = [
        merge if merge.columns is not None else merge.model_copy(update={"columns": created})
        for merge in manifest.merges
    ]
    for group in log.open(manifest.checkpoint, new=found is None, terms=manifest.terms):
        for sequence, entry in enumerate(group.entries, group.first):
            if sequence <= manifest.checkpoint:
                continue
            if committed is None or sequence <= committed:
                state.apply(decode(entry), sequence)
            else:
                recovered.tail.append((sequence, group.term, entry))
    if found is None:  # last: from now on a log must be there
        write_manifest(folder, manifest)
    return recovered


def _open_segment(
    recovered: Recovered, segments: Path, record: SegmentRecord, *, verify: bool
) -> SealedSegment:
    folder, spec = segments / str(record.segment_id), recovered.state.spec
    for path in folder.iterdir():
        if path.name not in record.files:
            path.unlink()  # tombstones or an index that no manifest came to name
    if verify:
        record = _verified(folder, record)
    else:
        recovered.unverified.append(record)
    try:
        segment = SealedSegment(folder, record, spec)
    except ShoalError:
        raise
    except Exception as error:  # not verified, and damaged: anything may come out of it
        raise ShardStopped(f"{folder} is damaged: {type(error).__name__}: {error}") from error
    for name in record.indexes:
        try:
            segment.open_graph(name)
        except (Unavailable, OSError) as error:
            _log.error("index_damaged", why=str(error))
    return segment


def _verified(folder: Path, record: SegmentRecord) -> SegmentRecord:
    """Check every file. The record without its damaged indexes; ShardStopped for anything else."""
    damaged: list[str] = []
    for file, expected in record.files.items():
        try:
            verify_file(folder / file, expected)
        except ShardStopped as error:
            if not file.startswith("index."):
                raise
            _log.error("index_damaged", why=error.message)
            damaged.append(file)
    return without_files(record, damaged, stored_names(folder)) if damaged else record
