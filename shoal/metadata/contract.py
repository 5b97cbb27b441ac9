"""The metadata store: who exists, what collections there are, who holds which shard.

The docstrings here are the contract. `tests/contract/test_metadata.py` runs one suite against every
implementation: the embedded one (one SQLite file, one process) and, for a cluster, etcd.

    revision   1    2    3    4    5        one counter for the whole store
               a=x  b=y  a=z       c=w      get("a") -> (z, revision 3)
                              -b            watch("", 3) -> [-b @4] [c=w @5]

Keys are texts such as `collections/books`, ordered by their UTF-8 bytes; values are bytes. All
changes of one transaction share one revision. A prefix sees gaps in the revisions: the counter is
the store's, which also counts changes that only the store knows of, so nobody may wait for "the next
number".
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal.errors import BadRequest, BodyTooLarge, ShoalError, TimedOut

__all__ = [
    "LEASE_TTL_S_MAX",
    "TXN_BYTES_MAX",
    "TXN_OPERATIONS_MAX",
    "Compacted",
    "Compare",
    "Event",
    "KeyValue",
    "Lease",
    "LeaseKeeper",
    "LeaseLost",
    "MetadataStore",
    "StoreRefused",
    "StoreWentBack",
    "TxnResult",
    "Uncertain",
    "check_ttl",
    "check_txn",
]

TXN_OPERATIONS_MAX = (
    120  # compares, puts and deletes; etcd allows 128, its client needs some itself
)
TXN_BYTES_MAX = 1024 * 1024  # keys and values together; etcd refuses requests of 1.5 MiB
LEASE_TTL_S_MAX = 3_600.0


class Uncertain(TimedOut):
    """A transaction failed in a way that leaves open whether it happened. Never send it again
    blindly: read the keys first."""


class Compacted(ShoalError):
    """The changes after this revision are no longer kept. Read everything anew with `range` and
    watch from the revision which that gave. Deletes in the gap show only as absence."""

    status_code = 503
    retryable = True


class LeaseLost(ShoalError):
    """The lease has ended: its keys are gone. Grant a new one and register again at once."""

    status_code = 503
    retryable = True


class StoreRefused(ShoalError):
    """The store answers and says no: a wrong password, a missing permission, a certificate that it
    does not know. Asking again does not help; an operator has to change something."""

    status_code = 503


class StoreWentBack(ShoalError):
    """The store no longer has changes that it once told of: it was restored from a backup, or it is
    another one. Everything that a process knows from it is worth nothing, and what it does about
    that (a collection that is gone is deleted) would do harm: the process must stop. One that is
    started afterwards reads everything anew."""

    status_code = 503

    @classmethod
    def because(cls, how: str) -> StoreWentBack:
        return cls(
            f"The metadata store went back: {how}. It was restored from a backup, or is another one, "
            'and what this process knows no longer holds. Start it again; docs/operating.md, "After '
            'etcd was restored", says what else to look at.'
        )


@dataclass(frozen=True, slots=True)
class KeyValue:
    """revision: of the transaction that put this value (etcd: mod_revision)."""

    key: str
    value: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class Compare:
    """Holds when `key` was last changed at `revision`; 0: when the key is absent."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class TxnResult:
    """ok: all compares held and the changes were made.
    revision: the one that the changes got; when nothing changed, the store's at that moment."""

    ok: bool
    revision: int


@dataclass(frozen=True, slots=True)
class Event:
    """One change. value None: the key was deleted."""

    key: str
    value: bytes | None
    revision: int


@dataclass(frozen=True, slots=True)
class Lease:
    """id: for `txn(lease=)`. ttl_s: what the store granted, at least what was asked for."""

    id: int
    ttl_s: float


class LeaseKeeper(Protocol):
    """Keeps one lease alive until it is closed. Made by `MetadataStore.lease_keep`."""

    def silent_for_s(self) -> float:
        """Seconds since the last keep-alive that was answered was sent, suspend of the machine
        included. Beyond the TTL the lease may be gone, whether or not anybody could say so."""
        ...

    async def lost(self) -> None:
        """Returns when the store says that the lease is gone; else waits. Raises StoreRefused when
        the store does not let us keep it."""
        ...

    async def close(self) -> None:
        """Keep it alive no longer. It is not revoked. May be called twice."""
        ...


