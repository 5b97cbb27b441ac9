"""Opening a replica: what is applied, what is handed back, and manifests of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from shoal.batch import DenseBlock, PointBatch
from shoal.ids import PointIds
from shoal.storage_api import Distance, ShardKey, ShardSpec, Upsert, VectorSpec
from storage_node.entries import encode
from storage_node.log import Log
from storage_node.manifest import Manifest, read_manifest, write_manifest
from storage_node.recovery import Recovered, recover

SPEC = ShardSpec(ShardKey(1, 0), "test", {"": VectorSpec(2, Distance.DOT)})


def upsert(key: int) -> bytes:
    points = PointBatch(PointIds.from_keys([key]), {"": DenseBlock(np.ones((1, 2), np.float32))})
    return encode(Upsert(points))


def opened(folder: Path, *, new: bool, committed: int | None = None) -> tuple[Recovered, Log]:
    log = Log(folder / "log")
    return recover(folder, SPEC, log, 1 << 30, new=new, committed=committed), log


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six entries: two of term 1, then a group of three and one of term 4."""
    _, log = opened(tmp_path, new=True)
    log.append([upsert(1), upsert(2)], 1)
    log.append([upsert(3), upsert(4), upsert(5)], 4)
    log.append([upsert(6)], 4)
    log.close()
    return tmp_path


@pytest.mark.parametrize("committed", [0, 1, 2, 4, 6, 100, None])
def test_what_is_not_known_to_be_committed_is_handed_back(
    folder: Path, committed: int | None
) -> None:
    recovered, log = opened(folder, new=False, committed=committed)
    applied = 6 if committed is None else min(committed, 6)
    assert recovered.state.applied == recovered.state.point_count == applied
    terms = [1, 1, 4, 4, 4, 4]
    assert recovered.tail == [(s, terms[s - 1], upsert(s)) for s in range(applied + 1, 7)]
    assert log.next_sequence == 7
    assert log.terms == ((1, 1), (4, 3))
    log.close()


def test_a_checkpoint_is_always_committed(folder: Path) -> None:
    manifest = Manifest(collection_id=1, shard=0, checkpoint=3, terms=((1, 1), (4, 3)))
    write_manifest(folder, manifest)
    recovered, log = opened(folder, new=False, committed=1)
    assert recovered.state.applied == 3
    assert [sequence for sequence, _, _ in recovered.tail] == [4, 5, 6]
    assert log.terms == ((1, 1), (4, 3))
    log.close()


def test_a_manifest_without_terms_is_of_one_term(tmp_path: Path) -> None:
    fields = {
        "format": 1,
        "collection_id": 1,
        "shard": 0,
        "term": 1,
        "checkpoint": 9,
        "next_segment_id": 4,
        "segments": [],
    }
    line = json.dumps(fields).encode()
    (tmp_path / "MANIFEST").write_bytes(line + b"\n%08x\n" % google_crc32c.value(line))
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest.terms == ((1, 1),)
    write_manifest(tmp_path, manifest)
    assert json.loads((tmp_path / "MANIFEST").read_bytes().split(b"\n")[0])["format"] == 3
