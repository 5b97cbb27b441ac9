"""Every error that Shoal shows to somebody, in one tree.

    ShoalError                    status  whose fault, what to do
    ├── BadRequest                400     the caller: change the request
    │   └── InvalidField          422     the caller: a field has a value that is not allowed
    ├── Unauthorized              401     the caller: send the api-key
    ├── Forbidden                 403     the caller: this key may not do that
    ├── NotFound                  404     the caller: no such collection, point or path
    ├── TimedOut                  408     nobody's; the write may have happened
    ├── AlreadyExists             409     the caller: choose another name
    ├── BodyTooLarge              413     the caller: send less at once
    ├── Busy                      429     load; wait `retry_after_s` and send again
    ├── NotSupported              501     Shoal: this build or version cannot do it
    ├── ShardStopped              503     a shard found damage and serves nothing; see its message
    ├── Unavailable               503     a part is starting, stopping or unreachable; retry
    │   ├── NotPrimary            503     this replica is not the primary (any more): ask the one that is
    │   └── Stale                 503     this replica lags behind what the read must see: ask another
    ├── VectorsChanged            503     the collection's vectors changed while it was written: again
    ├── StorageFull               507     the operator: free disk space; reads go on
    └── StartupError              (exit 2) the operator: settings or data directory
        ├── SettingsError
        ├── DataDirectoryLocked
        └── FormatTooNew
    InvariantError                500     ours: a bug. Not a ShoalError: nobody may expect it.

`retryable` says whether the same request may succeed later without change; `maybe_applied` whether
a refused write may have happened all the same. Both are part of the contract of a type.
"""

from __future__ import annotations

__all__ = [
    "AlreadyExists",
    "BadRequest",
    "BodyTooLarge",
    "Busy",
    "DataDirectoryLocked",
    "Forbidden",
    "FormatTooNew",
    "InvalidField",
    "InvariantError",
    "NotFound",
    "NotPrimary",
    "NotSupported",
    "SettingsError",
    "ShardStopped",
    "ShoalError",
    "Stale",
    "StartupError",
    "StorageFull",
    "TimedOut",
    "Unauthorized",
    "Unavailable",
    "VectorsChanged",
    "must",
]


class ShoalError(Exception):
    """Base of all errors with a meaning for the caller. `message` is a sentence for people."""

    status_code: int = 500
    retryable: bool = False
    maybe_applied: bool = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class BadRequest(ShoalError):
    """The request is wrong and changed nothing. Texts begin with `Wrong input: `, `Bad request: `
    or `Format error in JSON body: `, because clients search for these."""

    status_code = 400


class InvalidField(BadRequest):
    status_code = 422


class Unauthorized(ShoalError):
    status_code = 401


class Forbidden(ShoalError):
    status_code = 403


class NotFound(ShoalError):
    status_code = 404


class TimedOut(ShoalError):
    status_code = 408
    retryable = True
    maybe_applied = True


class AlreadyExists(ShoalError):
    status_code = 409


class BodyTooLarge(BadRequest):
    status_code = 413


class Busy(ShoalError):
    status_code = 429
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotSupported(ShoalError):
    status_code = 501


class ShardStopped(ShoalError):
    status_code = 503


class Unavailable(ShoalError):
    status_code = 503
    retryable = True


class NotPrimary(Unavailable):
    """Nothing happened. Between the parts of Shoal; a client sees it only when retries ran out."""


class Stale(Unavailable):
    """Between the parts of Shoal; a client sees it only when no replica is fresh enough in time."""


class VectorsChanged(ShoalError):
    """A write was made for vectors that the collection had before; nothing happened. Between the parts
    of Shoal: a coordinator reads the record and makes the write anew."""

    status_code = 503
    retryable = True


class StorageFull(ShoalError):
    status_code = 507
    retryable = True


class StartupError(ShoalError):
    """The process cannot start; it prints the message and exits with status 2."""


class SettingsError(StartupError):
    pass


class DataDirectoryLocked(StartupError):
    pass


class FormatTooNew(StartupError):
    pass


class InvariantError(Exception):
    """A bug of ours, never a bad peer or a bad disk: stop the shard and keep the evidence."""


def must(condition: bool, what: str) -> None:
    """Check an invariant; unlike `assert` it survives `python -O`."""
    if not condition:
        raise InvariantError(what)
