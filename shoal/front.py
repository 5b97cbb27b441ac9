"""The public face of a process: HTTP and gRPC over one coordinator, from the first request to the last.

`shoal serve` and `shoal coordinator` both end up here.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from pydantic import SecretStr

from coordinator.app import create_app
from coordinator.grpc_api import GrpcApi
from coordinator.metrics import Metrics
from coordinator.one_write import OneWriteProtocol
from coordinator.service import Coordinator
from encoder.model import find_model
from encoder.service import LocalEncoder
from monitor.service import Monitor
from shoal import telemetry
from shoal.encoder_api import Encoder
from shoal.errors import ShoalError
from shoal.serving import HttpServer, Stop
from shoal.settings import EncoderSettings

__all__ = ["FrontSettings", "make_encoder", "serve_front"]

_log = telemetry.logger("server")


class FrontSettings(Protocol):
    """The part of a process's settings that is needed here."""

    @property
    def grpc_host(self) -> str: ...
    @property
    def grpc_port(self) -> int: ...
    @property
    def api_key(self) -> SecretStr | None: ...
    @property
    def read_only_api_key(self) -> SecretStr | None: ...
    @property
    def shutdown_grace_s(self) -> float: ...
    @property
    def encoder_preload(self) -> bool: ...
    @property
    def encoder_model(self) -> tuple[str, ...]: ...
    @property
    def encoder_is_off(self) -> bool: ...


async def serve_front(
    coordinator: Coordinator,
    encoder: Encoder | None,
    monitor: Monitor,
    settings: FrontSettings,
    *,
    listener: socket.socket,
    stop: Stop,
    ready: Callable[[int], None],
    more_metrics: Callable[[], Iterable[str]] = tuple,
) -> None:
    """Answer until `stop`; requests in flight have finished, or were given up, when this returns.

    listener  bound for HTTP, not yet listening.
    ready     called with the port of gRPC once both APIs answer.
    more_metrics  lines for /metrics beyond those of the API.
    Raises    StartupError when the port of gRPC cannot be had.
    """
    keys = (_plain(settings.api_key), _plain(settings.read_only_api_key))
    grace_s = settings.shutdown_grace_s
    async with contextlib.AsyncExitStack() as stack:
        metrics = Metrics(more_metrics)
        app = create_app(
            coordinator,
            health=monitor.report,
            api_key=keys[0],
            read_only_api_key=keys[1],
            metrics=metrics,
        )
        grpc_api = GrpcApi(coordinator, api_key=keys[0], read_only_api_key=keys[1], metrics=metrics)
        grpc_port = await grpc_api.start(settings.grpc_host, settings.grpc_port)
        stack.push_async_callback(grpc_api.close, grace_s)

        def listening() -> None:
            gc.collect()
            gc.freeze()  # what is here now stays: collections need not walk it again
            monitor.set_ready(True)
            ready(grpc_port)

        server = HttpServer(app, protocol=OneWriteProtocol, grace_s=grace_s, ready=listening)
        stop.call(lambda _: monitor.set_ready(False))
        stop.call(server.stop)
        stop.call(lambda at_once: grpc_api.begin_close(0.0 if at_once else grace_s))
        if encoder is not None and settings.encoder_preload and not settings.encoder_is_off:
            loading = asyncio.create_task(_preload(encoder, settings.encoder_model), name="preload")
            stack.callback(loading.cancel)
        await server.serve(sockets=[listener])


def make_encoder(settings: EncoderSettings) -> LocalEncoder | None:
    """None when text is switched off."""
    return None if settings.encoder_is_off else LocalEncoder(settings)


async def _preload(encoder: Encoder, models: Sequence[str]) -> None:
    """A server whose encoder cannot load still serves vectors; the first text gets the error."""
    for model in models:
        try:
            loaded = await encoder.prepare(find_model(model)[0])
        except ShoalError as error:
            _log.warning("encoder_not_loaded", model=model, why=error.message)
        else:
            _log.info("encoder_loaded", model=loaded.name, precision=loaded.precision)


def _plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
