"""How a process on this machine says that it is ready, and how others ask it.

A file in its data or run folder, written when requests are answered and removed at a clean end:

    server.json   of `shoal serve` (shoal/data_dir.py): pid, http_host, http_port, version
    node.json     of a process of a cluster: pid, role, node_id, http and grpc "host:port", version

The file of a process that was killed stays: look at the pid. `shoal health` goes further and asks the
process itself, by `/readyz` or by the health service of gRPC.
"""

from __future__ import annotations

import http.client
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from shoal.errors import SettingsError, Unavailable
from shoal.metadata.schema import NodeRole

__all__ = ["HealthTls", "NodeInfo", "ask_health", "read_node_info"]

NODE_FILE, SERVER_FILE = "node.json", "server.json"
ASK_S_MAX = 5.0
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


@dataclass(frozen=True, slots=True)
class HealthTls:
    """How to ask a process that speaks TLS: its own files, and the host that its certificate names."""

    ca: str
    certificate: str
    key: str
    host: str


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """http, grpc: "host:port" that it listens on, "" for none."""

    pid: int
    role: NodeRole
    node_id: str
    http: str
    grpc: str
    version: str
    tls: HealthTls | None = None

    def write(self, folder: Path) -> None:
        """Whole or not at all. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / (NODE_FILE + ".new")
        temporary.write_text(json.dumps(asdict(self)) + "\n")
        temporary.replace(folder / NODE_FILE)

    @staticmethod
    def withdraw(folder: Path) -> None:
        (folder / NODE_FILE).unlink(missing_ok=True)


def read_node_info(folder: Path) -> NodeInfo | None:
    """What the process of this folder said; None while it has said nothing."""
    try:
        said = json.loads((folder / NODE_FILE).read_bytes())
        tls = HealthTls(**said["tls"]) if said["tls"] is not None else None
        return NodeInfo(**{**said, "role": NodeRole(said["role"]), "tls": tls})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def ask_health(folder: Path | None) -> str:
    """A sentence about the process that announced itself in `folder`; None: the folder that the
    variables SHOAL_RUN_DIR or SHOAL_DATA_DIR name.
    Raises Unavailable when it is not there or not ready, SettingsError without a folder."""
    if folder is None:
        named = os.environ.get("SHOAL_RUN_DIR") or os.environ.get("SHOAL_DATA_DIR")
        if not named:
            raise SettingsError(
                "Give the data or run folder of the process, or name it in SHOAL_DATA_DIR."
            )
        folder = Path(named)
    info = read_node_info(folder)
    if info is not None:
        if info.http:
            return _ask_http(info.http)
        return _ask_grpc(info.grpc, info.tls)
    try:
        said = json.loads((folder / SERVER_FILE).read_bytes())
        return _ask_http(f"{said['http_host']}:{said['http_port']}")
    except (OSError, ValueError, KeyError) as error:
        raise Unavailable(f"No process has said in {folder} that it is ready.") from error


def _here(address: str) -> tuple[str, int]:
    """Where to reach from this machine what listens on `address`."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    return _EVERY_ADDRESS.get(host, host), int(port)


def _ask_http(address: str) -> str:
    host, port = _here(address)
    connection = http.client.HTTPConnection(host, port, timeout=ASK_S_MAX)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        text = answer.read(4096).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"{host}:{port} does not answer: {error}.") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise Unavailable(f"{host}:{port} is not ready: {text}")
    return f"{host}:{port} is ready."


def _ask_grpc(address: str, tls: HealthTls | None) -> str:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    host, port = _here(address)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if tls is None:
        channel = grpc.insecure_channel(target)
    else:
        credentials = grpc.ssl_channel_credentials(
            *(Path(file).read_bytes() for file in (tls.ca, tls.key, tls.certificate))
        )
        options = [("grpc.ssl_target_name_override", tls.host)]
        channel = grpc.secure_channel(target, credentials, options)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=ASK_S_MAX
            )
        except grpc.RpcError as error:
            raise Unavailable(f"{target} does not answer: {error.details()}.") from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable(f"{target} is not ready.")
    return f"{target} is ready."
