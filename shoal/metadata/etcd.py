"""The metadata store of a cluster: etcd, through a client of our own.

Keys live under one prefix per deployment:

    {prefix}/keys/collections/books     what the contract calls `collections/books`
    {prefix}/op/5f0e…                   markers of transactions, under a lease of two minutes

What no other client does for us is `Uncertain`. About three in ten transactions that end in a
timeout were carried out; sending one again would do it twice, giving up would lose it. So each also
puts a marker of its own, on the condition that this marker is absent. After a timeout we put the
marker ourselves, as "never", on the same condition:

    it worked                    the transaction did not happen, and cannot any more: send it anew
    the marker says "done"       it happened, at the marker's revision
    the marker's lease is gone   nobody can tell: Uncertain

That question can be asked again as often as it takes. Marker and "never" share a lease, and a put
under a lease that ended is refused, so a transaction that is stuck in a frozen member for an hour
cannot happen after its marker went.

Left out: members are those that were named at the start; a new certificate needs a restart.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from shoal.errors import ShoalError, Unavailable
from shoal.metadata import etcd_pb2 as pb
from shoal.metadata.contract import (
    Compacted,
    Compare,
    Event,
    KeyValue,
    Lease,
    LeaseLost,
    StoreWentBack,
    TxnResult,
    Uncertain,
    check_ttl,
    check_txn,
)
from shoal.metadata.etcd_keeper import EtcdKeeper
from shoal.metadata.etcd_members import (
    CALL_S,
    GRANT,
    KEEP_ALIVE,
    RANGE,
    REVOKE,
    TXN,
    EtcdTls,
    LeaseExists,
    Members,
    NoAnswer,
    Tries,
)
from shoal.metadata.etcd_watch import watch_forever
from shoal.metadata.keeper import boottime_s
from shoal.telemetry import logger

__all__ = ["EtcdStore", "EtcdTls"]

PAGE_KEYS_MAX = 500  # of one answer of `range`
OP_LEASE_S = 120  # how long a marker can be asked for
_OP_LEASE_USED_S = (
    30  # then the next: what is left must outlast CALL_S and the settling, many times
)
_DONE, _NEVER = b"done", b"never"

_log = logger("metadata")


class EtcdStore:
    """Implements `MetadataStore`. Make one with `await EtcdStore.open(...)`."""

    def __init__(self, members: Members, prefix: str) -> None:
        self.on_went_back: Callable[[StoreWentBack], None] | None = None
        root = prefix.rstrip("/").encode()
        self._members = members
        self._known = 0  # the latest revision that any answer told of
        self._keys = root + b"/keys/"
        self._ops = root + b"/op/"
        self._closed = asyncio.Event()
        self._keepers: list[EtcdKeeper] = []
        self._op_lease = 0
        self._op_lease_until_s = 0.0
        self._granting_op_lease = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        endpoints: Sequence[str],
        *,
        prefix: str,
        tls: EtcdTls | None = None,
        credentials: tuple[str, str] | None = None,
    ) -> EtcdStore:
        """Connect to the cluster; one member that answers is enough.

        endpoints    the client addresses of all its members, "host:port" or with http(s)://
        prefix       of this deployment, such as "/shoal/main"; its user needs `readwrite` on it
        credentials  user and password; a client certificate (`tls`) is the better way
        Raises  SettingsError: addresses or files make no sense. StartupError: its version is too old
                or loses data. StoreRefused: it does not want us. Unavailable: nobody answers, after
                about 10 s; the message has what each member said.
        """
        members = Members(endpoints, tls, credentials)
        try:
            await _meet(members)
        except BaseException:
            await members.close()
            raise
        return cls(members, prefix)

    # -- reading -----------------------------------------------------------------------------------

    async def get(self, key: str) -> KeyValue | None:
        answer = await self._members.call(RANGE, pb.RangeRequest(key=self._raw(key)))
        return self._key_value(answer.kvs[0]) if answer.kvs else None

    async def range(self, prefix: str) -> tuple[list[KeyValue], int]:
        while True:
            known = self._known  # before the call: what comes back is linearizable
            try:
                found, revision = await self._pages(self._raw(prefix))
                if revision < known:
                    raise StoreWentBack.because(f"it is at revision {revision} and was at {known}")
                self._learn(revision)
                return found, revision
            except Compacted:  # between two pages; the next moment is as good
                _log.info("range_starts_over", prefix=prefix)

    async def _pages(self, prefix: bytes) -> tuple[list[KeyValue], int]:
        found: list[KeyValue] = []
        start, end, revision = prefix, after_prefix(prefix), 0
        while True:
            request = pb.RangeRequest(
                key=start, range_end=end, limit=PAGE_KEYS_MAX, revision=revision
            )
            answer = await self._members.call(RANGE, request)
            revision = revision or answer.header.revision
            found += [self._key_value(kv) for kv in answer.kvs]
            if not answer.more:
                return found, revision
            start = answer.kvs[-1].key + b"\0"

    async def remembers(self, known: KeyValue) -> bool:
        request = pb.RangeRequest(key=self._raw(known.key), revision=known.revision)
        try:
            answer = await self._members.call(RANGE, request)
        except Compacted:
            return True
        return [self._key_value(kv) for kv in answer.kvs] == [known]

    def watch(self, prefix: str, from_revision: int) -> AsyncIterator[list[Event]]:
        key = self._raw(prefix)
        return watch_forever(
            self._members,
            (key, after_prefix(key)),
            from_revision,
            self._closed,
            self._event,
            lambda: self._known,
        )

    def _learn(self, revision: int) -> None:
        self._known = max(self._known, revision)

    # -- changing ----------------------------------------------------------------------------------

    async def txn(
        self,
        compares: Sequence[Compare],
        puts: Mapping[str, bytes],
        deletes: Sequence[str] = (),
        *,
        lease: int | None = None,
    ) -> TxnResult:
        check_txn(compares, puts, deletes)
        wanted = pb.TxnRequest(
            compare=[_unchanged(self._raw(c.key), c.revision) for c in compares],
            success=[
                *(_put(self._raw(key), value, lease or 0) for key, value in puts.items()),
                *(_delete(self._raw(key)) for key in deletes),
            ],
        )
        if not wanted.success:
            answer = await self._members.call(TXN, wanted)
            self._learn(answer.header.revision)
            return TxnResult(answer.succeeded, answer.header.revision)
        return await self._change(wanted, lease)

    async def _change(self, wanted: pb.TxnRequest, lease: int | None) -> TxnResult:
        """Attempts until one is known to have happened or to be refused, or the time is up."""
        tries = Tries(self._members)
        op_leases_lost = 0
        while True:
            op_lease = await self._lease_for_ops()
            op = self._ops + secrets.token_hex(16).encode()
            request = pb.TxnRequest()
            request.CopyFrom(wanted)
            request.compare.append(_unchanged(op, 0))
            request.success.append(_put(op, _DONE, op_lease))
            try:
                answer = await self._members.attempt(TXN, request)
                self._learn(answer.header.revision)
                return TxnResult(answer.succeeded, answer.header.revision)
            except LeaseLost:
                # The caller's lease or ours? A new one of ours makes it clear.
                self._forget_op_lease(op_lease)
                op_leases_lost += 1
                if op_leases_lost > 1 and lease is not None:
                    raise
                if not await tries.another():
                    raise Unavailable("etcd loses leases as soon as it grants them.") from None
            except NoAnswer as failure:
                if failure.maybe:
                    revision = await self._settle(op, op_lease, failure)
                    if revision is not None:
                        return TxnResult(True, revision)
                if not await tries.another():
                    self._members.give_up(failure)

    async def _settle(self, op: bytes, op_lease: int, failure: NoAnswer) -> int | None:
        """The revision of a transaction that had no answer; None: it did not happen, and never will.
        Raises Uncertain."""
        request = pb.TxnRequest(
            compare=[_unchanged(op, 0)],
            success=[_put(op, _NEVER, op_lease)],
            failure=[pb.RequestOp(request_range=pb.RangeRequest(key=op))],
        )
        try:
            answer = await self._members.call(TXN, request)
        except ShoalError as error:
            raise Uncertain(
                f"The metadata change may have been made: {failure.why}; and asking for it failed: "
                f"{error.message}"
            ) from error
        if answer.succeeded:
            return None
        marker = answer.responses[0].response_range.kvs[0]
        return marker.mod_revision if marker.value == _DONE else None

    # -- leases ------------------------------------------------------------------------------------

    async def lease_grant(self, ttl_s: float) -> Lease:
        """As in the contract. etcd counts whole seconds, at least 2 with its usual settings; leases
        under 10 s are lost in mere changes of its leader."""
        check_ttl(ttl_s)
        # An id of our own makes the grant repeatable: "exists already" means that it worked.
        lease = secrets.randbits(62) + 1
        try:
            answer = await self._members.call(
                GRANT, pb.LeaseGrantRequest(TTL=math.ceil(ttl_s), ID=lease)
            )
        except LeaseExists:
            return Lease(lease, await self.lease_keep_alive(lease))
        return Lease(lease, float(answer.TTL))

    async def lease_keep_alive(self, lease: int) -> float:
        tries = Tries(self._members)
        while True:
            try:
                answer = await self._members.attempt_stream(
                    KEEP_ALIVE, pb.LeaseKeepAliveRequest(ID=lease)
                )
            except NoAnswer as failure:
                if not await tries.another():
                    self._members.give_up(failure)
            else:
                if answer.TTL <= 0:
                    raise LeaseLost(f"The metadata lease {lease:x} has ended. Register again.")
                return float(answer.TTL)

    def lease_keep(self, lease: Lease) -> EtcdKeeper:
        self._members.check_open()
        keeper = EtcdKeeper(self._members, lease)
        self._keepers = [k for k in self._keepers if not k.closed] + [keeper]
        return keeper

    async def lease_revoke(self, lease: int) -> None:
        try:
            await self._members.call(REVOKE, pb.LeaseRevokeRequest(ID=lease))
        except LeaseLost:
            return

    async def close(self) -> None:
        self._closed.set()
        keepers, self._keepers = self._keepers, []
        await asyncio.gather(*(keeper.close() for keeper in keepers))
        await self._members.close()

    async def _lease_for_ops(self) -> int:
        async with self._granting_op_lease:
            if boottime_s() >= self._op_lease_until_s:
                until_s = boottime_s() + _OP_LEASE_USED_S
                self._op_lease = (await self.lease_grant(OP_LEASE_S)).id
                self._op_lease_until_s = until_s
            return self._op_lease

    def _forget_op_lease(self, lease: int) -> None:
        if self._op_lease == lease:
            self._op_lease_until_s = 0.0

    # -- names -------------------------------------------------------------------------------------

    def _raw(self, key: str) -> bytes:
        return self._keys + key.encode()

    def _name(self, raw: bytes) -> str:
        return raw[len(self._keys) :].decode()

    def _key_value(self, kv: pb.KeyValue) -> KeyValue:
        return KeyValue(self._name(kv.key), kv.value, kv.mod_revision)

    def _event(self, event: pb.Event) -> Event:
        value = event.kv.value if event.type == pb.Event.PUT else None
        return Event(self._name(event.kv.key), value, event.kv.mod_revision)


async def _meet(members: Members) -> None:
    """Look at every member; returns when one is fit. Raises what `EtcdStore.open` says."""
    tries = Tries(members, CALL_S)
    while True:
        everyone = range(len(members))
        results = await asyncio.gather(
            *(members.prepare(index) for index in everyone), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, NoAnswer):
                raise result
        fit = [index for index, result in zip(everyone, results, strict=True) if result is None]
        if fit:
            members.choose(fit[0])
            return
        if not await tries.another():
            said = await asyncio.gather(*(members.why_not(index) for index in everyone))
            raise Unavailable(f"No member of etcd can be used. {'; '.join(said)}")


def after_prefix(prefix: bytes) -> bytes:
    """The first key after all that begin with `prefix`, which ends in a byte below 255."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _unchanged(key: bytes, revision: int) -> pb.Compare:
    """Holds while `key` is at this revision; etcd gives an absent key revision 0."""
    return pb.Compare(
        result=pb.Compare.EQUAL, target=pb.Compare.MOD, key=key, mod_revision=revision
    )


def _put(key: bytes, value: bytes, lease: int) -> pb.RequestOp:
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))


def _delete(key: bytes) -> pb.RequestOp:
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
