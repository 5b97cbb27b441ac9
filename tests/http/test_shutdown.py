"""SIGTERM: what is in flight is finished and durable, what is new is refused, the end is clean."""

from __future__ import annotations

import json
import os
import signal
import socket

import httpx
import pytest
from harness import MakeServer, Server, wait_until

pytestmark = pytest.mark.one_machine("it is about the end of one process")


class HalfSent:
    """A request whose body is still being sent while the server works on it: the server has asked
    for the body (100 Continue), so it is in flight beyond doubt."""

    def __init__(self, server: Server, method: str, path: str, body: bytes) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self.connection = socket.create_connection((host, int(port)), timeout=30)
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
        )
        self.connection.sendall(head.encode())
        interim = self.connection.recv(4096)
        assert interim.startswith(b"HTTP/1.1 100"), interim
        half = len(body) // 2
        self.connection.sendall(body[:half])
        self._rest = body[half:]

    def finish(self) -> tuple[int, dict[str, object]]:
        self.connection.sendall(self._rest)
        answer = b""
        while part := self.connection.recv(65_536):
            answer += part
            if b"\r\n\r\n" in answer and answer.rstrip().endswith(b"}"):
                break
        self.connection.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)


def points(count: int) -> bytes:
    made = [{"id": n, "vector": [float(n), 1.0], "payload": {"n": n}} for n in range(count)]
    return json.dumps({"points": made}).encode()


def test_sigterm_finishes_requests_in_flight(make_server: MakeServer) -> None:
    server: Server = make_server()
    with server.http() as http:
        body = {"vectors": {"size": 2, "distance": "Dot"}}
        http.put("/collections/c", json=body).raise_for_status()
    write = HalfSent(server, "PUT", "/collections/c/points?wait=true", points(500))
    os.kill(server.pid, signal.SIGTERM)
    wait_until(lambda: refuses(server), within_s=20, what="new connections are refused")
    assert server.running, "it waits for the request in flight"
    status, answer = write.finish()
    assert status == 200, answer
    assert server.exit_within(30) == 0, server.log_tail()
    assert not (server.data_dir / "server.json").exists()
    assert "Traceback" not in server.log()
    server.start()
    with server.http() as http:
        counted = http.post("/collections/c/points/count", json={}).json()["result"]["count"]
        assert counted == 500


def refuses(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/readyz", timeout=5, trust_env=False).status_code == 503
    except httpx.TransportError:
        return True


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(make_server: MakeServer, sent: signal.Signals) -> None:
    """A kept-alive connection without a request does not hold it up."""
    server: Server = make_server()
    with server.http() as http:
        assert http.get("/healthz").status_code == 200
        os.kill(server.pid, sent)
        assert server.exit_within(15) == 0, server.log_tail()


def test_grace_has_an_end(make_server: MakeServer) -> None:
    """A client that never finishes its request cannot keep the server up for ever."""
    server: Server = make_server(shutdown_grace_s=1)
    with server.http() as http:
        body = {"vectors": {"size": 2, "distance": "Dot"}}
        http.put("/collections/c", json=body).raise_for_status()
    write = HalfSent(server, "PUT", "/collections/c/points?wait=true", points(10))
    os.kill(server.pid, signal.SIGTERM)
    assert server.exit_within(20) is not None, server.log_tail()
    write.connection.close()
    server.start()
    with server.http() as http:
        assert http.post("/collections/c/points/count", json={}).json()["result"]["count"] == 0
