"""How nodes are connected: addresses, keep-alive, message sizes, TLS. One place for both ends.

A peer that was frozen, or cut off, never closes its connection: pings find it. A ping every
`keepalive_s` that is not answered for as long ends the connection, and with it every call on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from shoal.errors import SettingsError
from shoal.limits import MIB, RPC_MESSAGE_BYTES_MAX

__all__ = [
    "NODE_HEADER",
    "NodeTls",
    "RpcSettings",
    "is_taken",
    "node_metadata",
    "open_channel",
    "server_credentials",
    "server_options",
]

NODE_HEADER = "shoal-node"  # metadata: the id of the node that is meant
_OVERHEAD = 64 * 1024  # of a message around the one request or answer in it
_WINDOW_BYTES = 4 * MIB  # of one call, on its way: 10 Gbit/s at 3 ms
_PING_INTERVAL_MS_MIN = 100  # what a server puts up with; settings stay above


@dataclass(frozen=True, slots=True)
class NodeTls:
    """Files in PEM. Both ends show a certificate that `ca` signed (mTLS); nobody else gets in.

    name   what certificates of other nodes are made out to, when it is not the host of the address.
    """

    ca: Path
    certificate: Path
    key: Path
    name: str | None = None


@dataclass(frozen=True, slots=True)
class RpcSettings:
    """Seconds that a call may take, and how connections are kept.

    A search or a write has passed its bound of a client long before; these keep a request from waiting
    for ever on a node that lives and does not answer.
    """

    connect_timeout_s: float = 2.0
    read_timeout_s: float = 60.0
    write_timeout_s: float = 120.0
    admin_timeout_s: float = 30.0  # create, drop, status; a chunk of a file
    keepalive_s: float = 1.5
    reconnect_s_max: float = 1.0
    tls: NodeTls | None = field(default=None)


def open_channel(address: str, settings: RpcSettings) -> grpc.aio.Channel:
    """A channel with a connection of its own to "host:port". Nothing is sent yet."""
    options: list[tuple[str, int | str]] = [
        *_common_options(),
        ("grpc.keepalive_time_ms", int(settings.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(settings.keepalive_s * 1000)),
        ("grpc.http2.ping_timeout_ms", int(settings.keepalive_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),  # else channels to one address share a connection
        ("grpc.enable_retries", 0),  # gRPC cannot know what may be sent twice
        ("grpc.enable_http_proxy", 0),  # a proxy from the environment is not meant for our peers
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", int(settings.connect_timeout_s * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(settings.reconnect_s_max * 1000)),
    ]
    tls = settings.tls
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    if tls.name is not None:
        options.append(("grpc.ssl_target_name_override", tls.name))
    credentials = grpc.ssl_channel_credentials(
        _read(tls.ca), private_key=_read(tls.key), certificate_chain=_read(tls.certificate)
    )
    return grpc.aio.secure_channel(address, credentials, options=options)


def server_options() -> list[tuple[str, int]]:
    return [
        *_common_options(),
        ("grpc.so_reuseport", 0),  # two nodes on one port would share its calls by chance
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _PING_INTERVAL_MS_MIN),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _PING_INTERVAL_MS_MIN),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_time_ms", 5_000),  # callers that vanished: their reads are given up
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
    ]


def server_credentials(tls: NodeTls) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(_read(tls.key), _read(tls.certificate))],
        root_certificates=_read(tls.ca),
        require_client_auth=True,
    )


def node_metadata(node_id: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata of a call that is meant for one node, whoever has its address by now; and of the
    beginning of a stream, by which the node says that it took the call."""
    return () if node_id is None else ((NODE_HEADER, node_id),)


async def is_taken(call: grpc.aio.Call) -> bool:
    """Whether the node has begun with this call. Only then may anything be sent that must not happen
    twice, or elsewhere. False: the call is over, and its status says why."""
    for name, _ in await call.initial_metadata():
        if name == NODE_HEADER:
            return True
    await call.code()  # a refusal has no metadata of its own; its status may come a moment later
    return False


def _common_options() -> list[tuple[str, int]]:
    size = RPC_MESSAGE_BYTES_MAX + _OVERHEAD
    return [
        ("grpc.max_receive_message_length", size),
        ("grpc.max_send_message_length", size),
        # Bandwidth probes are pings too: one for each burst of data, and while one is unanswered gRPC
        # sends no keep-alive, so that a peer that froze in between is not found for a minute.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
    ]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"The TLS file {path} cannot be read: {error.strerror}.") from None
