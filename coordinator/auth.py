"""Who may do what: one key that may write, one that may only read. The same for HTTP and gRPC."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from shoal.errors import Forbidden, Unauthorized

__all__ = ["ApiKeys", "given_key"]


class ApiKeys:
    """Without `api_key` everybody may do everything."""

    def __init__(self, api_key: str | None, read_only_api_key: str | None) -> None:
        self._api_key = None if api_key is None else api_key.encode()
        self._read_only_key = None if read_only_api_key is None else read_only_api_key.encode()

    @property
    def required(self) -> bool:
        return self._api_key is not None

    def check(self, given: bytes | None, *, writes: bool) -> None:
        """Raises Unauthorized, or Forbidden when the key may only read. given: None: there is none."""
        if self._api_key is None:
            return
        if given is None:
            raise Unauthorized(
                "Unauthorized: Must provide an API key or an Authorization bearer token"
            )
        # Both comparisons take the same time whatever is given.
        if hmac.compare_digest(given, self._api_key):
            return
        if self._read_only_key is not None and hmac.compare_digest(given, self._read_only_key):
            if not writes:
                return
            raise Forbidden("Forbidden: this API key may only read: use the key that may write")
        raise Unauthorized("Unauthorized: Invalid API key")


def given_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """From `api-key`, else from `authorization: Bearer`. Names are lower case in ASGI and gRPC."""
    bearer = None
    for name, value in headers:
        if name == b"api-key":
            return value
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            bearer = value[7:].strip()
    return bearer
