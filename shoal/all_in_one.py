"""`shoal serve`: coordinator, storage node, index builder, encoder and monitor in one process.

This composition root is the only place that knows several parts by name. It makes them, starts
them in the order in which they need each other, and closes them in the reverse order:

    data folder (lock) → port → metadata → storage, encoder → coordinator → monitor → HTTP

The port is taken before anything slow, so that a wrong setting is told at once, and it is listened
on only when everything is ready: nobody meets a half-started server.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

import uvloop

from coordinator.router import LocalNodes, Router
from coordinator.service import Coordinator
from index_node.builder import ProcessBuilder
from monitor.service import Monitor
from shoal import telemetry
from shoal.data_dir import DataDirectory, ServerInfo
from shoal.front import make_encoder, serve_front
from shoal.metadata.embedded import EmbeddedStore
from shoal.metadata.schema import LOCAL_NODE
from shoal.serving import Stop, bound_socket
from shoal.settings import ServeSettings
from shoal.version import VERSION
from storage_node.node import StorageNode

__all__ = ["serve"]

_log = telemetry.logger("server")


def serve(settings: ServeSettings) -> None:
    """Serve until SIGTERM or SIGINT. Call `shoal.cpu.prepare_environment` before importing this.

    The first signal lets requests in flight finish, for `shutdown_grace_s` at most; the second
    gives that up. Either way everything is closed cleanly.
    Raises StartupError when it cannot start: settings, lock, format, port.
    """
    telemetry.setup(settings.log_level)
    with (
        DataDirectory(settings.data_dir) as directory,
        bound_socket(settings.http_host, settings.http_port) as listener,
        bound_socket(settings.grpc_host, settings.grpc_port, kind="grpc") as grpc_port,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        grpc_port.close()  # it can be had; gRPC binds it itself
        runner.run(_serve(settings, directory, listener))


async def _serve(
    settings: ServeSettings, directory: DataDirectory, listener: socket.socket
) -> None:
    loop = asyncio.get_running_loop()
    telemetry.watch_loop(loop)
    stop = Stop(loop)

    async with contextlib.AsyncExitStack() as stack:
        store = await EmbeddedStore.open(directory.metadata)
        stack.push_async_callback(store.close)
        builder = ProcessBuilder()
        stack.push_async_callback(builder.close)
        storage = StorageNode(directory.shards, builder=builder, settings=settings)
        stack.push_async_callback(storage.close)
        encoder = make_encoder(settings)
        if encoder is not None:
            stack.push_async_callback(encoder.close)
        router = Router(store, LocalNodes(LOCAL_NODE, storage), local=LOCAL_NODE)
        await router.start()
        stack.push_async_callback(router.close)
        coordinator = Coordinator(store=store, storage=router, encoder=encoder, settings=settings)
        await coordinator.start()
        stack.push_async_callback(coordinator.close)
        await storage.start(coordinator.shard_specs())
        monitor = Monitor(router, coordinator.shard_specs, directory.path, settings)
        stack.push_async_callback(monitor.close)
        await monitor.start()
        stack.callback(directory.withdraw)

        def ready(grpc_port: int) -> None:
            info = ServerInfo(
                os.getpid(), settings.http_host, listener.getsockname()[1], VERSION, grpc_port
            )
            directory.announce(info)
            _log.info("ready", url=info.url, data_dir=directory.path, version=VERSION)

        await serve_front(
            coordinator, encoder, monitor, settings, listener=listener, stop=stop, ready=ready
        )
    _log.info("stopped")
