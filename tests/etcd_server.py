"""Real etcd members on free ports of 127.0.0.1, for the tests that need some.

    with EtcdCluster.start(tmp_path, members=3) as etcd:
        etcd.endpoints                     ["127.0.0.1:40001", ...]
        etcd.kill(etcd.leader())           kill -9; `etcd.restart(n)` starts it on its old data
        etcd.freeze(n); etcd.thaw(n)       SIGSTOP, SIGCONT: it accepts connections and says nothing

`etcd` is found on the PATH, or where SHOAL_TEST_ETCD says. Without one, tests are skipped; with CI=1
they fail. Members do not sync to the disk (--unsafe-no-fsync) unless `durable=True`. Whatever
happens, no member outlives the `with`: a stray one would answer for the next test.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import pytest
from harness import wait_until

__all__ = ["EtcdCluster", "etcd_binary"]

START_S_MAX = 30.0
PORT_TRIES_MAX = 5  # a port that was free a moment ago may be taken


def etcd_binary() -> str:
    """The path of etcd. Skips the test without one; fails it under CI=1."""
    found = os.environ.get("SHOAL_TEST_ETCD") or shutil.which("etcd")
    if found:
        return found
    sentence = (
        "this test needs etcd: install it (Debian: apt-get install etcd-server etcd-client) or set "
        "SHOAL_TEST_ETCD to its path"
    )
    if os.environ.get("CI") == "1":
        pytest.fail(sentence, pytrace=False)
    pytest.skip(sentence)


class PortTaken(Exception):
    pass


@dataclass
class _Member:
    name: str
    folder: Path
    client: str
    peer: str
    process: subprocess.Popen[bytes] | None = None
    frozen: bool = False
    command: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.folder / "etcd.log"


class EtcdCluster:
    """Members 0, 1, ...; a context manager. Make one with `EtcdCluster.start`."""

    def __init__(
        self,
        folder: Path,
        *,
        members: int,
        durable: bool,
        flags: Sequence[str],
        tls: Mapping[str, Path] | None,
    ) -> None:
        self._binary = etcd_binary()
        self._durable = durable
        self._flags = list(flags)
        self._tls = tls
        self._scheme = "https" if tls else "http"
        ports = free_ports(2 * members)
        self._members = [
            _Member(
                f"m{n}", folder / f"m{n}", f"127.0.0.1:{ports.pop()}", f"127.0.0.1:{ports.pop()}"
            )
            for n in range(members)
        ]

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        members: int = 1,
        durable: bool = False,
        flags: Sequence[str] = (),
        tls: Mapping[str, Path] | None = None,
    ) -> EtcdCluster:
        """Ready to serve. tls: paths of "ca", "cert" and "key" of the members, which then ask every
        client for a certificate that this ca signed."""
        for attempt in range(PORT_TRIES_MAX):
            made = cls(
                folder / str(attempt), members=members, durable=durable, flags=flags, tls=tls
            )
            try:
                made._start_all()
            except PortTaken:
                made.close()
                continue
            except BaseException:
                made.close()
                raise
            return made
        raise AssertionError(f"no free ports for etcd in {PORT_TRIES_MAX} attempts")

    def __enter__(self) -> EtcdCluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def endpoints(self) -> list[str]:
        return [member.client for member in self._members]

    def leader(self) -> int:
        """The member that leads now, by what the running ones say."""
        found: list[int] = []

        def look() -> bool:
            found[:] = [n for n in self.running() if self._leads(n)]
            return len(found) == 1

        wait_until(look, within_s=START_S_MAX, what="one leader of etcd")
        return found[0]

    def running(self) -> list[int]:
        return [n for n, m in enumerate(self._members) if m.process is not None and not m.frozen]

    def kill(self, n: int) -> None:
        member = self._members[n]
        assert member.process is not None
        member.process.kill()
        member.process.wait()
        member.process, member.frozen = None, False

    def restart(self, n: int) -> None:
        """Start a killed member on its old data; returns when it is healthy."""
        self._spawn(self._members[n])
        self.wait_healthy([n])

    def freeze(self, n: int) -> None:
        self._signal(n, signal.SIGSTOP)
        self._members[n].frozen = True

    def thaw(self, n: int) -> None:
        self._signal(n, signal.SIGCONT)
        self._members[n].frozen = False

    def close(self) -> None:
        for member in self._members:
            if member.process is not None:
                member.process.kill()  # also ends a stopped one
                member.process.wait()
                member.process = None

    def ask(self, path: str, body: Mapping[str, object], n: int | None = None) -> dict[str, Any]:
        """POST to the JSON gateway of one member: ask("kv/compaction", {"revision": 7}). So what a
        test does to etcd does not rest on the client under test."""
        member = self._members[self.running()[0] if n is None else n]
        with self._http() as http:
            answer = http.post(
                f"{self._scheme}://{member.client}/v3/{path}", content=json.dumps(body), timeout=5
            )
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def wait_healthy(self, members: Sequence[int]) -> None:
        wait_until(
            lambda: all(self._is_healthy(n) for n in members),
            within_s=START_S_MAX,
            what=f"etcd members {list(members)} to be healthy",
        )

    # -- inside ------------------------------------------------------------------------------------

    def _start_all(self) -> None:
        for member in self._members:
            member.folder.mkdir(parents=True)
            self._spawn(member)
        self.wait_healthy(range(len(self._members)))

    def _spawn(self, member: _Member) -> None:
        cluster = ",".join(f"{m.name}=http://{m.peer}" for m in self._members)
        command = [
            self._binary,
            f"--name={member.name}",
            f"--data-dir={member.folder / 'data'}",
            f"--listen-client-urls={self._scheme}://{member.client}",
            f"--advertise-client-urls={self._scheme}://{member.client}",
            f"--listen-peer-urls=http://{member.peer}",
            f"--initial-advertise-peer-urls=http://{member.peer}",
            f"--initial-cluster={cluster}",
            "--logger=zap",
            f"--log-outputs={member.log}",
            *([] if self._durable else ["--unsafe-no-fsync"]),
            *self._flags,
        ]
        if self._tls is not None:
            command += [
                "--client-cert-auth",
                f"--trusted-ca-file={self._tls['ca']}",
                f"--cert-file={self._tls['cert']}",
                f"--key-file={self._tls['key']}",
            ]
        # Nothing of our own surroundings: ETCD_... variables are settings of a member.
        surroundings = {k: v for k, v in os.environ.items() if not k.startswith("ETCD")}
        member.process = subprocess.Popen(
            command,
            env=surroundings,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _is_healthy(self, n: int) -> bool:
        member = self._members[n]
        assert member.process is not None
        if member.process.poll() is not None:
            log = member.log.read_text() if member.log.exists() else "no log"
            member.process = None
            if "address already in use" in log:
                raise PortTaken
            raise AssertionError(f"etcd ended by itself: {log[-2000:]}")
        try:
            with self._http() as http:
                answer = http.get(f"{self._scheme}://{member.client}/health", timeout=1)
        except httpx.HTTPError:
            return False
        return answer.json().get("health") == "true"

    def _http(self) -> httpx.Client:
        if self._tls is None:
            return httpx.Client(trust_env=False)
        context = ssl.create_default_context(cafile=self._tls["ca"])
        context.load_cert_chain(self._tls["cert"], self._tls["key"])
        return httpx.Client(verify=context, trust_env=False)

    def _leads(self, n: int) -> bool:
        try:
            answer = self.ask("maintenance/status", {}, n)
        except httpx.HTTPError:
            return False
        return answer.get("leader", "0") == answer["header"]["member_id"]

    def _signal(self, n: int, number: signal.Signals) -> None:
        process = self._members[n].process
        assert process is not None
        process.send_signal(number)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for made in sockets:
            made.bind(("127.0.0.1", 0))
        return [made.getsockname()[1] for made in sockets]
    finally:
        for made in sockets:
            made.close()
