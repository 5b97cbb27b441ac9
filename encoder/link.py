"""The line between a rank group's parent and its processes: beats one way, "abort" the other.

    Hub    in the parent, a thread: hears all, asks encoder/liveness.py, ends who hangs, tells the rest
    Link   in each process, a thread: beats; on "abort", and when the parent is gone, calls back

A Unix socket in a folder of the parent's own, a line of JSON a message. A process whose line ends is
dead: the parent knows at once, and so do the others, whatever they are waiting for.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from encoder.liveness import BEAT_S, Beat, Liveness
from shoal.telemetry import logger

__all__ = ["LINK_VARIABLE", "PARENT_VARIABLE", "TICK_S", "Hub", "Link", "Work"]

LINK_VARIABLE = "SHOAL_RANK_LINK"  # the path of the parent's socket
PARENT_VARIABLE = "SHOAL_RANK_PARENT"  # its pid
LINE_BYTES_MAX = 65_536
STALL_S_MAX = 5.0  # of the loop of rank 0; on a busy machine it may be late
TICK_S = 0.2
ABORT_S_MAX = 1.0  # that a process may take to end once it was told that the group is over

_log = logger("encoder")


@dataclass(slots=True)
class _Peer:
    """One process, from its first line to the end of its connection."""

    connection: socket.socket
    rank: int = -1
    pid: int = 0
    attempt: int = -1
    unread: bytes = b""


@dataclass(slots=True)
class _Attempt:
    """All processes of one forming of the group. abort: why it is over, if it is."""

    number: int
    liveness: Liveness
    peers: dict[int, _Peer] = field(default_factory=dict)
    abort: str | None = None
    aborted_s: float = 0.0


class Hub:
    """The parent's end. `close` ends the thread; the processes then end themselves."""

    def __init__(self, folder: Path, *, size: int) -> None:
        self.path = folder / "link"
        self._size = size
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen(size * 2)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._attempt: _Attempt | None = None
        self.fatal: str | None = None  # why a process said that starting again is of no use
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank-hub", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            with contextlib.suppress(OSError):
                if isinstance(key.fileobj, socket.socket):
                    key.fileobj.close()
        self._selector.close()

    # -- the thread -------------------------------------------------------------------------------
    def _run(self) -> None:
        look_s = time.monotonic() + BEAT_S
        while not self._closing.is_set():
            for key, _ in self._selector.select(max(0.0, look_s - time.monotonic())):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            now_s = time.monotonic()
            if now_s >= look_s:
                look_s = now_s + BEAT_S
                self._look(now_s)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(LINE_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone(peer)
            return
        *lines, peer.unread = (peer.unread + data).split(b"\n")
        for line in lines:
            self._message(peer, json.loads(line))

    def _message(self, peer: _Peer, message: dict[str, object]) -> None:
        attempt = self._attempt
        if "pid" in message:
            self._hello(peer, message)
            return
        if "bye" in message:
            if attempt is not None:
                attempt.peers.pop(peer.rank, None)
                attempt.abort = attempt.abort or ""
            return
        if "fatal" in message:
            self.fatal = str(message["fatal"])
            os.kill(os.getpid(), signal.SIGTERM)  # starting again would end the same way
            return
        if attempt is not None and attempt.number == peer.attempt:
            attempt.liveness.heard(Beat(**message), time.monotonic())  # type: ignore[arg-type]

    def _hello(self, peer: _Peer, message: dict[str, object]) -> None:
        peer.rank, peer.pid = int(str(message["rank"])), int(str(message["pid"]))
        peer.attempt = int(str(message["attempt"]))
        attempt = self._attempt
        if attempt is None or peer.attempt > attempt.number:
            attempt = self._attempt = _Attempt(
                peer.attempt, Liveness(time.monotonic(), size=self._size)
            )
        if peer.attempt == attempt.number:
            attempt.peers[peer.rank] = peer
            if attempt.abort is not None:
                self._tell(peer, attempt.abort)

    def _gone(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        attempt = self._attempt
        if attempt is not None and attempt.peers.get(peer.rank) is peer:
            del attempt.peers[peer.rank]
            self._end(attempt, f"rank {peer.rank} ended")

    def _look(self, now_s: float) -> None:
        attempt = self._attempt
        if attempt is None:
            return
        if attempt.abort is not None:
            if attempt.abort and now_s - attempt.aborted_s > ABORT_S_MAX:
                self._kill_the_deaf(attempt)
            return
        at_work = {
            rank
            for rank in attempt.liveness.silent(now_s)
            if rank in attempt.peers and _at_work(attempt.peers[rank].pid)
        }
        lost = attempt.liveness.look(now_s, at_work)
        if lost is None:
            return
        peer = attempt.peers.get(lost.rank) if lost.rank is not None else None
        self._end(attempt, lost.why)
        if peer is not None:  # it will not hear; a stopped process ends by nothing else
            with contextlib.suppress(ProcessLookupError):
                os.kill(peer.pid, signal.SIGKILL)

    def _end(self, attempt: _Attempt, why: str) -> None:
        if attempt.abort is None and not self._closing.is_set():
            attempt.abort, attempt.aborted_s = why, time.monotonic()
            _log.warning("rank_group_broken", attempt=attempt.number, why=why)
            for peer in list(attempt.peers.values()):
                self._tell(peer, why)

    def _kill_the_deaf(self, attempt: _Attempt) -> None:
        """Several may hang at once, all of a machine that was short of memory, say. The agent would wait
        30 s for each before it starts anything again."""
        for peer in attempt.peers.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(peer.pid, signal.SIGKILL)

    def _tell(self, peer: _Peer, why: str) -> None:
        with contextlib.suppress(OSError):
            peer.connection.send(json.dumps({"abort": why}).encode() + b"\n")


def _at_work(pid: int) -> bool:
    """Whether a thread of it runs at this moment, or waits for a core or a disk. Known on Linux only;
    elsewhere False."""
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            if (task / "stat").read_text().rpartition(")")[2].split()[0] in "RD":
                return True
    except (OSError, IndexError):
        return False
    return False


class Work:
    """What the computing thread does at the moment, for the beats. Written by that thread alone, but for
    `tick`, by which the loop that answers callers says that it is alive."""

    def __init__(self) -> None:
        self.ready, self.busy, self.step, self.tokens = False, False, 0, 0
        self._clock: int | None = None
        self._cpu_s = 0.0
        self._ticked_s: float | None = None

    def tick(self) -> None:
        self._ticked_s = time.monotonic()

    @property
    def stalled(self) -> bool:
        """Whether the loop has stood still for so long that this process is to say nothing more."""
        return self._ticked_s is not None and time.monotonic() - self._ticked_s > STALL_S_MAX

    def begin(self, tokens: int) -> None:
        """A batch of so many, padding included."""
        if self._clock is None:
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self.step += 1
        self.busy, self.tokens = True, tokens

    def end(self) -> None:
        self.busy = False

    def beat(self, rank: int) -> Beat:
        if self._clock is not None:
            with contextlib.suppress(OSError):  # at the end that thread is gone before this one
                self._cpu_s = time.clock_gettime(self._clock)
        return Beat(rank, self.ready, self.step, self.busy, self._cpu_s, self.tokens)


class Link:
    """A process's end, for as long as it lives.

    on_abort  called once, in the link's thread, with why the group is over. It must end the process.
    """

    def __init__(
        self, path: str, *, rank: int, attempt: int, work: Work, on_abort: Callable[[str], None]
    ) -> None:
        self._rank, self._work, self._on_abort = rank, work, on_abort
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.connect(path)
        self._ended = threading.Event()
        self._send({"rank": rank, "pid": os.getpid(), "attempt": attempt})
        threading.Thread(target=self._run, name="rank-link", daemon=True).start()

    def close(self) -> None:
        """An orderly end: the group is not broken by it."""
        self._ended.set()
        with contextlib.suppress(OSError):
            self._send({"bye": True})

    def fatal(self, why: str) -> None:
        """This process cannot start, and would not at the next try."""
        self._ended.set()
        with contextlib.suppress(OSError):
            self._send({"fatal": why})

    def _send(self, message: dict[str, object]) -> None:
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _run(self) -> None:
        self._connection.settimeout(BEAT_S)
        why = "the parent of the rank group is gone"
        try:
            while not self._ended.is_set():
                if not self._work.stalled:
                    self._send(asdict(self._work.beat(self._rank)))
                try:
                    said = self._connection.recv(LINE_BYTES_MAX)
                except TimeoutError:
                    continue
                if said:
                    why = str(json.loads(said.splitlines()[0])["abort"])
                break
        except OSError:
            pass  # the parent is gone
        if not self._ended.is_set():
            self._on_abort(why)
