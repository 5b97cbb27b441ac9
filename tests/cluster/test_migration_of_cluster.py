"""The model of a collection is changed in a cluster whose processes die, under load.

Two coordinators, three storage nodes, two replicas of each shard. What a wrong answer is, see
tests/migration_load.py; on top of it each replica is read through its own node at the end.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import httpx
import pytest

pytest.importorskip("torch")

from cluster_harness import Cluster
from harness import wait_until
from migration_load import (
    NAME,
    Grpc,
    Http,
    Migrate,
    Point,
    Reader,
    TwoModels,
    Writer,
    check_points,
    create,
    fill,
    scroll,
)

from shoal.announcement import read_node_info
from shoal.batch import PointBatch
from shoal.errors import ShoalError
from shoal.rpc.client import NodeClient
from shoal.storage_api import Guard, Scroll

pytestmark = pytest.mark.cluster

SEED = int(os.environ.get("SHOAL_CLUSTER_SEED", "1"))
SHARDS, REPLICAS, POINTS = 3, 2, 400
RATE = 25  # points a second: slow enough to be interrupted
ANSWERS = 15  # of each reader, in every phase
LAYOUT = {"etcd": 1, "coordinator": 2, "storage-node": 3, "monitor": 1}
TYPED = {408, 429, 503, 507}  # what a writer may be told while something is broken


class World:
    """The cluster, its clients, and the migration as asked of whichever coordinator is up."""

    def __init__(self, cluster: Cluster, meant: TwoModels) -> None:
        self.cluster = cluster
        with cluster.http() as plain:
            create(plain, shard_number=SHARDS, replication_factor=REPLICAS)
        with closing(Http(cluster.url("c1"))) as http:
            self.still = fill(http, POINTS, SEED)
        self.down: set[str] = set()
        self.lost = False  # a storage node was killed and has not been replaced
        grpc = ",".join(_grpc_of(cluster, name) for name in ("c1", "c2"))
        self.readers = {
            name: Reader(f"reader {name}", way, meant, self.still, SEED, told=self._killed)
            for name, way in {
                "c1": self._speaking("c1"),
                "c2": self._speaking("c2"),
                "grpc": lambda: Grpc(grpc),  # of any: it goes to the other by itself
            }.items()
        }
        self.writers = [
            Writer(number, self._speaking(name), meant, SEED, told=self._may_be_told)
            for number, name in enumerate(("c1", "c2"))
        ]
        self.clients = [*self.readers.values(), *self.writers]

    def _speaking(self, name: str) -> Callable[[], Http]:
        """To that coordinator, or the other one while it is down."""

        def speak() -> Http:
            return Http(self.cluster.url(self.up() if name in self.down else name))

        return speak

    def up(self) -> str:
        return next(name for name in ("c2", "c1") if name not in self.down)

    def _killed(self, error: Exception) -> bool:
        """The coordinator that was talked to is gone: nobody could have answered."""
        return bool(self.down) and isinstance(error, httpx.TransportError)

    def _may_be_told(self, error: Exception) -> bool:
        return self._killed(error) or (self.lost and any(f": {c} " in str(error) for c in TYPED))

    @contextmanager
    def migrate(self, name: str = "") -> Iterator[Migrate]:
        with closing(Migrate(self.cluster.url(name or self.up()))) as migrate:
            yield migrate

    def go_on(self) -> None:
        """Until every reader has some more answers, and every writer some more writes."""
        answers = {r.name: len(r.answers) + ANSWERS for r in self.readers.values()}
        writes = {w.name: w.writes + 5 for w in self.writers}

        def went_on() -> bool:
            self.check()
            return all(len(r.answers) >= answers[r.name] for r in self.readers.values()) and all(
                w.writes >= writes[w.name] for w in self.writers
            )

        wait_until(went_on, within_s=60, what="answers")

    def check(self) -> None:
        for client in self.clients:
            client.check()

    def answered_by(self, reader: str, began: float) -> set[str]:
        return self.readers[reader].models_between(began, time.monotonic())

    def there(self) -> dict[int, Point]:
        return {id_: point for writer in self.writers for id_, point in writer.there.items()}

    def doubtful(self) -> set[int]:
        return {id_ for writer in self.writers for id_ in writer.doubtful}

    def stop(self) -> None:
        for client in self.clients:
            client.give_up()
        for client in self.clients:
            client.stop()


def _grpc_of(cluster: Cluster, name: str) -> str:
    said = read_node_info(cluster[name].folder)
    assert said is not None
    return said.grpc


def test_a_migration_survives_its_cluster(make_cluster: Any, tmp_path: Any) -> None:
    print(f"seed {SEED}")
    meant = TwoModels(tmp_path / "models")
    monitor = {"failover_grace_s": 1.0, "rereplicate_after_s": 2.0}
    settings = {"coordinator": meant.settings, "monitor": monitor}
    cluster: Cluster = make_cluster(layout=LAYOUT, settings=settings)
    world = World(cluster, meant)
    try:
        for client in world.clients:
            client.start()
        world.go_on()
        with world.migrate() as migrate:
            migrate.start(points_per_second=RATE)
            migrate.until(lambda s: s["phase"] == "copying" and s["done"] > 0, *world.clients)
        for writer in world.writers:
            writer.allow("old", "new", retexts=True)
        kill_the_coordinator_that_copies(world)
        kill_a_primary_and_wait_for_a_new_replica(world)
        finish_and_switch(world)
    finally:
        world.stop()
    expected, doubtful = world.still | world.there(), world.doubtful()
    for name in ("c1", "c2"):
        with cluster.http(name) as plain:
            check_points(scroll(plain), expected, "new", meant, doubtful)
    stored = replicas_agree(cluster)
    assert set(stored) == {"v", "v\x1f1"}
    with world.migrate() as migrate:
        migrate.ask("drop", {"model": "old"})
        migrate.until_over()
    assert set(replicas_agree(cluster)) == {"v\x1f1"}
    with cluster.http("c1") as plain:
        check_points(scroll(plain), expected, "new", meant, doubtful)
    for client in world.clients:
        print(client.name, len(client.errors), client.errors[:2])


def kill_the_coordinator_that_copies(world: World) -> None:
    with world.migrate() as migrate:
        first = migrate.until(lambda s: s.get("copied_by") is not None, *world.clients)["copied_by"]
    world.down.add(first)
    world.cluster[first].kill9()
    with world.migrate() as migrate:
        done = migrate.status()["done"]
        status = migrate.until(
            lambda s: s.get("copied_by") not in (None, first) and s["done"] > done, *world.clients
        )
    assert status["left"] > 0, "it should be in the middle of it"
    world.go_on()
    world.cluster[first].launch()
    world.cluster[first].wait_ready()
    world.down.clear()


def kill_a_primary_and_wait_for_a_new_replica(world: World) -> None:
    """The third node gets its replica of shards that hold some points with both vectors."""
    cluster = world.cluster
    lost = cluster.shards(NAME)[0]["primary"]
    world.lost = True
    cluster[lost].kill9()
    with world.migrate() as migrate:

        def replaced() -> bool:
            world.check()
            status = migrate.status()
            if status["left"] < POINTS // 4 and status["points_per_second_max"]:
                migrate.start(points_per_second=0)  # it must not end before they come
            return in_sync_without(world, lost)

        wait_until(replaced, within_s=90, what="new replicas for those of the node that was killed")
        done = migrate.status()["done"]
        migrate.start(points_per_second=RATE)
        migrate.until(lambda s: s["done"] > done, *world.clients)
    world.go_on()
    cluster[lost].launch()
    cluster[lost].wait_ready()
    world.go_on()
    world.lost = False


def in_sync_without(world: World, lost: str) -> bool:
    return all(
        len([name for name in shard["in_sync"] if name != lost]) == REPLICAS
        for shard in world.cluster.shards(NAME)
    )


def finish_and_switch(world: World) -> None:
    """What one coordinator switches, the other follows; no answer is of both."""
    for writer in world.writers:
        writer.allow("old", "new", retexts=False)
    with world.migrate("c1") as c1, world.migrate("c2") as c2:
        c1.start()
        c2.until(lambda s: s["left"] == 0, *world.clients)
        c2.ask("switch")
        followed(world, c1, c2, "new")
        for reader in world.readers.values():
            reader.ask_for("", "old", "new")
        world.go_on()
        c1.ask("rollback")
        followed(world, c2, c1, "old")
        c2.until(lambda s: s["left"] == 0, *world.clients)
        c2.ask("switch")
        followed(world, c1, c2, "new")


def followed(world: World, other: Migrate, first: Migrate, model: str) -> None:
    """`first` has changed it: it answers so at once, and `other` soon."""
    began = time.monotonic()
    for migrate in (first, other):
        migrate.until(lambda s: s["current"]["model"] == model, *world.clients)
    seen = time.monotonic()
    world.go_on()
    name = "c2" if model == "new" else "c1"
    assert world.answered_by(name, began) == {model}
    for reader in world.readers:
        assert world.answered_by(reader, seen) == {model}, reader


# -- every replica --------------------------------------------------------------------------------
def replicas_agree(cluster: Cluster) -> dict[str, int]:
    """Wait until the replicas of each shard hold the same; stored name of a vector -> points."""
    found: dict[str, int] = {}
    complaint: list[str] = []

    def same() -> bool:
        found.clear()
        try:
            complaint[:] = [asyncio.run(_compare(cluster, found))]
        except ShoalError as error:  # a replica that is on its way
            complaint[:] = [str(error)]
        return not complaint[0]

    try:
        wait_until(same, within_s=30, what="replicas that hold the same")
    except AssertionError as error:
        raise AssertionError(f"{error}: {complaint}") from error
    return found


async def _compare(cluster: Cluster, found: dict[str, int]) -> str:
    """What differs; "" when nothing does."""
    for number, shard in enumerate(cluster.shards(NAME)):
        if shard["joining"] or len(shard["in_sync"]) < REPLICAS:
            return f"shard {number} is not whole"
        contents = [await _content(cluster, node, number) for node in shard["in_sync"]]
        for node, other in zip(shard["in_sync"][1:], contents[1:], strict=True):
            if other != contents[0]:
                return f"shard {number} on {node} differs from {shard['in_sync'][0]}"
        for vectors in contents[0].values():
            for name in vectors:
                found[name] = found.get(name, 0) + 1
    return ""


async def _content(cluster: Cluster, node: str, shard: int) -> dict[int, dict[str, bytes]]:
    """Point -> its vectors by their stored names, as this replica has them."""
    client = NodeClient(_grpc_of(cluster, node), node_id=node)
    try:
        wanted = Scroll(limit=10_000, with_payload=True, with_vectors=True)
        (key,) = [held.key for held in await client.status() if held.key.shard == shard]
        points: PointBatch = (await client.scroll(key, wanted, Guard())).value
    finally:
        await client.close()
    content: dict[int, dict[str, bytes]] = {}
    for row, id_ in enumerate(points.ids.keys()):
        content[id_] = {
            name: block.values[row].tobytes()
            for name, block in points.dense.items()
            if block.present is None or block.present[row]
        }
    return content
