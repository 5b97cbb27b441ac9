"""`shoal encoder serve` as a process, for tests: started, watched, ended with all that belongs to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from etcd_server import EtcdCluster
from harness import wait_until

from shoal.announcement import read_node_info
from shoal.metadata.etcd import EtcdStore
from shoal.metadata.schema import NODES_PREFIX
from shoal.metadata.watched import Watched
from shoal.rpc.encoder import EncoderClient

__all__ = ["ServedGroup", "client", "served"]

START_S_MAX = 180.0


class ServedGroup:
    """One `shoal encoder serve`, and what it says."""

    def __init__(
        self,
        folder: Path,
        endpoints: list[str],
        name: str,
        fault: dict[str, str] | None = None,
        **settings: object,
    ) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self._log = (self.folder / "log").open("wb")
        given = {"metadata": "etcd://" + ",".join(endpoints), "node_id": name, "grpc_port": 0}
        given |= {"run_dir": self.folder, "node_lease_s": 4, **settings}
        flags = [part for k, v in given.items() for part in ("--" + k.replace("_", "-"), str(v))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shoal", "encoder", "serve", *flags],
            stdout=self._log,
            stderr=self._log,
            env={k: v for k, v in os.environ.items() if not k.startswith("SHOAL_")} | (fault or {}),
            start_new_session=True,
        )

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log()
            said = read_node_info(self.folder)
            return said is not None and said.pid == self.process.pid

        wait_until(ready, within_s=START_S_MAX, what=f"{self.folder.name} to serve")

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-8_000:]

    def processes(self) -> dict[int, int]:
        """All that belong to it and still do something: pid -> parent."""
        shown = subprocess.run(
            ["ps", "-eo", "pid=,ppid=,sid=,stat="], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        fields = [line.split() for line in shown]
        of_it = [f for f in fields if f[2] == str(self.process.pid) and not f[3].startswith("Z")]
        return {int(f[0]): int(f[1]) for f in of_it}

    def ranks(self) -> list[int]:
        """Their pids: children of the fork server, which is a child of the first process."""
        found = self.processes()
        parents = {pid for pid, parent in found.items() if parent == self.process.pid}
        return sorted(pid for pid, parent in found.items() if parent in parents)

    def wait_ended(self, within_s: float = 60.0) -> int:
        """Its exit status; nothing of it is left when this returns."""
        status = self.process.wait(within_s)
        wait_until(
            lambda: not self.processes(), within_s=20, what=f"nothing left of {self.folder.name}"
        )
        return status

    def close(self) -> None:
        """The whole session: its processes do not outlive a test, whatever it did to them."""
        for number in (signal.SIGCONT, signal.SIGTERM):
            self._signal(number)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        self._signal(signal.SIGKILL)
        self.process.wait(10)
        self._log.close()

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass


@contextmanager
def served(folder: Path, etcd: EtcdCluster, **groups: dict[str, Any]) -> Iterator[Any]:
    started: dict[str, ServedGroup] = {}
    try:
        for name, settings in groups.items():
            settings = {"cluster_name": folder.name, **settings}
            started[name] = ServedGroup(folder, list(etcd.endpoints), name, **settings)
        for group in started.values():
            group.wait_ready()
        yield started
    finally:
        for group in started.values():
            group.close()


@asynccontextmanager
async def client(folder: Path, etcd: EtcdCluster) -> AsyncIterator[EncoderClient]:
    store = await EtcdStore.open(tuple(etcd.endpoints), prefix=f"/shoal/{folder.name}/")
    watched = Watched(store, [NODES_PREFIX])
    await watched.start()
    encoder = EncoderClient(watched.entries)
    try:
        yield encoder
    finally:
        await encoder.close()
        await watched.close()
        await store.close()
