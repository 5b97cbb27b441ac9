"""Child processes for heavy work: their memory goes back whole, their work never holds this process's
interpreter, they run at the lowest priority, and they end with this process.

A child is a module with a `main(argument) -> answer` (both JSON text), run by `child_main`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable

from shoal.errors import Unavailable

__all__ = ["Children", "child_main", "end_with_parent"]

_PR_SET_PDEATHSIG = 1
_ERROR_BYTES_MAX = 4096


class Children:
    """Runs children; `close` ends those that are running."""

    def __init__(self) -> None:
        self._running: set[asyncio.subprocess.Process] = set()
        self._closed = False

    async def run(self, module: str, argument: str) -> str:
        """The child's answer. Raises Unavailable, with the end of what it printed, when it failed;
        cancelling ends it."""
        if self._closed:
            raise Unavailable(f"{module} was not started: the server is shutting down")
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self._running.add(child)
        try:
            answer, errors = await child.communicate(argument.encode())
        except asyncio.CancelledError:
            _end(child)
            await child.wait()
            raise
        finally:
            self._running.discard(child)
        if child.returncode != 0:
            last = errors[-_ERROR_BYTES_MAX:].decode(errors="replace").strip()
            raise Unavailable(f"{module} failed (exit status {child.returncode}): {last}")
        return answer.decode()

    async def close(self) -> None:
        self._closed = True
        for child in list(self._running):
            _end(child)
            await child.wait()


def _end(child: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.kill()


def end_with_parent(parent: int) -> None:
    """Be killed when the process of this id, our parent, ends. On Linux; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def child_main(main: Callable[[str], str]) -> None:
    """The other side: low priority, argument from standard input, answer to standard output."""
    end_with_parent(os.getppid())
    os.nice(19)  # searches and writes go first
    sys.stdout.write(main(sys.stdin.read()))