class MetadataStore(Protocol):
    """Every method may raise Unavailable: the store is closed, or nobody answers. Nothing happened
    then.

    on_went_back  called, once or more, when somebody who follows the store finds that it went back;
                  None: nobody stops the process then.
    """

    on_went_back: Callable[[StoreWentBack], None] | None

    async def get(self, key: str) -> KeyValue | None:
        """The value as of now: sees every transaction that returned before the call (linearizable).
        None: absent."""
        ...

    async def range(self, prefix: str) -> tuple[list[KeyValue], int]:
        """All keys that begin with `prefix` ("" = all), in key order, and the store's revision, as
        one consistent moment. `watch(prefix, revision)` then gives every later change. Raises
        StoreWentBack: it is at an earlier revision than it once told."""
        ...

    async def remembers(self, known: KeyValue) -> bool:
        """Whether the store's history has this value at its revision. False: it went back. A history
        that is no longer kept cannot say so, and counts as the same."""
        ...

    async def txn(
        self,
        compares: Sequence[Compare],
        puts: Mapping[str, bytes],
        deletes: Sequence[str] = (),
        *,
        lease: int | None = None,
    ) -> TxnResult:
        """If all `compares` hold, make all changes at one new revision; else change nothing.

        Durable when it returns (etcd: on a majority). Deleting an absent key is no change; a put
        always is one. A key may stand once in puts and deletes together. lease: the keys of `puts`
        are deleted when this lease ends; a later put without one takes the key out of it.
        Raises  LeaseLost: there is no such lease (any more). Nothing happened.
                BadRequest or BodyTooLarge: outside the bounds above. StorageFull: nothing happened.
                Uncertain: it may have happened.
        """
        ...

    def watch(self, prefix: str, from_revision: int) -> AsyncIterator[list[Event]]:
        """Every change of a key under `prefix` with a revision later than `from_revision`, none
        twice, in revision order. A list holds whole revisions: one is never split over two lists.

        Ends when the store is closed. Raises Compacted when the changes are no longer kept, at once
        or later, when the caller read too slowly; or when the store is not at `from_revision` yet,
        because it was restored from a backup.
        """
        ...

    async def lease_grant(self, ttl_s: float) -> Lease:
        """A lease that ends `ttl_s` after its last keep-alive, never earlier by this store's own
        doing alone. A lease is a hint: a store may lose one early (etcd does, after a frozen leader),
        so nothing may be unsafe because somebody else's lease is gone. Raises BadRequest for more
        than LEASE_TTL_S_MAX."""
        ...

    async def lease_keep_alive(self, lease: int) -> float:
        """Seconds that it now has, counted from before the call was sent. Raises LeaseLost."""
        ...

    def lease_keep(self, lease: Lease) -> LeaseKeeper:
        """Keep a lease that was granted just now alive, from here until the keeper is closed. A stall
        of the event loop that is shorter than the TTL does not lose it; a longer one does, so that a
        process that hangs does not look alive."""
        ...

    async def lease_revoke(self, lease: int) -> None:
        """End it now; its keys are deleted. Unknown: nothing to do."""
        ...

    async def close(self) -> None:
        """Free everything. Watches end. May be called twice."""
        ...


def check_txn(
    compares: Sequence[Compare], puts: Mapping[str, bytes], deletes: Sequence[str]
) -> None:
    """The bounds of `txn`, the same in every implementation. Raises BadRequest or BodyTooLarge."""
    count = len(compares) + len(puts) + len(deletes)
    if count > TXN_OPERATIONS_MAX:
        raise BadRequest(
            f"Bad request: a metadata transaction of {count} operations, "
            f"{TXN_OPERATIONS_MAX} are allowed"
        )
    for keys in ([c.key for c in compares], [*puts, *deletes]):
        if len(set(keys)) != len(keys) or "" in keys:
            raise BadRequest(
                "Bad request: a key stands twice in a metadata transaction, or is empty"
            )
    size = sum(len(key.encode()) + len(value) for key, value in puts.items())
    if size > TXN_BYTES_MAX:
        raise BodyTooLarge(
            f"Bad request: {size} bytes of metadata in one change, {TXN_BYTES_MAX} are allowed"
        )


def check_ttl(ttl_s: float) -> None:
    """The bounds of `lease_grant`. Raises BadRequest."""
    if not 0 < ttl_s <= LEASE_TTL_S_MAX:
        raise BadRequest(
            f"Bad request: a lease of {ttl_s} s, more than 0 and at most {LEASE_TTL_S_MAX:g} s "
            "are allowed"
        )
