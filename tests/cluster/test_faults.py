"""Every fault that a cluster must survive, on real processes and under load.

Two writers and a reader work all the time. Each test strikes, waits until writes go on while the
fault lasts, heals, waits until every replica is in sync again, stops the load and checks everything:
what was acknowledged is there, what was deleted is not. How long nothing was answered is printed, and
with SHOAL_FAULTS_TABLE=file the table of docs/failure_model.md is written there.

The tests share one cluster as long as they pass; after a failure the next one makes a new one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_harness import GRACE_S, LEASE_S, Cluster
from harness import wait_until
from links import Links
from load import COLLECTION, Reader, Writer, create_collection, verify

pytestmark = pytest.mark.cluster

SEED = int(os.environ.get("SHOAL_CLUSTER_SEED", "1"))
TABLE = os.environ.get("SHOAL_FAULTS_TABLE")
SHARDS, REPLICAS = 3, 3
OPERATIONS = 60  # acknowledged by each writer before, during and after a fault
DISK_BYTES = 96 * 1024 * 1024
SLACK_S = 3.0  # everything runs on one machine, which tests keep busy
STORAGE = ("s1", "s2", "s3")
ETCD = ("etcd1", "etcd2", "etcd3")


class World:
    """A cluster whose connections can be cut, and its clients."""

    def __init__(self, folder: Path, small_disk: Path | None) -> None:
        self.cluster: Cluster
        self.links = Links([*STORAGE, *ETCD], self._pids)
        fronts = self.links.ports
        metadata = "etcd://" + ",".join(f"127.0.0.1:{fronts[name]}" for name in ETCD)
        settings: dict[str, dict[str, object]] = {
            name: {"metadata": metadata, "advertise_grpc_port": fronts[name]} for name in STORAGE
        }
        settings["coordinator"] = {"encoder_model": "none"}
        if small_disk is not None:
            settings["s1"] |= {"data_dir": small_disk / "data", "disk_free_bytes_min": "8MiB"}
        self.small_disk = small_disk
        self.cluster = Cluster(folder, settings=settings)
        urls = [self.cluster.url("c1"), self.cluster.url("c2")]
        self.writers = [Writer(number, SEED, urls) for number in range(2)]
        self.reader = Reader(urls, SEED)
        for name in (*STORAGE, *ETCD):
            process = self.cluster[name]
            self.links.lead_to(name, process.plan.ports[0])
        self.cluster.start()
        with self.cluster.http() as http:
            create_collection(http, shards=SHARDS, replicas=REPLICAS)
        self.sound = True  # False from the start of a test until it has passed

    def _pids(self) -> dict[str, int]:
        return {p.name: p.pid for p in self.cluster.processes.values() if p.pid is not None}

    def close(self) -> None:
        for client in (*self.writers, self.reader):
            client.give_up()
        for process in self.cluster.processes.values():
            process.resume()
        self.cluster.kill9()
        self.links.close()

    # -- what tests say ---------------------------------------------------------------------------
    def primary(self) -> str:
        """The node that leads the first shard."""
        name: str = self.cluster.shards(COLLECTION)[0]["primary"]
        return name

    def secondary(self) -> str:
        first = self.cluster.shards(COLLECTION)[0]
        return next(name for name in first["in_sync"] if name != first["primary"])

    def progress(self, within_s: float = 60.0) -> None:
        """Until every writer got OPERATIONS more acknowledged."""
        goals = [writer.ledger.operations + OPERATIONS for writer in self.writers]
        wait_until(
            lambda: all(
                writer.failure is not None or writer.ledger.operations >= goal
                for writer, goal in zip(self.writers, goals, strict=True)
            ),
            within_s=within_s,
            what=f"{OPERATIONS} more operations of every writer",
        )

    def endure(
        self,
        fault: str,
        strike: Callable[[], None],
        heal: Callable[[], None],
        *,
        writes_s_max: float = 2 * LEASE_S + SLACK_S,
        reads_s_max: float = 1.0 + SLACK_S,
        lasts_s: float = 0.0,
    ) -> None:
        """The life of one fault, as above. lasts_s: at least so long, even if writes go on sooner."""
        self.sound = False
        print(f"{fault}: seed {SEED}")
        clients = (*self.writers, self.reader)
        self.cluster.wait_active(COLLECTION, SHARDS * REPLICAS)
        for client in clients:
            client.errors.clear()
            client.start()
        self.progress()
        for client in clients:
            client.gaps.close()
        struck = time.monotonic()
        strike()
        self.progress()
        ends = struck + lasts_s
        wait_until(lambda: time.monotonic() >= ends, within_s=lasts_s + 1, what="the fault to end")
        heal()
        self.cluster.wait_active(COLLECTION, SHARDS * REPLICAS)
        healed_s = time.monotonic() - struck
        self.progress()
        for client in clients:
            client.stop()
        writes_s = max(writer.gaps.close() for writer in self.writers)
        reads_s = self.reader.gaps.close()
        for coordinator in ("c1", "c2"):
            with self.cluster.http(coordinator) as http:
                verify(http, self.writers, f"{fault}, seed {SEED}, {coordinator}")
        told = {name: n for writer in self.writers for name, n in writer.errors.items()}
        row = f"| {fault} | {writes_s:.1f} | {reads_s:.1f} | {healed_s:.0f} | 0 | 0 |"
        print(f"{row} writers were told {told}, the reader {self.reader.errors}")
        if TABLE:
            with Path(TABLE).open("a") as table:
                table.write(row + "\n")
        assert writes_s <= writes_s_max, f"no write for {writes_s:.1f} s"
        assert reads_s <= reads_s_max, f"no read for {reads_s:.1f} s"
        self.sound = True

    def restart(self, *names: str) -> None:
        for name in names:
            self.cluster[name].launch()
        for name in names:
            self.cluster[name].wait_ready()


_SHARED: list[World] = []


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A file system of DISK_BYTES for one storage node; None where mounting is not possible."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def worlds(
    tmp_path_factory: pytest.TempPathFactory, small_disk: Path | None
) -> Iterator[Callable[[], World]]:
    def sound() -> World:
        if _SHARED and not _SHARED[-1].sound:
            _SHARED.pop().close()
            if small_disk is not None:
                shutil.rmtree(small_disk / "data", ignore_errors=True)
        if not _SHARED:
            _SHARED.append(World(tmp_path_factory.mktemp("faults") / "cluster", small_disk))
        return _SHARED[-1]

    yield sound
    while _SHARED:
        _SHARED.pop().close()


@pytest.fixture
def world(worlds: Callable[[], World], note_cluster: Callable[[Cluster], None]) -> World:
    world = worlds()
    note_cluster(world.cluster)
    return world


# -- the faults ------------------------------------------------------------------------------------


def test_kill_the_primary(world: World) -> None:
    name = world.primary()
    world.endure("kill -9 primary", world.cluster[name].kill9, lambda: world.restart(name))


def test_kill_a_replica(world: World) -> None:
    name = world.secondary()
    world.endure("kill -9 replica", world.cluster[name].kill9, lambda: world.restart(name))


def test_pause_the_primary_for_longer_than_its_lease(world: World) -> None:
    process = world.cluster[world.primary()]
    world.endure(
        "pause primary for 3 leases, resume", process.pause, process.resume, lasts_s=3 * LEASE_S
    )


def test_cut_the_primary_from_etcd(world: World) -> None:
    """Nobody can tell it that it has been replaced: its replicas do."""
    name = world.primary()

    def strike() -> None:
        assert any(world.links.knows(name, member) for member in ETCD)
        for member in ETCD:
            world.links.cut(name, member)

    world.endure("cut primary from etcd only", strike, world.links.heal, lasts_s=4 * LEASE_S)


def test_cut_the_primary_from_its_replicas(world: World) -> None:
    """It holds its lease and answers clients, and can confirm nothing by itself."""
    name = world.primary()

    def strike() -> None:
        for other in STORAGE:
            if other != name:
                assert world.links.knows(name, other)
                world.links.cut(name, other)

    world.endure("cut primary from replicas only", strike, world.links.heal, lasts_s=2 * LEASE_S)


def test_cut_one_way(world: World) -> None:
    """What the primary says to one replica is lost; what that replica says arrives."""
    primary, other = world.primary(), world.secondary()
    assert world.links.knows(primary, other)
    world.endure(
        "cut one way, primary to a replica",
        lambda: world.links.cut(primary, other, one_way=True),
        world.links.heal,
        lasts_s=2 * LEASE_S,
    )


def test_kill_an_etcd_member(world: World) -> None:
    world.endure(
        "kill -9 an etcd member", world.cluster["etcd1"].kill9, lambda: world.restart("etcd1")
    )


def test_kill_a_coordinator(world: World) -> None:
    world.endure("kill -9 a coordinator", world.cluster["c1"].kill9, lambda: world.restart("c1"))


def test_kill_the_monitor_that_leads_and_then_the_primary(world: World) -> None:
    leader, name = world.cluster.report()["leader"], world.primary()

    def strike() -> None:
        world.cluster[leader].kill9()
        world.cluster[name].kill9()

    world.endure(
        "kill -9 the leading monitor and a primary",
        strike,
        lambda: world.restart(leader, name),
        writes_s_max=2 * LEASE_S + 2 * GRACE_S + LEASE_S + SLACK_S,
    )


def test_fill_one_disk(world: World) -> None:
    if world.small_disk is None:
        pytest.skip("mounting a small file system is not possible here")
    ballast = world.small_disk / "ballast"

    def strike() -> None:
        with ballast.open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 20))
                    file.flush()
            except OSError:
                pass  # it is full

    world.endure("fill one disk", strike, ballast.unlink, lasts_s=2 * LEASE_S)


def test_restart_everything_at_once(world: World) -> None:
    """Writes and reads stop, of course; what counts is what is there afterwards."""
    processes = world.cluster.processes

    def strike() -> None:
        for process in processes.values():
            process.signal(signal.SIGKILL)
        for process in processes.values():
            process.kill9()
        world.cluster.start()

    world.endure(
        "kill -9 everything, start it again",
        strike,
        lambda: None,
        writes_s_max=90.0,
        reads_s_max=90.0,
    )
