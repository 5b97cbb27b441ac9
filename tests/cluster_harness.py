"""Whole clusters on this machine, for the tests that need one: `shoal.local_cluster` on free ports.

`Cluster`         3 etcd, 2 coordinators, 3 storage nodes, 2 monitors, with short leases; processes by
                  name (cluster["s1"]), faults, and what its answers say about replicas.
`ClusterServer`   the same, small, with the face of `harness.Server`: under `pytest --cluster` the tests
                  of one server run against it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from etcd_server import etcd_binary
from harness import ServerFailed, wait_until
from qdrant_client import QdrantClient

from shoal.announcement import read_node_info
from shoal.errors import Unavailable
from shoal.local_cluster import LocalCluster, LocalProcess
from shoal.settings import PROCESSES, setting_names

__all__ = ["LEASE_S", "Cluster", "ClusterServer"]

LEASE_S = 4  # etcd's own floor is 2; below 4 a machine that is busy with tests loses live leases
GRACE_S = 1.0
REREPLICATE_S = 8.0
HEAL_S_MAX = 90.0
FULL = {"etcd": 3, "coordinator": 2, "storage-node": 3, "monitor": 2}
SMALL = {"etcd": 1, "coordinator": 1, "storage-node": 3, "monitor": 1}
DEFAULTS: dict[str, dict[str, object]] = {
    "all": {"node_lease_s": LEASE_S},
    "storage-node": {"seal_bytes": 65_536},
    "monitor": {"failover_grace_s": GRACE_S, "rereplicate_after_s": REREPLICATE_S},
}


class Cluster(LocalCluster):
    """layout, settings: as LocalCluster's; settings are merged over DEFAULTS, role by role."""

    def __init__(
        self,
        folder: Path,
        *,
        layout: Mapping[str, int] = FULL,
        settings: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None:
        os.environ["ETCD_BIN"] = etcd_binary()
        given = settings or {}
        merged = {
            role: {**DEFAULTS.get(role, {}), **given.get(role, {})} for role in DEFAULTS | given
        }
        super().__init__(folder, layout=layout, settings=merged)

    def start(self) -> list[LocalProcess]:
        try:
            return super().start()
        except Unavailable as error:
            self.kill9()
            raise ServerFailed(error.message) from error

    def client(self, coordinator: str = "c1", **arguments: Any) -> QdrantClient:
        """A real client; the caller closes it."""
        return QdrantClient(
            url=self.url(coordinator), timeout=60, check_compatibility=False, **arguments
        )

    def http(self, coordinator: str = "c1", **arguments: Any) -> httpx.Client:
        arguments.setdefault("timeout", 60.0)
        return httpx.Client(base_url=self.url(coordinator), trust_env=False, **arguments)

    def report(self, coordinator: str = "c1") -> dict[str, Any]:
        """Shoal's own view of the whole cluster."""
        with self.http(coordinator, timeout=10.0) as http:
            answer = http.get("/shoal/v1/cluster")
            answer.raise_for_status()
            result: dict[str, Any] = answer.json()["result"]
            return result

    def shards(self, collection: str) -> list[dict[str, Any]]:
        """Each with term, primary, in_sync, joining, leaving, replicas."""
        collections = {c["name"]: c for c in self.report()["collections"]}
        shards: list[dict[str, Any]] = collections[collection]["shards"]
        return shards

    def active(self, collection: str) -> int:
        """Replicas in sync whose node lives, of all shards together."""
        return sum(
            replica["part"] == "in_sync" and not replica["lost"]
            for shard in self.shards(collection)
            for replica in shard["replicas"]
        )

    def wait_active(self, collection: str, count: int, *, within_s: float = HEAL_S_MAX) -> float:
        """Wait until so many replicas are in sync; the seconds that took."""
        began = time.monotonic()

        def there() -> bool:
            try:
                return self.active(collection) >= count
            except httpx.HTTPError:
                return False

        wait_until(there, within_s=within_s, what=f"{count} replicas of {collection} in sync")
        return time.monotonic() - began

    def logs(self, lines: int = 40) -> str:
        return "\n".join(
            f"---- {process.name}\n{process.log_tail(lines)}"
            for process in self.processes.values()
            if process.plan.role != "etcd"
        )


class ClusterServer:
    """A small cluster with the face of `harness.Server`; `data_dir` is the folder of the cluster."""

    def __init__(
        self,
        data_dir: Path,
        *,
        settings: Mapping[str, object] | None = None,
        fault: str | None = None,
    ) -> None:
        assert fault is None, "fault points are for the tests of one process"
        self.data_dir, self.settings = data_dir, dict(settings or {})
        self._cluster = Cluster(data_dir, layout=SMALL, settings=_by_role(self.settings))
        self.url = self.grpc = ""

    def start(self) -> ClusterServer:
        self._cluster.start()
        self.url = self._cluster.url()
        said = read_node_info(self._cluster["c1"].folder)
        assert said is not None
        self.grpc = said.grpc
        return self

    def kill9(self) -> None:
        self._cluster.kill9()

    def stop(self) -> int:
        """The first exit status that is not 0."""
        try:
            ended = self._cluster.stop()
        except Unavailable as error:
            raise ServerFailed(error.message) from error
        codes = [p.returncode for p in ended if p.plan.role != "etcd"]
        return next((code for code in codes if code), 0)

    def restart(self, *, kill: bool = False) -> ClusterServer:
        if kill:
            self.kill9()
        elif (status := self.stop()) != 0:
            raise self.failed(f"a process of the cluster ended with {status} on SIGTERM")
        return self.start()

    @property
    def running(self) -> bool:
        return all(process.running for process in self._cluster.processes.values())

    @property
    def returncode(self) -> int | None:
        codes = [process.returncode for process in self._cluster.processes.values()]
        return next((code for code in codes if code is not None), None)

    def client(self, **arguments: Any) -> QdrantClient:
        arguments.setdefault("check_compatibility", False)
        return QdrantClient(url=self.url, timeout=60, **arguments)

    def http(self, **arguments: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60.0, trust_env=False, **arguments)

    def log(self) -> str:
        return self._cluster.logs(lines=1_000_000)

    def log_tail(self, lines: int = 40) -> str:
        return self._cluster.logs(lines)

    def failed(self, what: str) -> ServerFailed:
        return ServerFailed(f"{what}; the ends of the logs:\n{self.log_tail()}")


def _by_role(settings: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """A setting of one server goes to every process that has one of that name."""
    roles: dict[str, dict[str, object]] = {}
    for name, value in settings.items():
        takers = [
            role for role in SMALL if role in PROCESSES and name in setting_names(PROCESSES[role])
        ]
        assert takers, f"no process of a cluster has the setting {name}"
        for role in takers:
            roles.setdefault(role, {})[name] = value
    return roles
