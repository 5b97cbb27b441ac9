"""The compose file as shipped, under a project name of the test's own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["BUILD_S_MAX", "DOWN_S_MAX", "UP_S_MAX", "Compose", "free_address", "run"]

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILE = ROOT / "deploy/docker-compose.yml"
ETCD_STAND_IN = "shoal-test-etcd:debian"
BUILD_S_MAX, UP_S_MAX, DOWN_S_MAX = 900, 300, 120


def run(*command: str, timeout_s: float = 120, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **(env or {})},
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Compose:
    """The services of the compose file, under a project name of their own."""

    def __init__(self, project: str = "shoal-test", profiles: Sequence[str] = ()) -> None:
        self.project, self._profiles = project, [f"--profile={name}" for name in profiles]
        self.env = {
            "COMPOSE_ANSI": "never",
            "SHOAL_IMAGE": "shoal-test:cpu",
            "SHOAL_ENCODER_IMAGE": "shoal-test:encoder",
            "NODE_LEASE_S": "6",
            "REREPLICATE_AFTER_S": "10",
            **{name: free_address() for name in ("C1_HTTP", "C1_GRPC", "C2_HTTP", "C2_GRPC")},
        }

    def __call__(self, *arguments: str, timeout_s: float = 120) -> str:
        given = ("-f", str(COMPOSE_FILE), "-p", self.project, *self._profiles)
        return run("docker", "compose", *given, *arguments, timeout_s=timeout_s, env=self.env)

    def url(self, coordinator: str) -> str:
        return "http://" + self.env[f"{coordinator.upper()}_HTTP"]

    def inspect(self, service: str) -> dict[str, Any]:
        container = self("ps", "-a", "-q", service).strip()
        found: dict[str, Any] = json.loads(run("docker", "inspect", container))[0]
        return found

    def provide_etcd(self) -> None:
        """Pull the image of the compose file, or make a stand-in."""
        services = json.loads(self("config", "--format", "json"))["services"]
        image = services["etcd1"]["image"]
        pulled = subprocess.run(["docker", "pull", "-q", image], capture_output=True, timeout=300)
        if pulled.returncode != 0:
            run("docker", "build", "-q", "-t", ETCD_STAND_IN, "tests/docker/etcd", timeout_s=300)
            self.env["ETCD_IMAGE"] = ETCD_STAND_IN

    @contextmanager
    def running(self) -> Iterator[Compose]:
        """Built and up; all of it is gone afterwards."""
        self("down", "-v", "--remove-orphans", timeout_s=DOWN_S_MAX)  # of a run that was cut off
        self.provide_etcd()
        self("build", timeout_s=BUILD_S_MAX)
        try:
            self.up()
            yield self
        finally:
            self("down", "-v", "-t", "10", "--remove-orphans", timeout_s=DOWN_S_MAX)

    def up(self, *more: str) -> None:
        self(
            *("up", "-d", "--no-build", "--wait", "--wait-timeout", str(UP_S_MAX), *more),
            timeout_s=UP_S_MAX + 60,
        )
