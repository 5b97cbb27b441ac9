"""`shoal index-node`: builds indexes for storage nodes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from index_node.builder import ProcessBuilder
from index_node.service import IndexNode
from shoal.health_server import HealthServer
from shoal.metadata.schema import NodeRole
from shoal.roles.process import RoleProcess, check_port, run_role
from shoal.settings import IndexProcess

__all__ = ["run"]


def run(settings: IndexProcess) -> None:
    check_port(settings)
    run_role(NodeRole.INDEX, settings, _index_node)


async def _index_node(process: RoleProcess[IndexProcess]) -> None:
    settings, stack = process.settings, process.stack
    await process.connect()
    builder = ProcessBuilder()
    stack.push_async_callback(builder.close)
    scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-index-"))
    node = IndexNode(
        process.store,
        node_id=process.node_id,
        incarnation=process.incarnation,
        sources=process.nodes.client,
        builder=builder,
        scratch=Path(scratch) / "jobs",
        threads=os.cpu_count() or 1,
    )
    server = await HealthServer.start(
        settings.grpc_host, settings.grpc_port, process.tls, [node.handlers()]
    )
    stack.push_async_callback(server.close)
    await node.start()
    stack.push_async_callback(node.close)
    await process.register(grpc=server.port)
    process.announce(grpc=server.port)
    await process.run_until_stopped()
