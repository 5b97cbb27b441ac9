"""The members of an etcd cluster: connections, one attempt at a request, what a failure means.

    EtcdStore ──▶ Members.attempt ──▶ the current member, for at most ATTEMPT_S
                        │ no answer: the next member is the current one from now on
                        ▼
                  NoAnswer(maybe=...)    maybe: the request may have been carried out all the same

One channel per member and our own choice among them: gRPC's target of several addresses stays with
a frozen process that still accepts connections. gRPC's own retries are off, because it cannot know
which of our requests may be repeated.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from shoal.errors import (
    BodyTooLarge,
    SettingsError,
    ShoalError,
    StartupError,
    StorageFull,
    Unavailable,
)
from shoal.metadata import etcd_pb2 as pb
from shoal.metadata.contract import Compacted, LeaseLost, StoreRefused
from shoal.telemetry import logger

__all__ = [
    "ATTEMPT_S",
    "AUTHENTICATE",
    "CALL_S",
    "GRANT",
    "KEEP_ALIVE",
    "RANGE",
    "REVOKE",
    "STATUS",
    "TXN",
    "WATCH",
    "EtcdTls",
    "LeaseExists",
    "Members",
    "Method",
    "NoAnswer",
    "Tries",
    "refuse_version",
]

ATTEMPT_S = 1.0  # etcd answers in milliseconds, and a dead leader may swallow a request in silence
CALL_S = 10.0  # all attempts of one call: several times an election, which takes 1 to 3 s
_AUTHENTICATE_S = 3.0  # bcrypt is slow on purpose
_VERSION_MIN = (3, 4, 22)
_VERSIONS_THAT_LOSE_DATA = ((3, 5, 0), (3, 5, 1), (3, 5, 2))  # etcd-io/etcd issue 13766
_POLL_S = 0.005  # how often a connection in the making is looked at

# keepalive: faster pings than one in 5 s make etcd hang up. http_proxy is for the outside world.
_CHANNEL_OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.bdp_probe", 0),  # while such a probe is unanswered, no ping leaves
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", -1),  # pages and fragments are bounded by us and by etcd
)

_log = logger("metadata")

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)


@dataclass(frozen=True, slots=True)
class Method(Generic[Q, A]):
    path: str
    request: type[Q]
    answer: type[A]


RANGE = Method("/etcdserverpb.KV/Range", pb.RangeRequest, pb.RangeResponse)
TXN = Method("/etcdserverpb.KV/Txn", pb.TxnRequest, pb.TxnResponse)
WATCH = Method("/etcdserverpb.Watch/Watch", pb.WatchRequest, pb.WatchResponse)
GRANT = Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantRequest, pb.LeaseGrantResponse)
REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeRequest, pb.LeaseRevokeResponse)
KEEP_ALIVE = Method(
    "/etcdserverpb.Lease/LeaseKeepAlive", pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse
)
STATUS = Method("/etcdserverpb.Maintenance/Status", pb.StatusRequest, pb.StatusResponse)
AUTHENTICATE = Method(
    "/etcdserverpb.Auth/Authenticate", pb.AuthenticateRequest, pb.AuthenticateResponse
)


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """Files in PEM form, read when the store is opened.

    ca         who signed the members' certificates; None: the authorities that gRPC knows
    cert, key  our own certificate, for servers with --client-cert-auth; both or none
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises SettingsError for a file that cannot be read."""
        if (self.cert is None) != (self.key is None):
            raise SettingsError(
                "etcd: a client certificate and its key are given both or not at all"
            )
        try:
            ca, key, cert = (
                path.read_bytes() if path is not None else None
                for path in (self.ca, self.key, self.cert)
            )
        except OSError as error:
            raise SettingsError(f"etcd: a TLS file cannot be read: {error}") from error
        return grpc.ssl_channel_credentials(ca, key, cert)


class LeaseExists(ShoalError):
    """A lease with the id that we drew exists: our own earlier attempt made it."""


class NoAnswer(Exception):
    """One attempt came to nothing; another one, at another member, may do better.

    maybe          the request may have been carried out. False: it was certainly not.
    member_failed  another member may know better; False: only our token is too old
    """

    def __init__(self, why: str, *, maybe: bool, member_failed: bool = True) -> None:
        super().__init__(why)
        self.why = why
        self.maybe = maybe
        self.member_failed = member_failed


class Tries:
    """The attempts of one call: how long to go on, and when to take a breath."""

    def __init__(self, members: Members, budget_s: float = CALL_S) -> None:
        self._members = members
        self._now_s = asyncio.get_running_loop().time
        self._until_s = self._now_s() + budget_s
        self._count = 0

    async def another(self) -> bool:
        """After a failure. False: the time is up. Pauses after every round over all members."""
        self._count += 1
        rounds, rest = divmod(self._count, len(self._members))
        pause_s = 0.0 if rest else min(0.05 * 2 ** min(rounds, 4), 0.5)
        if self._now_s() + pause_s >= self._until_s:
            return False
        await asyncio.sleep(pause_s)
        return True


@dataclass(slots=True, eq=False)
class _Member:
    address: str
    channel: grpc.aio.Channel
    known: bool = False  # its version was looked at
    stubs: dict[str, Any] = field(default_factory=dict)


class Members:
    """Lives in one event loop. Addresses are "host:port", "http://…" or "https://…".

    Raises SettingsError for addresses and TLS files that make no sense.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        tls: EtcdTls | None = None,
        credentials: tuple[str, str] | None = None,
    ) -> None:
        if not endpoints:
            raise SettingsError(
                "etcd: no address is given; name at least one, such as 10.0.0.1:2379"
            )
        secure = {endpoint.startswith("https://") for endpoint in endpoints}
        if len(secure) > 1 or (tls is not None and any(e.startswith("http://") for e in endpoints)):
            raise SettingsError("etcd: some addresses are with TLS and some without; choose one")
        if tls is None and secure == {True}:
            tls = EtcdTls()
        self.addresses = [re.sub(r"^https?://", "", e).rstrip("/") for e in endpoints]
        self._tls = tls.credentials() if tls is not None else None
        self._members = [_Member(a, self._channel(grpc.aio, a)) for a in self.addresses]
        self._current = 0
        self._user = credentials
        self._token: str | None = None
        self._logging_in = asyncio.Lock()
        self.closed = False
        self.cluster_id = 0  # of the last Status

    def __len__(self) -> int:
        return len(self._members)

    async def close(self) -> None:
        self.closed = True
        for member in self._members:
            await member.channel.close()

    def blocking_channel(self, index: int) -> grpc.Channel:
        """A channel of its own for a thread; the thread closes it."""
        channel: grpc.Channel = self._channel(grpc, self.addresses[index])
        return channel

    @property
    def current(self) -> int:
        return self._current

    def choose(self, index: int) -> None:
        self._current = index

    def leave(self, index: int) -> None:
        """Its turn is over, unless another call moved on already."""
        if self._current == index:
            self._current = (index + 1) % len(self._members)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of every call: a member that sees no leader says so, instead of answering from the past."""
        token = self._token
        return (("hasleader", "true"), *((("token", token),) if token is not None else ()))

    # -- calls -------------------------------------------------------------------------------------

    async def call(self, method: Method[Q, A], request: Q, budget_s: float = CALL_S) -> A:
        """For a request that may be repeated at will. Raises Unavailable when the time is up."""
        tries = Tries(self, budget_s)
        while True:
            try:
                return await self.attempt(method, request)
            except NoAnswer as failure:
                if not await tries.another():
                    self.give_up(failure)

    def give_up(self, failure: NoAnswer) -> NoReturn:
        raise Unavailable(
            f"etcd does not answer at {', '.join(self.addresses)}: {failure.why}. Nothing was "
            "changed. Check that a majority of its members runs and can be reached."
        ) from failure

    async def attempt(self, method: Method[Q, A], request: Q) -> A:
        """Once, at the current member, which changes after a failure. Raises NoAnswer, or a typed
        error when the member answered and said no (nothing was changed then)."""
        index = self._current
        await self.prepare(index)
        token = self._token
        try:
            answer: A = await self._stub(index, "unary_unary", method)(
                request, timeout=ATTEMPT_S, metadata=self.metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise self.failure(index, error, token) from error
        except (asyncio.CancelledError, grpc.aio.UsageError) as error:
            raise self._closed_meanwhile(error) from error
        return answer

    async def attempt_stream(self, method: Method[Q, A], request: Q) -> A:
        """The same for a method that is a stream: one request, one answer."""
        index, token = self._current, self._token
        call = await self.open_stream(index, method, ATTEMPT_S)
        try:
            await call.write(request)
            await call.done_writing()
            answer = await call.read()
        except grpc.aio.AioRpcError as error:
            raise self.failure(index, error, token) from error
        except (asyncio.CancelledError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            raise self._closed_meanwhile(error) from error
        finally:
            call.cancel()
        if isinstance(answer, method.answer):
            return answer
        self.leave(index)
        raise NoAnswer(f"{self.addresses[index]} ended the call", maybe=True)

    async def open_stream(
        self, index: int, method: Method[Q, A], timeout_s: float | None = None
    ) -> grpc.aio.StreamStreamCall[Q, A]:
        """A call in both directions at one member. Raises as `attempt` does."""
        await self.prepare(index)
        call: grpc.aio.StreamStreamCall[Q, A] = self._stub(index, "stream_stream", method)(
            timeout=timeout_s, metadata=self.metadata()
        )
        return call

    async def prepare(self, index: int) -> None:
        """Connect, log in, look at the version: whatever of it was not done yet."""
        self.check_open()
        member = self._members[index]
        try:
            async with asyncio.timeout(ATTEMPT_S):
                while (state := member.channel.get_state(True)) != _READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        raise NoAnswer(f"{member.address} refuses the connection", maybe=False)
                    if state is grpc.ChannelConnectivity.SHUTDOWN:
                        self.check_open()
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            self.leave(index)
            raise NoAnswer(f"{member.address} cannot be reached", maybe=False) from None
        except NoAnswer:
            self.leave(index)
            raise
        if self._user is not None and self._token is None:
            await self._log_in(index, *self._user)
        if not member.known:
            status = await self._ask(index, STATUS, pb.StatusRequest())
            refuse_version(member.address, status.version)
            if self.cluster_id not in (0, status.header.cluster_id):
                raise StoreRefused(
                    f"etcd at {member.address} belongs to another cluster than the members asked "
                    "before. Name the members of one cluster only; if it was restored from a "
                    "backup, restart Shoal."
                )
            self.cluster_id = status.header.cluster_id
            member.known = True

    async def why_not(self, index: int) -> str:
        """What gRPC says about a member that cannot be reached: a refused certificate is told only
        here. Status changes nothing, so asking never harms."""
        try:
            await self._stub(index, "unary_unary", STATUS)(pb.StatusRequest(), timeout=ATTEMPT_S)
        except grpc.aio.AioRpcError as error:
            return f"{self.addresses[index]}: {error.details()}"
        return f"{self.addresses[index]}: answers now"

    def check_open(self) -> None:
        if self.closed:
            raise Unavailable("The metadata store is closed.")

    def _closed_meanwhile(self, error: BaseException) -> BaseException:
        """Closing a channel looks to its callers as if somebody had cancelled them."""
        task = asyncio.current_task()
        cancelled = task is not None and task.cancelling()
        if isinstance(error, asyncio.InvalidStateError) or (self.closed and not cancelled):
            return NoAnswer("the connection was closed", maybe=True)
        return error

    async def _ask(self, index: int, method: Method[Q, A], request: Q) -> A:
        timeout_s = _AUTHENTICATE_S if method.path == AUTHENTICATE.path else ATTEMPT_S
        try:
            answer: A = await self._stub(index, "unary_unary", method)(
                request, timeout=timeout_s, metadata=self.metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise self.failure(index, error, self._token, harmless=True) from error
        except (asyncio.CancelledError, grpc.aio.UsageError) as error:
            raise self._closed_meanwhile(error) from error
        return answer

    @property
    def token(self) -> str | None:
        return self._token

    def log_in_again(self) -> bool:
        """With the next attempt. False: there is nobody to log in."""
        self._token = None
        return self._user is not None

    @property
    def logged_out(self) -> bool:
        return self._user is not None and self._token is None

    async def log_in(self) -> None:
        """For a thread that found its token too old: any attempt logs in. Failures show elsewhere."""
        try:
            await self.prepare(self._current)
        except (ShoalError, NoAnswer) as error:
            _log.debug("log_in_failed", why=str(error))

    async def _log_in(self, index: int, name: str, password: str) -> None:
        async with self._logging_in:
            if self._token is None:
                request = pb.AuthenticateRequest(name=name, password=password)
                self._token = (await self._ask(index, AUTHENTICATE, request)).token

    # -- what failures mean ------------------------------------------------------------------------

    def failure(
        self, index: int, error: grpc.RpcError, token: str | None, *, harmless: bool = False
    ) -> Exception:
        """The exception for a failed call at this member; another one is the current one then,
        where that may help. harmless: repeating it does no harm."""
        found = self.explain(index, error, token)
        if isinstance(found, NoAnswer):
            if found.member_failed:
                self.leave(index)
            found.maybe = found.maybe and not harmless
        return found

    def explain(self, index: int, error: grpc.RpcError, token: str | None) -> Exception:
        """The same for any thread: it leaves the current member alone."""
        code, details = error.code(), error.details() or ""
        what = f"{self.addresses[index]} says {code.name}: {details}"
        refusal = _refusal(code, details, what)
        if refusal is not None:
            return refusal
        if code is _Code.UNAUTHENTICATED or "auth store is old" in details:
            if self._user is None:
                return StoreRefused(f"etcd wants a user and a password: {what}.")
            if self._token == token:
                self._token = None
            return NoAnswer(what, maybe=False, member_failed=False)
        before_raft = "no leader" in details or "too many requests" in details
        return NoAnswer(what, maybe=not before_raft)

    def _stub(self, index: int, kind: str, method: Method[Q, A]) -> Any:
        member = self._members[index]
        stub = member.stubs.get(method.path)
        if stub is None:
            stub = member.stubs[method.path] = getattr(member.channel, kind)(
                method.path, method.request.SerializeToString, method.answer.FromString
            )
        return stub

    def _channel(self, library: Any, address: str) -> Any:
        if self._tls is None:
            return library.insecure_channel(address, options=_CHANNEL_OPTIONS)
        return library.secure_channel(address, self._tls, options=_CHANNEL_OPTIONS)


_Code = grpc.StatusCode
_READY = grpc.ChannelConnectivity.READY


def _refusal(code: grpc.StatusCode, details: str, what: str) -> ShoalError | None:
    """The member understood and said no. None: something else was the matter."""
    match code:
        case _Code.NOT_FOUND if "lease" in details:
            return LeaseLost("The metadata lease has ended. Register again.")
        case _Code.FAILED_PRECONDITION if "lease already exists" in details:
            return LeaseExists("The lease exists already.")
        case _Code.OUT_OF_RANGE if "compacted" in details:
            return Compacted(
                "etcd no longer keeps these changes. Read anew, then watch from there."
            )
        case _Code.RESOURCE_EXHAUSTED if "database space exceeded" in details:
            return StorageFull(
                "etcd's database is full (its quota): the change was not made. Compact and "
                "defragment it, then `etcdctl alarm disarm`."
            )
        case _Code.RESOURCE_EXHAUSTED if "larger than max" in details:
            return BodyTooLarge(f"Bad request: too much metadata in one change: {what}")
        case _Code.INVALID_ARGUMENT if "too large" in details:
            return BodyTooLarge(f"Bad request: too much metadata in one change: {what}")
        case _Code.INVALID_ARGUMENT if "user name is empty" in details:
            return StoreRefused("etcd wants a user and a password, and none is set.")
        case _Code.INVALID_ARGUMENT if "authentication failed" in details:
            return StoreRefused("etcd does not accept the user or the password.")
        case _Code.FAILED_PRECONDITION if "authentication is not enabled" in details:
            return StoreRefused(
                "A user and a password for etcd are set, but etcd asks nobody for one: anyone who "
                "reaches it may change everything. Enable its authentication or unset them."
            )
        case _Code.INVALID_ARGUMENT if "auth store is old" not in details:
            return StoreRefused(f"etcd does not take the request: {what}")
        case _Code.PERMISSION_DENIED | _Code.UNIMPLEMENTED:
            return StoreRefused(f"etcd does not allow it: {what}. Its user needs the prefix.")
    return None


def refuse_version(address: str, version: str) -> None:
    """Raises StartupError for a version that is too old or known to lose data."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    number = tuple(map(int, match.groups())) if match is not None else (0, 0, 0)
    if number < _VERSION_MIN:
        wanted = ".".join(map(str, _VERSION_MIN))
        raise StartupError(
            f"etcd at {address} has version {version}; Shoal needs {wanted} or newer."
        )
    if number in _VERSIONS_THAT_LOSE_DATA:
        raise StartupError(
            f"etcd at {address} has version {version}, which can lose committed data. Update it to "
            "the newest 3.5 or later."
        )
