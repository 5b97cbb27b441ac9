"""A real `shoal serve` in a child process, for the tests that need one.

`Server` starts it on a free port, waits until it says that it is ready, and ends it by its own pid,
whatever the test did to it in between. Nothing here sleeps: waiting is always for the child or for
a condition, with a deadline.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from qdrant_client import QdrantClient

__all__ = ["START_S_MAX", "STOP_S_MAX", "MakeServer", "Server", "ServerFailed", "wait_until"]

START_S_MAX = 60.0  # on a loaded machine; importing faiss alone can take seconds there
STOP_S_MAX = 60.0
LOG_TAIL_LINES = 40


class ServerFailed(AssertionError):
    """The server did not do what the test relies on; the message has the end of its log."""


def wait_until(condition: Callable[[], bool], *, within_s: float, what: str) -> None:
    """Poll `condition` until it holds. Raises AssertionError naming `what` after `within_s`."""
    deadline = time.monotonic() + within_s
    pause_s = 0.002
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {within_s} s still waiting for: {what}")
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.1)


class Server:
    """One `shoal serve` on one data directory; it can be started again and again.

    settings  names and values as in a settings file: {"seal_bytes": 65536}
    fault     "log.after_fsync:3": the server kills itself at the third pass of that point
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        settings: Mapping[str, object] | None = None,
        fault: str | None = None,
    ) -> None:
        self.data_dir = data_dir
        self.settings = dict(settings or {})
        self.fault = fault
        self.log_path = data_dir.with_name(data_dir.name + ".log")
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.grpc = ""  # host:port

    # -- life -------------------------------------------------------------------------------------
    def start(self) -> Server:
        """Start and wait until ready. Raises ServerFailed if it exits or takes too long."""
        if not self.start_or_die():
            raise self.failed(f"the server exited with {self.returncode} before it was ready")
        return self

    def start_or_die(self) -> bool:
        """Start and wait until it is ready (True) or has ended by itself (False)."""
        self.launch()
        ready = self.data_dir / "server.json"
        deadline = time.monotonic() + START_S_MAX
        while True:
            if self.exit_within(0.02) is not None:
                return False
            if (said := self._announced(ready)) is not None:
                self.url = f"http://127.0.0.1:{said['http_port']}"
                self.grpc = f"127.0.0.1:{said['grpc_port']}"
                return True
            if time.monotonic() > deadline:
                self.kill9()
                raise self.failed(f"the server was not ready after {START_S_MAX} s")

    def launch(self) -> None:
        """Start the process and do not wait for it."""
        assert not self.running, "this server runs already"
        command = [sys.executable, "-m", "shoal", "serve", "--data-dir", str(self.data_dir)]
        flags = {"http_port": 0, "grpc_port": 0, **self.settings}
        for name, value in flags.items():
            command += ["--" + name.replace("_", "-"), str(value)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SHOAL_")}
        if self.fault is not None:
            environment["SHOAL_FAULT"] = self.fault
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def _announced(self, ready: Path) -> dict[str, Any] | None:
        """server.json, once it is of this very process (one killed leaves its own behind)."""
        assert self.process is not None
        try:
            said: dict[str, Any] = json.loads(ready.read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return said if said["pid"] == self.process.pid else None

    def kill9(self) -> None:
        """As a power cut for the process: no handler runs."""
        if self.process is not None and self.running:
            self.process.kill()
            self.process.wait(STOP_S_MAX)

    def stop(self) -> int:
        """SIGTERM, and wait until everything is closed; the exit status."""
        assert self.process is not None
        if self.running:
            self.process.send_signal(signal.SIGTERM)
        status = self.exit_within(STOP_S_MAX)
        if status is None:
            self.kill9()
            raise self.failed(f"the server did not end within {STOP_S_MAX} s of SIGTERM")
        return status

    def restart(self, *, kill: bool = False) -> Server:
        if kill:
            self.kill9()
        elif (status := self.stop()) != 0:
            raise self.failed(f"the server ended with {status} on SIGTERM")
        return self.start()

    def exit_within(self, seconds: float) -> int | None:
        """The exit status if the process ends in time, else None."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def returncode(self) -> int | None:
        return None if self.process is None else self.process.poll()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    # -- talking to it ----------------------------------------------------------------------------
    def client(self, **arguments: Any) -> QdrantClient:
        """A real client; the caller closes it. It does not greet the server from a thread of its
        own, which would outlive a server that a test stops; test_errors.py tests the greeting."""
        arguments.setdefault("check_compatibility", False)
        return QdrantClient(url=self.url, timeout=60, **arguments)

    def http(self, **arguments: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60.0, trust_env=False, **arguments)

    def log(self) -> str:
        """Everything it has said, over all its starts."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def failed(self, what: str) -> ServerFailed:
        return ServerFailed(f"{what}; the end of its log:\n{self.log_tail()}")


MakeServer = Callable[..., Server]  # the fixture `make_server`


def run_shoal(
    arguments: Sequence[str], *, within_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """`shoal …` to its end, with its output; for commands that end by themselves."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SHOAL_")}
    return subprocess.run(
        [sys.executable, "-m", "shoal", *arguments],
        capture_output=True,
        text=True,
        timeout=within_s,
        env=environment,
        check=False,
    )
