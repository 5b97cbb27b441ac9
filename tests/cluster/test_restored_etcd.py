"""etcd is put back to a backup while a cluster runs: nothing is deleted because of it, every process
stops and says why, and what the backup knows of is served again."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

import httpx
import pytest
from cluster_harness import SMALL, Cluster
from harness import wait_until
from qdrant_client import models

pytestmark = pytest.mark.cluster

PROCESSES = ("c1", "s1", "s2", "s3", "m1")


def create(cluster: Cluster, name: str) -> None:
    with cluster.http() as http:
        body = {
            "vectors": {"size": 4, "distance": "Dot"},
            "shard_number": 1,
            "replication_factor": 3,
        }
        http.put(f"/collections/{name}", json=body).raise_for_status()
    client = cluster.client()
    points = [models.PointStruct(id=n, vector=[float(n)] * 4) for n in range(50)]
    client.upsert(name, points)
    client.close()


def follows(cluster: Cluster, name: str) -> bool:
    """Whether every watch that lost etcd has it again."""
    lost: dict[str, bool] = {}
    for line in cluster[name].log().splitlines():
        if found := re.search(r" watch_(moves_on|goes_on) key=(\S+)", line):
            lost[found[2]] = found[1] == "moves_on"
    return bool(lost) and not any(lost.values())


def shard_folders(cluster: Cluster) -> list[Path]:
    return sorted(
        path.relative_to(cluster.folder)
        for name in ("s1", "s2", "s3")
        for path in (cluster[name].folder / "data" / "shards").glob("*/*")
    )


def test_a_restored_etcd_deletes_nothing(make_cluster) -> None:
    cluster: Cluster = make_cluster(
        layout=SMALL, settings={"coordinator": {"encoder_model": "none"}}
    )
    create(cluster, "before")
    etcd = cluster["etcd1"]
    data, backup = etcd.folder / "data", cluster.folder / "backup"
    etcd.stop()
    shutil.copytree(data, backup)
    etcd.launch()
    etcd.wait_ready()
    for name in PROCESSES:
        wait_until(
            partial(follows, cluster, name), within_s=60, what=f"{name} to follow etcd again"
        )
    create(cluster, "after")
    folders = shard_folders(cluster)
    assert len(folders) == 6

    etcd.kill9()
    shutil.rmtree(data)
    shutil.copytree(backup, data)
    etcd.launch()
    etcd.wait_ready()
    wait_until(
        lambda: not any(cluster[name].running for name in PROCESSES),
        within_s=90,
        what="every process to find out and stop",
    )
    for name in PROCESSES:
        assert cluster[name].returncode == 1, cluster[name].log_tail()
        assert "The metadata store went back" in cluster[name].log()
    assert shard_folders(cluster) == folders

    cluster.start()
    assert shard_folders(cluster) == folders
    cluster.wait_active("before", 3)
    client = cluster.client()
    assert client.count("before").count == 50
    client.upsert("before", [models.PointStruct(id=99, vector=[1.0] * 4)])
    assert client.count("before").count == 51
    assert not client.collection_exists("after")
    client.close()
    assert "replica_unknown" in cluster["s1"].log()


def test_nothing_stops_when_etcd_only_restarts(make_cluster) -> None:
    cluster: Cluster = make_cluster(
        layout=SMALL, settings={"coordinator": {"encoder_model": "none"}}
    )
    create(cluster, "books")
    etcd = cluster["etcd1"]
    etcd.kill9()
    etcd.launch()
    etcd.wait_ready()

    def written() -> bool:
        try:
            create(cluster, "others")
        except httpx.HTTPError:
            return False
        return True

    wait_until(written, within_s=60, what="a collection to be made")
    assert all(cluster[name].running for name in PROCESSES)
