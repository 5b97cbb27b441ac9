"""`shoal coordinator`: the public APIs of a cluster, over the storage nodes that have registered.

It keeps nothing that others need, so any number of coordinators run side by side.
"""

from __future__ import annotations

import asyncio
import socket

from coordinator.router import Router, RouterSettings
from coordinator.service import Coordinator
from monitor.service import Monitor
from shoal.encoder_choice import EitherEncoder
from shoal.errors import ShoalError, StartupError
from shoal.front import make_encoder, serve_front
from shoal.metadata.leadership import Leadership
from shoal.metadata.schema import MIGRATIONS_LEADER_KEY, NodeRole
from shoal.metadata.session import Session
from shoal.roles.process import (
    RoleProcess,
    address,
    advertised_host,
    check_port,
    patiently,
    run_role,
)
from shoal.rpc.encoder import EncoderClient
from shoal.rpc.traffic import traffic_lines
from shoal.serving import bound_socket
from shoal.settings import CoordinatorProcess, StorageSettings

__all__ = ["run"]


def run(settings: CoordinatorProcess) -> None:
    """Serve until SIGTERM or SIGINT. Call `shoal.cpu.prepare_environment` before importing this.
    Raises StartupError, and Unavailable without metadata."""
    check_port(settings)
    with bound_socket(settings.http_host, settings.http_port) as listener:
        run_role(NodeRole.COORDINATOR, settings, lambda process: _coordinator(process, listener))


async def _coordinator(process: RoleProcess[CoordinatorProcess], listener: socket.socket) -> None:
    settings, stack = process.settings, process.stack
    await process.connect()
    groups = EncoderClient(process.watched.entries, settings=process.rpc)
    encoder = EitherEncoder(groups, make_encoder(settings))
    stack.push_async_callback(encoder.close)
    # Longer than a failover takes: the lease, the grace period, and the election of a monitor.
    waits = RouterSettings(write_wait_s=max(15.0, 1.5 * process.settings.node_lease_s + 5.0))
    router = Router(process.store, process.nodes, settings=waits)
    await patiently(router.start)
    stack.push_async_callback(router.close)
    session: Session | None = None  # when others may know that we are there
    service = Coordinator(
        store=process.store,
        storage=router,
        encoder=encoder,
        settings=settings,
        node_id=process.node_id,
        local_node=None,
        leadership=Leadership(
            process.store,
            MIGRATIONS_LEADER_KEY,
            node_id=process.node_id,
            incarnation=process.incarnation,
            lease=lambda: None if session is None else session.lease,
        ),
    )
    await patiently(service.start)
    stack.push_async_callback(service.close)
    watch = Monitor(router, service.shard_specs, None, StorageSettings())
    stack.push_async_callback(watch.close)
    await watch.start()

    port = listener.getsockname()[1]
    host = advertised_host(settings, settings.http_host)

    async def tell(grpc: int) -> None:
        nonlocal session
        try:
            session = await process.register(grpc=grpc, http=address(host, port))
            process.announce(grpc=grpc, http=address(settings.http_host, port))
        except ShoalError as error:
            process.stop.fail(StartupError(error.message))

    def ready(grpc: int) -> None:
        telling = asyncio.create_task(tell(grpc), name="register")
        stack.callback(telling.cancel)

    process.started = True
    await serve_front(
        service,
        encoder,
        watch,
        settings,
        listener=listener,
        stop=process.stop,
        ready=ready,
        more_metrics=lambda: traffic_lines(process.nodes.traffic()),
    )
