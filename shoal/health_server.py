"""The gRPC port of a process that answers little but "how are you": health and reflection.

Monitors and index nodes have one, so that a supervisor can look after all processes alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from shoal.errors import StartupError
from shoal.rpc.channel import NodeTls, server_credentials, server_options

__all__ = ["HealthServer"]


class HealthServer:
    """Made by `start`. port: the one that it listens on."""

    def __init__(self, server: grpc.aio.Server, servicer: health.HealthServicer, port: int) -> None:
        self._server, self._servicer, self.port = server, servicer, port

    @classmethod
    async def start(
        cls,
        host: str,
        port: int,
        tls: NodeTls | None,
        handlers: Sequence[grpc.GenericRpcHandler] = (),
    ) -> HealthServer:
        """It says "serving" from now on; port 0 picks a free one. handlers: what else it answers.
        Raises StartupError when the port cannot be had."""
        server = grpc.aio.server(options=server_options())
        server.add_generic_rpc_handlers(tuple(handlers))
        servicer = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((name, reflection.SERVICE_NAME), server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, server_credentials(tls))
        except RuntimeError as error:
            raise StartupError(f"Cannot listen on {address}: {error}.") from None
        await server.start()
        await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        return cls(server, servicer, port)

    async def close(self) -> None:
        await self._servicer.enter_graceful_shutdown()
        await self._server.stop(0.5)
