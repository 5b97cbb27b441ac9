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
import gc
import os
import socket

import uvloop
from pydantic import SecretStr

from coordinator.app import create_app
from coordinator.grpc_api import GrpcApi
from coordinator.one_write import OneWriteProtocol
from coordinator.router import LocalNodes, Router
from coordinator.service import Coordinator
from encoder.service import LocalEncoder
from index_node.builder import ProcessBuilder
from monitor.service import Monitor
from shoal import telemetry
from shoal.data_dir import DataDirectory, ServerInfo
from shoal.encoder_api import Encoder
from shoal.errors import ShoalError
from shoal.metadata.embedded import EmbeddedStore
from shoal.metadata.schema import LOCAL_NODE
from shoal.serving import HttpServer, Stop, bound_socket
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
        encoder = _encoder(settings)
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

        app = create_app(
            coordinator,
            health=monitor.report,
            api_key=_plain(settings.api_key),
            read_only_api_key=_plain(settings.read_only_api_key),
        )
        grpc_api = GrpcApi(
            coordinator,
            api_key=_plain(settings.api_key),
            read_only_api_key=_plain(settings.read_only_api_key),
        )
        grpc_port = await grpc_api.start(settings.grpc_host, settings.grpc_port)
        stack.push_async_callback(grpc_api.close, settings.shutdown_grace_s)
        info = ServerInfo(
            os.getpid(), settings.http_host, listener.getsockname()[1], VERSION, grpc_port
        )

        def ready() -> None:
            gc.collect()
            gc.freeze()  # what is here now stays: collections need not walk it again
            monitor.set_ready(True)
            directory.announce(info)
            _log.info("ready", url=info.url, data_dir=directory.path, version=VERSION)

        server = HttpServer(
            app, protocol=OneWriteProtocol, grace_s=settings.shutdown_grace_s, ready=ready
        )
        stack.callback(directory.withdraw)
        stop.call(lambda _: monitor.set_ready(False))
        stop.call(server.stop)
        stop.call(
            lambda at_once: grpc_api.begin_close(0.0 if at_once else settings.shutdown_grace_s)
        )
        if encoder is not None and settings.encoder_preload:
            loading = asyncio.create_task(_preload(encoder), name="preload")
            stack.callback(loading.cancel)
        await server.serve(sockets=[listener])
    _log.info("stopped")


async def _preload(encoder: Encoder) -> None:
    """A server whose encoder cannot load still serves vectors; the first text gets the error."""
    for model in encoder.models():
        try:
            loaded = await encoder.prepare(model.name)
        except ShoalError as error:
            _log.warning("encoder_not_loaded", model=model.name, why=error.message)
        else:
            _log.info("encoder_loaded", model=loaded.name, precision=loaded.precision)


def _encoder(settings: ServeSettings) -> Encoder | None:
    if settings.encoder_model.lower() == "none":
        return None
    return LocalEncoder(settings)


def _plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
