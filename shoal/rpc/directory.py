"""`Nodes`: node id -> the node, wherever it is at the moment.

Addresses come from the records of running nodes (`nodes/…` in the metadata store). A record that
vanished does not mean that the node is gone: a lease can be lost by the store alone. So its last
address stays known, and calls find out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from shoal.errors import FormatTooNew, Unavailable
from shoal.metadata.contract import Event, KeyValue
from shoal.metadata.schema import NODES_PREFIX, NodeRecord, node_key
from shoal.metadata.watched import Watched
from shoal.rpc.channel import RpcSettings
from shoal.rpc.client import NodeClient
from shoal.rpc.traffic import Traffic
from shoal.storage_api import Node
from shoal.telemetry import logger

__all__ = ["Nodes"]

_log = logger("rpc")


class Nodes:
    """Clients of storage nodes, one for each address that is in use. Belongs to one event loop.

    watched   follows `nodes/`. Call `on_change` from its callback, so that the address of a node is
              known even if nobody asked for it while it was registered.
    local     nodes in this process; they need no connection
    """

    def __init__(
        self,
        watched: Watched,
        *,
        settings: RpcSettings | None = None,
        local: Mapping[str, Node] | None = None,
    ) -> None:
        self._entries = watched.entries
        self._settings = settings if settings is not None else RpcSettings()
        self._local = dict(local or {})
        self._seen: dict[str, KeyValue] = {}  # node id -> the entry that was read last
        self._addresses: dict[str, str] = {}
        self._clients: dict[str, NodeClient] = {}
        self._traffic: dict[str, Traffic] = {}  # of every node that was ever asked
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def address(self, node_id: str) -> str | None:
        """Its last known "host:port"; None when it was never registered, or has no gRPC address."""
        entry = self._entries.get(node_key(node_id))
        if entry is not None and entry is not self._seen.get(node_id):
            self._seen[node_id] = entry
            self._learn(node_id, entry.key, entry.value)
        return self._addresses.get(node_id)

    def get(self, node_id: str) -> Node:
        """Raises Unavailable when nobody knows where it is. Whether it answers is another question."""
        local = self._local.get(node_id)
        if local is not None:
            return local
        return self.client(node_id)

    def client(self, node_id: str) -> NodeClient:
        """The same, for its files too (files_api.FileSource)."""
        address = self.address(node_id)
        if address is None or self._closed:
            raise Unavailable(
                f"storage node {node_id} is not known: it has not registered since this process "
                "started"
                if not self._closed
                else "this process is shutting down"
            )
        client = self._clients.get(node_id)
        if client is not None and client.address == address:
            return client
        if client is not None:
            self._retire(client)
        traffic = self._traffic.setdefault(node_id, Traffic())
        client = NodeClient(address, settings=self._settings, node_id=node_id, traffic=traffic)
        self._clients[node_id] = client
        return client

    def traffic(self) -> dict[str, Traffic]:
        """What went to and from each node that was ever asked, by id."""
        for node_id, client in self._clients.items():
            traffic = self._traffic[node_id]
            traffic.waiting, traffic.queued_bytes = client.in_flight, client.queued_bytes
        return self._traffic

    def on_change(self, events: Sequence[Event]) -> None:
        """Learn from events of `watched`; those of other keys are passed over."""
        for event in events:
            if event.value is not None and event.key.startswith(NODES_PREFIX):
                self._learn(event.key.removeprefix(NODES_PREFIX), event.key, event.value)

    def _learn(self, node_id: str, key: str, value: bytes) -> None:
        try:
            address = NodeRecord.from_bytes(key, value).grpc
        except FormatTooNew as error:
            _log.warning("node_record_too_new", node=node_id, why=error.message)
            return
        if address and address != self._addresses.get(node_id):
            self._addresses[node_id] = address
            _log.info("node_address", node=node_id, address=address)

    def _retire(self, client: NodeClient) -> None:
        """The node has another address now: nobody answers at this one, or somebody else."""
        task = asyncio.get_running_loop().create_task(client.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all clients; whatever still waits fails. May be called twice."""
        self._closed = True
        clients, self._clients = list(self._clients.values()), {}
        await asyncio.gather(*(client.close() for client in clients), *self._closing)
