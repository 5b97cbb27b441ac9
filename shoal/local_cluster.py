"""A whole cluster on one machine, as processes of their own: `shoal cluster up`, and the tests.

    etcd1 etcd2 etcd3   c1 c2 (coordinators)   s1 s2 s3 (storage)   i1 (index)   m1 m2 (monitors)

    <folder>/cluster.json     the processes: role, ports, settings; written by the first start
    <folder>/<name>/          what the process keeps: its data, node.json
    <folder>/<name>/pid       of the process as it was started last
    <folder>/<name>/log       what it said, over all its starts

Ports stay the same over restarts. Everything listens on 127.0.0.1. A process is ended by its pid, and
only if the program behind that pid still is the one that was started.

One machine is no cluster: this is for trying out and testing, not for keeping data safe.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shoal.announcement import read_node_info
from shoal.errors import StartupError, Unavailable

__all__ = ["LAYOUT", "LocalCluster", "LocalProcess", "command", "find_etcd"]

LAYOUT = {"etcd": 3, "coordinator": 2, "storage-node": 3, "index-node": 1, "monitor": 2}
_LETTER = {
    "etcd": "etcd",
    "coordinator": "c",
    "storage-node": "s",
    "index-node": "i",
    "monitor": "m",
}
ETCD_VARIABLE = "ETCD_BIN"
START_S_MAX, STOP_S_MAX, ETCD_STOP_S_MAX = (
    60.0,
    60.0,
    1.0,
)  # for one process, on a machine that is busy with others
_PORTS = range(20_000, 32_000)  # below what systems give to outgoing connections: nobody takes them

HTTP_PORT, GRPC_PORT = 6333, 6334  # of c1 in `shoal cluster up`; c2 has 10 more


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """How one process is started. ports: for etcd client and peer, for a coordinator http and grpc,
    else grpc alone. settings: beyond those that the cluster decides."""

    name: str
    role: str
    ports: tuple[int, ...]
    settings: dict[str, str] = field(default_factory=dict)


class LocalProcess:
    """One process of the cluster, running or not."""

    def __init__(
        self,
        plan: ProcessPlan,
        folder: Path,
        arguments: Sequence[str],
        extra_env: Mapping[str, str],
    ) -> None:
        self.plan, self.folder = plan, folder
        self._arguments, self._extra_env = list(arguments), dict(extra_env)
        self._child: subprocess.Popen[bytes] | None = None  # None: started by another process

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def address(self) -> str:
        """Of its first port."""
        return f"127.0.0.1:{self.plan.ports[0]}"

    # -- life -------------------------------------------------------------------------------------
    def launch(self, **fault: str) -> None:
        """Start it and do not wait. fault: variables for this start only, such as SHOAL_FAULT."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SHOAL_", "ETCD_"))}
        with self.log_path.open("ab") as log:
            self._child = subprocess.Popen(
                self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,  # a core file or the like does not land among somebody's files
                env={**environment, **self._extra_env, **fault},
                start_new_session=True,  # Ctrl-C of the one who started it is not for it
            )
        (self.folder / "pid").write_text(f"{self._child.pid}\n")

    def wait_ready(self, within_s: float = START_S_MAX) -> None:
        """Raises Unavailable, with the end of its log, when it ends instead or takes too long."""
        deadline = time.monotonic() + within_s
        while not self.ready():
            if not self.running:
                raise Unavailable(f"{self.name} ended before it was ready:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"{self.name} was not ready after {within_s:g} s:\n{self.log_tail()}"
                )
            self._pause(0.05)

    def ready(self) -> bool:
        """Whether this very process has said so (one that was killed leaves its file behind)."""
        if self.plan.role == "etcd":
            return _etcd_is_healthy(self.plan.ports[0])
        said = read_node_info(self.folder)
        return said is not None and said.pid == self.pid

    def signal(self, number: int) -> None:
        pid = self.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill9(self) -> None:
        """As a power cut for the process: no handler runs. It is gone when this returns."""
        self.signal(signal.SIGKILL)
        self._wait_gone(STOP_S_MAX)

    def pause(self) -> None:
        """SIGSTOP: it keeps its connections and does nothing until `resume`."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def stop(self, within_s: float = STOP_S_MAX) -> None:
        """SIGTERM, and wait until everything is closed; after `within_s` it is killed.
        Raises Unavailable then."""
        self.resume()
        self.signal(signal.SIGTERM)
        if self.plan.role == "etcd":
            # Its members would wait for each other to take over; what they hold is on their disks.
            if not self._wait_gone(ETCD_STOP_S_MAX):
                self.kill9()
        elif not self._wait_gone(within_s):
            self.kill9()
            raise Unavailable(
                f"{self.name} did not end within {within_s:g} s of SIGTERM and was killed:\n"
                f"{self.log_tail()}"
            )

    @property
    def pid(self) -> int | None:
        """None when it does not run."""
        if self._child is not None:
            return self._child.pid if self._child.poll() is None else None
        try:
            pid = int((self.folder / "pid").read_text())
        except (OSError, ValueError):
            return None
        return pid if str(self.folder) in _command_line(pid) else None

    @property
    def running(self) -> bool:
        return self.pid is not None

    @property
    def returncode(self) -> int | None:
        return None if self._child is None else self._child.poll()

    @property
    def log_path(self) -> Path:
        return self.folder / "log"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log_tail(self, lines: int = 20) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def _wait_gone(self, within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while self.running:
            if time.monotonic() > deadline:
                return False
            self._pause(0.02)
        return True

    def _pause(self, seconds: float) -> None:
        """Wait for the process to end, at most so long."""
        if self._child is None:
            threading.Event().wait(seconds)
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(seconds)


class LocalCluster:
    """The processes of one folder.

    layout     how many of each role, when the folder is new
    settings   role, or name of a process, or "all" -> settings; when the folder is new
    fixed      the coordinators listen on 6333 and 6334, 6343 and 6344, …; else on free ports
    """

    def __init__(
        self,
        folder: Path,
        *,
        layout: Mapping[str, int] = LAYOUT,
        settings: Mapping[str, Mapping[str, object]] | None = None,
        fixed: bool = False,
    ) -> None:
        self.folder = folder.absolute()
        plans = self._read_plans()
        if plans is None:
            plans = _make_plans(layout, settings or {}, fixed=fixed)
            self._write_plans(plans)
        self.processes = {plan.name: self._process(plan, plans) for plan in plans}

    def __getitem__(self, name: str) -> LocalProcess:
        return self.processes[name]

    def of(self, role: str) -> list[LocalProcess]:
        return [process for process in self.processes.values() if process.plan.role == role]

    def url(self, coordinator: str = "c1") -> str:
        return f"http://{self[coordinator].address}"

    def start(self) -> list[LocalProcess]:
        """Start what does not run and wait until all of it is ready; what was started.
        Raises StartupError without etcd, Unavailable when a process does not come up."""
        started = []
        for wave in (["etcd"], ["storage-node", "index-node"], ["monitor", "coordinator"]):
            waiting = [p for role in wave for p in self.of(role) if not p.running]
            for process in waiting:
                process.launch()
            for process in waiting:
                process.wait_ready()
            started += waiting
        return started

    def stop(self) -> list[LocalProcess]:
        """End everything, etcd last; what was running. Raises Unavailable when something had to be
        killed."""
        stopped: list[LocalProcess] = []
        for wave in (["coordinator", "monitor"], ["storage-node", "index-node"], ["etcd"]):
            running = [p for role in wave for p in self.of(role) if p.running]
            with ThreadPoolExecutor(max(1, len(running))) as pool:
                list(pool.map(LocalProcess.stop, running))
            stopped += running
        return stopped

    def kill9(self) -> None:
        """Everything at once, as a power cut would."""
        for process in self.processes.values():
            process.signal(signal.SIGKILL)
        for process in self.processes.values():
            process.kill9()

    # -- inside -----------------------------------------------------------------------------------
    def _read_plans(self) -> list[ProcessPlan] | None:
        path = self.folder / "cluster.json"
        try:
            said = json.loads(path.read_bytes())
            return [ProcessPlan(**{**plan, "ports": tuple(plan["ports"])}) for plan in said]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StartupError(f"The file {path} cannot be read: {error}.") from error
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise StartupError(
                f"The folder {self.folder} is not empty and has no cluster.json, so it is no "
                "cluster's. Give another --dir."
            )
        return None

    def _write_plans(self, plans: Sequence[ProcessPlan]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "cluster.json"
        path.write_text(json.dumps([asdict(plan) for plan in plans], indent=1) + "\n")

    def _process(self, plan: ProcessPlan, plans: Sequence[ProcessPlan]) -> LocalProcess:
        folder = self.folder / plan.name
        if plan.role == "etcd":
            return LocalProcess(plan, folder, _etcd_arguments(plan, plans, folder), {})
        endpoints = [f"127.0.0.1:{p.ports[0]}" for p in plans if p.role == "etcd"]
        flags: dict[str, object] = {
            "metadata": "etcd://" + ",".join(endpoints),
            "node_id": plan.name,
            "run_dir": folder,
            "grpc_port": plan.ports[-1],
        }
        if plan.role == "coordinator":
            flags["http_port"] = plan.ports[0]
        if plan.role == "storage-node":
            flags["data_dir"] = folder / "data"
        arguments = [sys.executable, "-m", "shoal", plan.role]
        for name, value in {**flags, **plan.settings}.items():
            arguments += ["--" + name.replace("_", "-"), str(value)]
        return LocalProcess(plan, folder, arguments, {"PYTHONPATH": os.pathsep.join(sys.path)})


def _make_plans(
    layout: Mapping[str, int], settings: Mapping[str, Mapping[str, object]], *, fixed: bool
) -> list[ProcessPlan]:
    free = _free_ports()
    plans = []
    for role, count in layout.items():
        for number in range(count):
            ports = tuple(next(free) for _ in range(2 if role in ("etcd", "coordinator") else 1))
            if role == "coordinator" and fixed:
                ports = (HTTP_PORT + 10 * number, GRPC_PORT + 10 * number)
            process = f"{_LETTER[role]}{number + 1}"
            own: dict[str, str] = {}
            for key in ("all", role, process) if role != "etcd" else ():
                own |= {name: str(value) for name, value in settings.get(key, {}).items()}
            plans.append(ProcessPlan(process, role, ports, own))
    return plans


def _free_ports() -> Iterator[int]:
    """Ports on 127.0.0.1 that nobody listens on, each once."""
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            yield port


# -- etcd ------------------------------------------------------------------------------------------
def find_etcd() -> str:
    """The etcd program: the one that the variable ETCD_BIN names, else the one on PATH.
    Raises StartupError, saying how to get it."""
    named = os.environ.get(ETCD_VARIABLE)
    found = shutil.which(named or "etcd")
    if found is None:
        where = f"{ETCD_VARIABLE} names {named!r}, which is no program" if named else "not found"
        raise StartupError(
            f"A cluster keeps its metadata in etcd, and etcd was {where}. Install it (Debian, "
            "Ubuntu: apt-get install etcd-server; macOS: brew install etcd; others: "
            f"https://etcd.io/docs/latest/install), or name the program in {ETCD_VARIABLE}. "
            "3.4.22 or newer, not 3.5.0 to 3.5.2."
        )
    return found


def _etcd_arguments(plan: ProcessPlan, plans: Sequence[ProcessPlan], folder: Path) -> list[str]:
    members = ",".join(
        f"{member.name}=http://127.0.0.1:{member.ports[1]}"
        for member in plans
        if member.role == "etcd"
    )
    client, peer = (f"http://127.0.0.1:{port}" for port in plan.ports)
    return [
        find_etcd(),
        f"--name={plan.name}",
        f"--data-dir={folder / 'data'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster={members}",
        "--initial-cluster-state=new",
        "--initial-cluster-token=shoal-local",
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=1h",
        "--heartbeat-interval=250",  # one machine does everything: its disk may be slow at times
        "--election-timeout=2500",
        "--logger=zap",
    ]


def _etcd_is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", "/health")
        return b'"true"' in connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _command_line(pid: int) -> str:
    """Of a running process; "" when there is none."""
    shown = subprocess.run(
        ["ps", "-ww", "-o", "stat=,command=", "-p", str(pid)],
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if shown.stdout.startswith("Z") else shown.stdout


# -- the command -----------------------------------------------------------------------------------
def command(action: str, folder: Path, say: Callable[[str], None]) -> None:
    """`shoal cluster up|down|status`. Raises StartupError and Unavailable with what to do."""
    if action != "up" and not (folder / "cluster.json").exists():
        say(f"There is no cluster in {folder}.")
        return
    if action == "up":
        find_etcd()
        cluster = LocalCluster(folder, fixed=True)
        started = cluster.start()
        say(f"Ready; {len(started)} processes started." if started else "Everything runs already.")
    else:
        cluster = LocalCluster(folder)
    if action == "down":
        say(f"{len(cluster.stop())} processes stopped; the data stays in {folder}.")
        return
    for process in cluster.processes.values():
        state = f"pid {process.pid}" if process.running else "does not run"
        say(f"  {process.name:<6} {process.plan.role:<13} {process.address:<16} {state}")
    say(f"Logs: {folder}/<name>/log. Clients: {cluster.url('c1')} or {cluster.url('c2')}")
