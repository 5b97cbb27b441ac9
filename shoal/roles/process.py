"""What the processes of a cluster have in common. Like `shoal/all_in_one.py` the modules beside this
one are composition roots: they know the parts by name, make them in the order in which they need each
other, and close them in reverse.

    port taken → etcd → identity → own parts → registered under a lease → node.json
    SIGTERM    → node.json and registration go → requests in flight finish → everything is closed

A process waits for its metadata at the start, for METADATA_WAIT_S: when a whole cluster is started
at once, etcd needs its time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import uvloop

from shoal import telemetry
from shoal.announcement import HealthTls, NodeInfo
from shoal.errors import StartupError, Unavailable
from shoal.metadata.contract import Event, Uncertain
from shoal.metadata.etcd import EtcdStore
from shoal.metadata.etcd_members import EtcdTls
from shoal.metadata.schema import NODES_PREFIX, EncoderFacts, NodeRecord, NodeRole
from shoal.metadata.session import Session
from shoal.metadata.watched import Watched
from shoal.rpc.channel import NodeTls, RpcSettings
from shoal.rpc.directory import Nodes
from shoal.serving import Stop, bound_socket
from shoal.settings import ClusterProcess, GrpcSettings
from shoal.version import VERSION

__all__ = ["RoleProcess", "address", "advertised_host", "check_port", "patiently", "run_role"]

METADATA_WAIT_S = 60.0
_RETRY_S = 0.5
_WILDCARDS = ("0.0.0.0", "::", "")

_log = telemetry.logger("server")

S = TypeVar("S", bound=ClusterProcess)
T = TypeVar("T")


class RoleProcess(Generic[S]):
    """One process of a cluster, between its start and its end. `close` undoes what was done, in
    reverse; parts register with `stack`."""

    def __init__(self, role: NodeRole, settings: S, node_id: str) -> None:
        self.role, self.settings, self.node_id = role, settings, node_id
        self.incarnation = uuid.uuid4().hex
        self.stack = contextlib.AsyncExitStack()
        self.stop = Stop(asyncio.get_running_loop())
        self.started = False  # until then a signal breaks off whatever is being waited for
        self.tls = _node_tls(settings)
        self.rpc = RpcSettings(tls=self.tls)
        self.store: EtcdStore
        self.nodes: Nodes
        self.watched: Watched  # the records of all nodes

    async def connect(self) -> None:
        """Find the metadata, and the other nodes. Raises StartupError, or Unavailable after
        METADATA_WAIT_S."""
        self.store = await patiently(lambda: _open_store(self.settings))
        self.store.on_went_back = self.stop.fail
        self.stack.push_async_callback(self.store.close)
        watched = self.watched = Watched(self.store, [NODES_PREFIX], on_change=self._nodes_changed)
        self.nodes = Nodes(watched, settings=self.rpc)
        self.stack.push_async_callback(self.nodes.close)
        await patiently(watched.start)
        self.stack.push_async_callback(watched.close)

    def _nodes_changed(self, events: Sequence[Event]) -> None:
        self.nodes.on_change(events)

    async def register(
        self, *, grpc: int, http: str = "", encoder: EncoderFacts | None = None
    ) -> Session:
        """Tell the cluster that this process is there, and where.

        grpc  the port that it listens on.  http  "host:port" as others reach it.
        encoder  what an encoder serves.
        """
        host = advertised_host(self.settings, self.settings.grpc_host)
        record = NodeRecord(
            id=self.node_id,
            role=self.role,
            incarnation=self.incarnation,
            grpc=address(host, self.settings.advertise_grpc_port or grpc),
            http=http,
            zone=self.settings.zone,
            version=1 if encoder is None else 2,
            encoder=encoder,
        )
        session = Session(
            self.store,
            record,
            ttl_s=self.settings.node_lease_s,
            on_replaced=lambda: self.stop.fail(
                StartupError(
                    f"Another process registered as {self.node_id}: give every process of a "
                    "cluster a --node-id of its own."
                )
            ),
        )
        await patiently(session.start)
        self.stack.push_async_callback(session.close)
        return session

    def announce(
        self, *, grpc: int, http: str = "", folder: Path | None = None, pid: int | None = None
    ) -> None:
        """node.json, until the end.  http  "host:port" that it listens on.  pid  whom to signal,
        where that is not this process."""
        settings = self.settings
        info = NodeInfo(
            pid=pid or os.getpid(),
            role=self.role,
            node_id=self.node_id,
            http=http,
            grpc=address(settings.grpc_host, grpc),
            version=VERSION,
            tls=_health_tls(self.tls, settings),
        )
        folder = settings.run_dir or folder
        if folder is not None:
            try:
                info.write(folder)
            except OSError as error:
                raise StartupError(
                    f"node.json cannot be written to {folder}: {error.strerror}. Give another "
                    "--run-dir."
                ) from error
            self.stack.callback(NodeInfo.withdraw, folder)
        _log.info("ready", node=self.node_id, role=self.role, grpc=info.grpc, http=info.http)

    async def run_until_stopped(self) -> None:
        self.started = True
        await self.stop.wait()


def run_role(
    role: NodeRole, settings: S, body: Callable[[RoleProcess[S]], Awaitable[None]]
) -> None:
    """Run one process until SIGTERM or SIGINT. Raises StartupError, Unavailable."""

    async def run() -> None:
        telemetry.watch_loop(asyncio.get_running_loop())
        node_id = settings.node_id or f"{role}-{socket.gethostname()}"
        process = RoleProcess(role, settings, node_id)
        async with process.stack:
            work = asyncio.ensure_future(body(process))

            def give_up_starting(_: bool) -> None:
                if not process.started:
                    work.cancel()

            process.stop.call(give_up_starting)
            try:
                await work
            except asyncio.CancelledError:
                if not process.stop.asked:
                    raise
        process.stop.raise_failure()
        _log.info("stopped", node=process.node_id)

    telemetry.setup(settings.log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Again while the metadata does not answer, for METADATA_WAIT_S."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + METADATA_WAIT_S
    while True:
        try:
            return await attempt()
        except (Unavailable, Uncertain) as error:
            if loop.time() > deadline:
                raise
            _log.warning("metadata_not_there", why=error.message)
        await asyncio.sleep(_RETRY_S)


async def _open_store(settings: ClusterProcess) -> EtcdStore:
    tls = None
    if settings.etcd_ca_file is not None:
        tls = EtcdTls(settings.etcd_ca_file, settings.etcd_cert_file, settings.etcd_key_file)
    credentials = None
    if settings.etcd_user is not None and settings.etcd_password is not None:
        credentials = (settings.etcd_user, settings.etcd_password.get_secret_value())
    return await EtcdStore.open(
        settings.etcd_endpoints,
        prefix=settings.metadata_prefix,
        tls=tls,
        credentials=credentials,
    )


def _node_tls(settings: ClusterProcess) -> NodeTls | None:
    ca, certificate, key = settings.node_ca_file, settings.node_cert_file, settings.node_key_file
    if ca is None or certificate is None or key is None:
        return None
    return NodeTls(ca, certificate, key)


def _health_tls(tls: NodeTls | None, settings: ClusterProcess) -> HealthTls | None:
    if tls is None:
        return None
    host = advertised_host(settings, settings.grpc_host)
    return HealthTls(str(tls.ca), str(tls.certificate), str(tls.key), host)


def advertised_host(settings: ClusterProcess, host: str) -> str:
    """How others reach what listens on `host`."""
    if settings.advertise_host is not None:
        return settings.advertise_host
    return socket.gethostname() if host in _WILDCARDS else host


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_port(settings: GrpcSettings) -> None:
    """Told at once and in a sentence; gRPC binds the port itself, later."""
    with bound_socket(settings.grpc_host, settings.grpc_port, kind="grpc"):
        return
