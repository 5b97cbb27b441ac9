"""What every process that serves does alike: the port, the HTTP server, the signals.

The port is taken before anything slow, so that a wrong setting is told at once, and it is listened
on only when everything is ready: nobody meets a half-started server.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from shoal import telemetry
from shoal.errors import ShoalError, StartupError

__all__ = ["HttpServer", "Stop", "bound_socket"]

KEEP_ALIVE_S = 75  # longer than the 60 s after which usual proxies drop an idle connection
LISTEN_BACKLOG = 2_048

_log = telemetry.logger("server")


class Stop:
    """SIGTERM and SIGINT, as an event and as calls.

    The first signal asks for a clean stop, the second to give up what is still in flight. A signal
    that comes before anybody listens is kept.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._asked = 0
        self._event = asyncio.Event()
        self._calls: list[Callable[[bool], None]] = []
        self._failure: ShoalError | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._heard, number)

    @property
    def asked(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> None:
        """Until the first signal."""
        await self._event.wait()

    def call(self, call: Callable[[bool], None]) -> None:
        """`call(at_once)` at every signal; now, if one has come already."""
        self._calls.append(call)
        if self._asked:
            call(self._asked > 1)

    @property
    def failed(self) -> bool:
        """`fail` was called."""
        return self._failure is not None

    def fail(self, error: ShoalError) -> None:
        """This process must not go on: as a first signal, and `raise_failure` raises at the end."""
        if self._failure is None:
            self._failure = error
            _log.error("stopping", why=error.message)
            self._ask()

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _heard(self, number: int) -> None:
        _log.info("stopping", signal=signal.Signals(number).name, at_once=self._asked > 0)
        self._ask()

    def _ask(self) -> None:
        self._asked += 1
        self._event.set()
        for call in self._calls:
            call(self._asked > 1)


class HttpServer(uvicorn.Server):
    """uvicorn's server; `ready` is called when it listens. It leaves signals to us: its own way
    re-raises them after the end, and the process would not exit with 0."""

    def __init__(
        self,
        app: Callable[..., object],
        *,
        protocol: type[asyncio.Protocol],
        grace_s: float,
        ready: Callable[[], None],
    ) -> None:
        config = uvicorn.Config(
            app,
            loop="none",  # ours is running
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,  # a line per request costs more than a search
            proxy_headers=False,
            server_header=False,
            backlog=LISTEN_BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(grace_s),
        )
        super().__init__(config)
        self._ready = ready

    def stop(self, at_once: bool) -> None:
        """Refuse new connections; requests in flight finish, or are given up."""
        self.should_exit = True
        self.force_exit = at_once

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()


@contextlib.contextmanager
def bound_socket(host: str, port: int, *, kind: str = "http") -> Iterator[socket.socket]:
    """A TCP socket on the address, not yet listening. Raises StartupError.

    kind: of the settings to name, "http" or "grpc". gRPC binds its port itself, later; binding one
    here and letting go of it tells at once, and in a sentence, that it cannot be had.
    """
    try:
        family, sort, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise StartupError(
            f"The setting {kind}_host is {host!r}, which is no address of this machine: "
            f"{error.strerror}. Use 127.0.0.1 for this machine only, or 0.0.0.0 for all."
        ) from error
    with socket.socket(family, sort, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise StartupError(_why_not_bound(host, port, kind, error)) from error
        yield listener


def _why_not_bound(host: str, port: int, kind: str, error: OSError) -> str:
    where = f"{host}, port {port},"
    if error.errno == errno.EADDRINUSE:
        return (
            f"Another program listens on {where} already. Stop it, or give another --{kind}-port "
            "(0 picks a free one)."
        )
    if error.errno == errno.EACCES:
        return f"This user may not listen on {where} use a port from 1024 up."
    return f"Cannot listen on {where} because: {error.strerror}. Check --{kind}-host."
