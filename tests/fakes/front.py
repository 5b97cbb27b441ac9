"""A coordinator over scripted nodes, served over HTTP from a thread: a cluster for the page."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn
from fakes.metadata import FakeStore
from fakes.nodes import FakeNode, FakeNodes

from coordinator.app import create_app
from coordinator.one_write import OneWriteProtocol
from coordinator.router import Router
from coordinator.service import Coordinator
from shoal.api.models import CreateCollection
from shoal.health import Health, HealthReport
from shoal.metadata.schema import LEADER_KEY, LeaderRecord, NodeRecord, NodeRole
from shoal.serving import HttpServer
from shoal.settings import CoordinatorSettings

__all__ = ["Front", "serve_front"]

GREEN = HealthReport(Health.GREEN, True, True, (), (), None, 0.0)


class Front:
    """Storage nodes s1 to s3 and the collection "films" of two shards on each. `do` runs a change
    of `store` where it lives."""

    def __init__(self) -> None:
        self.nodes = FakeNodes(FakeNode(name, leads=True) for name in ("s1", "s2", "s3"))
        self.url = ""
        self.store: FakeStore
        self._loop: asyncio.AbstractEventLoop

    def do(self, change: Callable[[FakeStore], Coroutine[Any, Any, Any]]) -> None:
        asyncio.run_coroutine_threadsafe(change(self.store), self._loop).result(30)

    async def serve(self, ready: Callable[[uvicorn.Server], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self.store = FakeStore()
        records = [
            NodeRecord(id=name, role=NodeRole.STORAGE, incarnation="1", zone="z" + name[1:])
            for name in self.nodes.by_id
        ]
        records.append(NodeRecord(id="m1", role=NodeRole.MONITOR, incarnation="1"))
        leader = LeaderRecord(node="m1", incarnation="1")
        puts = {record.key: record.to_bytes() for record in records}
        await self.store.txn([], puts | {LEADER_KEY: leader.to_bytes()})
        router = Router(self.store, self.nodes)
        await router.start()
        coordinator = Coordinator(
            store=self.store,
            storage=router,
            encoder=None,
            settings=CoordinatorSettings(),
            node_id="c1",
            local_node=None,
        )
        await coordinator.start()
        body = {
            "vectors": {"size": 2, "distance": "Dot"},
            "replication_factor": 3,
            "shard_number": 2,
        }
        await coordinator.catalog.create(
            "films", CreateCollection.model_validate(body, strict=False)
        )
        app = create_app(coordinator, health=lambda: GREEN, api_key=None, read_only_api_key=None)
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = HttpServer(
            app, protocol=OneWriteProtocol, grace_s=1.0, ready=lambda: ready(server)
        )
        await server.serve(sockets=[listener])
        await coordinator.close()
        await router.close()


@contextlib.contextmanager
def serve_front() -> Iterator[Front]:
    front, started = Front(), threading.Event()
    servers: list[uvicorn.Server] = []

    def ready(server: uvicorn.Server) -> None:
        servers.append(server)
        started.set()

    def main() -> None:
        try:
            asyncio.run(front.serve(ready))
        finally:
            started.set()

    thread = threading.Thread(target=main, name="front")
    thread.start()
    try:
        assert started.wait(60)
        assert servers, "the front did not start"
        yield front
    finally:
        for server in servers:
            server.should_exit = True
        thread.join(60)
