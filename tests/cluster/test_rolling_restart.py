"""All storage nodes are stopped by SIGTERM and started again, one after the other, under load: what
they lead is led by others before they go, so that writers notice little and are told nothing."""

from __future__ import annotations

import os
import time

import pytest
from cluster_harness import LEASE_S, Cluster
from load import COLLECTION, Reader, Writer, create_collection, verify
from test_smoke import progress

pytestmark = pytest.mark.cluster

SEED = int(os.environ.get("SHOAL_CLUSTER_SEED", "1"))
OPERATIONS = 60


def test_a_rolling_restart_of_the_storage_nodes(make_cluster) -> None:
    print(f"cluster test: seed {SEED}")
    cluster: Cluster = make_cluster(settings={"coordinator": {"encoder_model": "none"}})
    with cluster.http() as http:
        create_collection(http)
    urls = [cluster.url("c1"), cluster.url("c2")]
    writers = [Writer(number, SEED, urls) for number in range(2)]
    reader = Reader(urls, SEED)
    clients = (*writers, reader)
    for client in clients:
        client.start()
    progress(writers, OPERATIONS)
    for name in ("s1", "s2", "s3"):
        for client in clients:
            client.gaps.close()
            client.errors.clear()
        led = sum(shard["primary"] == name for shard in cluster.shards(COLLECTION))
        began = time.monotonic()
        cluster[name].stop()
        stopped_s = time.monotonic() - began
        assert cluster[name].returncode == 0
        log = cluster[name].log()
        assert "handed_over shards=3" in log
        assert "not_handed_over" not in log
        progress(writers, OPERATIONS)
        cluster[name].launch()
        cluster[name].wait_ready()
        cluster.wait_active(COLLECTION, 9)
        progress(writers, OPERATIONS)
        without_writes = max(writer.gaps.close() for writer in writers)
        told = [client.errors for client in clients]
        print(
            f"{name} led {led}, stopped in {stopped_s:.1f} s; without writes {without_writes:.2f} s, "
            f"without reads {reader.gaps.close():.2f} s; clients were told {told}"
        )
        assert without_writes <= 2 * LEASE_S + 2
    for client in clients:
        client.stop()
    with cluster.http() as http:
        assert verify(http, writers, f"seed {SEED}") > 0
