"""Keeping an etcd lease alive from a thread, so that a busy event loop does not lose it.

    loop    beat ── beat ── (stalls for 4 s) ── beat        every ttl / 6
    thread  keep-alive ──── keep-alive ──── keep-alive      every ttl / 3

Measured: with a lease of 4 s and a loop that stalled for 8 s, keep-alives from the loop lost the
lease and those from a thread did not. But a process that hangs for good must not look alive, so the
thread sends nothing while the loop's last beat is older than the TTL.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import grpc

from shoal.errors import ShoalError
from shoal.metadata import etcd_pb2 as pb
from shoal.metadata.contract import Lease, LeaseLost
from shoal.metadata.etcd_members import ATTEMPT_S, KEEP_ALIVE, Members, NoAnswer
from shoal.metadata.keeper import Keeper, boottime_s
from shoal.telemetry import logger

__all__ = ["EtcdKeeper"]

_PAUSE_S = 0.2  # after every member failed once

_log = logger("metadata")


class EtcdKeeper(Keeper):
    """A `Keeper` with a thread of its own, which ends with `close`, the lease or a refusal."""

    def __init__(self, members: Members, lease: Lease) -> None:
        super().__init__(lease.id, self._stop)
        self._sent_s -= ATTEMPT_S  # the grant was sent up to so long ago
        self._members = members
        self._ttl_s = lease.ttl_s
        self._loop = asyncio.get_running_loop()
        self._beat_s = boottime_s()
        self._beating: asyncio.TimerHandle | None = None
        self._stopped = threading.Event()
        self._index = members.current
        self._call: grpc.Call | None = None
        self._beat()
        self._thread = threading.Thread(target=self._run, name="shoal-lease", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Returns when the thread has ended, which takes an attempt at most."""
        await super().close()
        await asyncio.to_thread(self._thread.join)

    # -- the loop's side ---------------------------------------------------------------------------

    def _beat(self) -> None:
        self._beat_s = boottime_s()
        self._beating = self._loop.call_later(self._ttl_s / 6, self._beat)

    def _stop(self) -> None:
        self._stopped.set()
        if self._beating is not None:
            self._beating.cancel()
        if self._call is not None:
            self._call.cancel()

    # -- the thread's side -------------------------------------------------------------------------

    def _run(self) -> None:
        channels: dict[int, grpc.Channel] = {}
        try:
            while not self._stopped.is_set():
                self._stopped.wait(self._once(channels))
        finally:
            for channel in channels.values():
                channel.close()

    def _once(self, channels: dict[int, grpc.Channel]) -> float:
        """One keep-alive, at as many members as it takes. Returns the seconds until the next."""
        for _ in range(len(self._members)):
            sent_s = boottime_s()
            if sent_s - self._beat_s > self._ttl_s:
                return _PAUSE_S  # the loop hangs
            if self._members.logged_out:
                self._soon(lambda: self._loop.create_task(self._members.log_in()))
            if self._index not in channels:
                channels[self._index] = self._members.blocking_channel(self._index)
            try:
                self._keep_alive(channels[self._index])
            except NoAnswer as failure:
                _log.debug("keep_alive_failed", lease=f"{self.lease:x}", why=failure.why)
                self._index = (self._index + 1) % len(self._members)
            except ShoalError as error:
                end = None if isinstance(error, LeaseLost) else error
                self._soon(partial(self.ended, end))
                self._stopped.set()
                return 0
            else:
                self.renewed(sent_s)
                return self._ttl_s / 3
            if self._stopped.is_set():
                return 0
        return _PAUSE_S

    def _keep_alive(self, channel: grpc.Channel) -> None:
        """Raises NoAnswer, LeaseLost, StoreRefused."""
        metadata = self._members.metadata()
        request = pb.LeaseKeepAliveRequest(ID=self.lease)
        call = channel.stream_stream(
            KEEP_ALIVE.path, request.__class__.SerializeToString, KEEP_ALIVE.answer.FromString
        )(iter([request]), timeout=ATTEMPT_S, metadata=metadata)
        self._call = call
        try:
            answer = next(call, None)
        except grpc.RpcError as error:
            token = dict(metadata).get("token")
            raise self._members.explain(self._index, error, token) from error
        finally:
            call.cancel()
        if answer is None:
            raise NoAnswer("no answer to a keep-alive", maybe=True)
        if answer.TTL <= 0:
            raise LeaseLost("The metadata lease has ended. Register again.")

    def _soon(self, what: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(what)
