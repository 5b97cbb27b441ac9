"""`shoal index-node`: builds indexes for storage nodes."""

from __future__ import annotations

from shoal.health_server import HealthServer
from shoal.metadata.schema import NodeRole
from shoal.roles.process import RoleProcess, check_port, run_role
from shoal.settings import IndexProcess

__all__ = ["run"]


def run(settings: IndexProcess) -> None:
    check_port(settings)
    run_role(NodeRole.INDEX, settings, _index_node)


async def _index_node(process: RoleProcess[IndexProcess]) -> None:
    settings = process.settings
    await process.connect()
    server = await HealthServer.start(settings.grpc_host, settings.grpc_port, process.tls)
    process.stack.push_async_callback(server.close)
    await process.register(grpc=server.port)
    process.announce(grpc=server.port)
    await process.run_until_stopped()
