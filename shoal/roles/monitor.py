"""`shoal monitor`: fails over and repairs. Of several, one acts."""

from __future__ import annotations

from monitor.cluster import ClusterMonitor
from monitor.failover import FailoverRules
from shoal.health_server import HealthServer
from shoal.metadata.schema import NodeRole
from shoal.roles.process import RoleProcess, check_port, run_role
from shoal.settings import MonitorProcess

__all__ = ["run"]


def run(settings: MonitorProcess) -> None:
    check_port(settings)
    run_role(NodeRole.MONITOR, settings, _monitor)


async def _monitor(process: RoleProcess[MonitorProcess]) -> None:
    settings = process.settings
    await process.connect()
    server = await HealthServer.start(settings.grpc_host, settings.grpc_port, process.tls)
    process.stack.push_async_callback(server.close)
    session = await process.register(grpc=server.port)
    rules = FailoverRules(
        lease_ttl_s=settings.node_lease_s,
        grace_s=settings.failover_grace_s,
        rereplicate_after_s=settings.rereplicate_after_s,
    )
    watch = ClusterMonitor(
        process.store,
        process.nodes,
        node_id=process.node_id,
        settings=rules,
        lease=lambda: session.lease,
        incarnation=session.record.incarnation,
    )
    await watch.start()
    process.stack.push_async_callback(watch.close)
    process.announce(grpc=server.port)
    await process.run_until_stopped()
