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
import errno
import gc
import math
import os
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
import uvloop
from pydantic import SecretStr

from coordinator.app import create_app
from coordinator.one_write import OneWriteProtocol
from coordinator.service import Coordinator
from encoder.service import LocalEncoder
from index_node.builder import ProcessBuilder
from monitor.service import Monitor
from shoal import telemetry
from shoal.data_dir import DataDirectory, ServerInfo
from shoal.encoder_api import Encoder
from shoal.errors import ShoalError, StartupError
from shoal.metadata.embedded import EmbeddedStore
from shoal.settings import ServeSettings
from shoal.version import VERSION
from storage_node.node import StorageNode

__all__ = ["serve"]

KEEP_ALIVE_S = 75  # longer than the 60 s after which usual proxies drop an idle connection
LISTEN_BACKLOG = 2_048

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
        _bound_socket(settings.http_host, settings.http_port) as listener,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_serve(settings, directory, listener))


async def _serve(
    settings: ServeSettings, directory: DataDirectory, listener: socket.socket
) -> None:
    loop = asyncio.get_running_loop()
    telemetry.watch_loop(loop)
    stop = _Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.ask, number)

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
        coordinator = Coordinator(store=store, storage=storage, encoder=encoder, settings=settings)
        await coordinator.start()
        stack.push_async_callback(coordinator.close)
        await storage.start(coordinator.shard_specs())
        monitor = Monitor(storage, coordinator.shard_specs, directory.path, settings)
        stack.push_async_callback(monitor.close)
        await monitor.start()

        app = create_app(
            coordinator,
            health=monitor.report,
            api_key=_plain(settings.api_key),
            read_only_api_key=_plain(settings.read_only_api_key),
        )
        info = ServerInfo(os.getpid(), settings.http_host, listener.getsockname()[1], VERSION)

        def ready() -> None:
            gc.collect()
            gc.freeze()  # what is here now stays: collections need not walk it again
            monitor.set_ready(True)
            directory.announce(info)
            _log.info("ready", url=info.url, data_dir=directory.path, version=VERSION)

        server = _Server(_config(app, settings), ready)
        stack.callback(directory.withdraw)
        stop.attach(server, monitor)
        if encoder is not None and settings.encoder_preload:
            loading = asyncio.create_task(_preload(encoder), name="preload")
            stack.callback(loading.cancel)
        await server.serve(sockets=[listener])
    _log.info("stopped")


class _Stop:
    """Carries signals to the server, also those that come before it exists."""

    def __init__(self) -> None:
        self._server: _Server | None = None
        self._monitor: Monitor | None = None
        self._asked = 0

    def ask(self, number: int) -> None:
        self._asked += 1
        _log.info("stopping", signal=signal.Signals(number).name, at_once=self._asked > 1)
        self._pass_on()

    def attach(self, server: _Server, monitor: Monitor) -> None:
        self._server, self._monitor = server, monitor
        self._pass_on()

    def _pass_on(self) -> None:
        if self._server is not None and self._monitor is not None and self._asked:
            self._monitor.set_ready(False)
            self._server.should_exit = True
            self._server.force_exit = self._asked > 1


class _Server(uvicorn.Server):
    """uvicorn's server; it tells when it listens, and leaves signals to us: its own way re-raises
    them after the end, and the process would not exit with 0."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()


async def _preload(encoder: Encoder) -> None:
    """A server whose encoder cannot load still serves vectors; the first text gets the error."""
    for model in encoder.models():
        try:
            loaded = await encoder.prepare(model.name)
        except ShoalError as error:
            _log.warning("encoder_not_loaded", model=model.name, why=error.message)
        else:
            _log.info("encoder_loaded", model=loaded.name, precision=loaded.precision)


def _config(app: Callable[..., object], settings: ServeSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="none",  # ours is running
        http=OneWriteProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,  # a line per request costs more than a search
        proxy_headers=False,
        server_header=False,
        backlog=LISTEN_BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_grace_s),
    )


@contextlib.contextmanager
def _bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A TCP socket on the address, not yet listening. Raises StartupError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise StartupError(
            f"The setting http_host is {host!r}, which is no address of this machine: "
            f"{error.strerror}. Use 127.0.0.1 for this machine only, or 0.0.0.0 for all."
        ) from error
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise StartupError(_why_not_bound(host, port, error)) from error
        yield listener


def _why_not_bound(host: str, port: int, error: OSError) -> str:
    where = f"{host}, port {port},"
    if error.errno == errno.EADDRINUSE:
        return (
            f"Another program listens on {where} already. Stop it, or give another --http-port "
            "(0 picks a free one)."
        )
    if error.errno == errno.EACCES:
        return f"This user may not listen on {where} use a port from 1024 up."
    return f"Cannot listen on {where} because: {error.strerror}. Check --http-host."


def _encoder(settings: ServeSettings) -> Encoder | None:
    if settings.encoder_model.lower() == "none":
        return None
    return LocalEncoder(settings)


def _plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
