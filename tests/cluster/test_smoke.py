"""A cluster of real processes, end to end: it comes up, a storage node dies under load, nothing that
was acknowledged is lost, and it heals."""

from __future__ import annotations

import os

import pytest
from cluster_harness import LEASE_S, Cluster
from harness import run_shoal, wait_until
from load import COLLECTION, Reader, Writer, create_collection, verify

pytestmark = pytest.mark.cluster

SEED = int(os.environ.get("SHOAL_CLUSTER_SEED", "1"))
OPERATIONS = 150  # acknowledged before and after each fault, by each writer


def progress(writers: list[Writer], operations: int, within_s: float = 90.0) -> None:
    """Wait until every writer got so many more operations acknowledged."""
    goals = [writer.ledger.operations + operations for writer in writers]
    wait_until(
        lambda: all(
            writer.failure is not None or writer.ledger.operations >= goal
            for writer, goal in zip(writers, goals, strict=True)
        ),
        within_s=within_s,
        what=f"{operations} more operations of every writer",
    )


def test_a_killed_storage_node_costs_nothing_that_was_acknowledged(make_cluster) -> None:
    print(f"cluster test: seed {SEED}")
    cluster: Cluster = make_cluster(settings={"coordinator": {"encoder_model": "none"}})
    with cluster.http() as http:
        create_collection(http)
    urls = [cluster.url("c1"), cluster.url("c2")]
    writers = [Writer(number, SEED, urls) for number in range(2)]
    reader = Reader(urls, SEED)
    for client in (*writers, reader):
        client.start()
    progress(writers, OPERATIONS)
    for client in (*writers, reader):
        client.gaps.close()

    cluster["s1"].kill9()
    progress(writers, OPERATIONS)
    without_writes = max(writer.gaps.close() for writer in writers)
    without_reads = reader.gaps.close()
    print(f"without writes {without_writes:.2f} s, without reads {without_reads:.2f} s")
    assert without_writes <= 2 * LEASE_S + 2

    cluster["s1"].launch()
    cluster["s1"].wait_ready()
    healed = cluster.wait_active(COLLECTION, 9)
    print(f"healed after {healed:.1f} s")
    progress(writers, OPERATIONS)
    for client in (*writers, reader):
        client.stop()
    for coordinator in ("c1", "c2"):
        with cluster.http(coordinator) as http:
            assert verify(http, writers, f"seed {SEED}, {coordinator}") > 0
            assert 'shoal_node_requests_total{node="s2"}' in http.get("/metrics").text
    told = [writer.errors for writer in writers]
    print(f"the writers were told {told}, the reader {reader.errors}")
    cluster.stop()
    assert [p.returncode for p in cluster.processes.values() if p.plan.role != "etcd"] == [0] * 7


def test_health_is_told_by_every_process(make_cluster) -> None:
    cluster: Cluster = make_cluster(
        layout={"etcd": 1, "coordinator": 1, "storage-node": 1, "index-node": 1, "monitor": 1}
    )
    for name in ("c1", "s1", "i1", "m1"):
        done = run_shoal(["health", str(cluster[name].folder)])
        assert done.returncode == 0, done.stderr
        assert "is ready" in done.stdout
    cluster["m1"].kill9()
    done = run_shoal(["health", str(cluster["m1"].folder)])
    assert done.returncode == 1
    assert "does not answer" in done.stderr
