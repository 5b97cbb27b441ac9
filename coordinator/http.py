"""What every HTTP request goes through, whichever way it came in: key, load, body, options, answer.

    raw ASGI (hot paths) ─┐
                          ├─▶ Api.answer(route, …) ─▶ route.handler(call) ─▶ result bytes
    FastAPI (all others) ─┘        key → load → body → options → timeout → errors → envelope

Handlers return the JSON of `result`; errors are raised as the types of shoal/errors.py and become
`{"status": {"error": …}}` here and only here.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import parse_qsl

from coordinator.auth import ApiKeys, given_key
from coordinator.freshness import format_token
from coordinator.metrics import Metrics
from coordinator.render import render_error, render_result
from coordinator.routing import ShardGone
from coordinator.service import Coordinator
from coordinator.texts import Truncated, count_truncated
from shoal.configuration import nearest
from shoal.errors import (
    BadRequest,
    BodyTooLarge,
    Busy,
    InvariantError,
    ShoalError,
    TimedOut,
    Unavailable,
    VectorsChanged,
)
from shoal.health import HealthReport
from shoal.limits import (
    BODY_BYTES_MAX,
    PENDING_REQUESTS_MAX,
    REQUEST_TIMEOUT_S_MAX,
    VECTORS_CHANGED_ATTEMPTS,
)
from shoal.storage_api import ShardKey
from shoal.telemetry import logger

__all__ = ["Answer", "Api", "Call", "Options", "Receive", "Route", "Scope", "Send"]

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_log = logger("http")
_JSON = b"application/json"
_DRAIN_BYTES_MAX = BODY_BYTES_MAX  # of a body that is too large, so that its sender can read 413


@dataclass(frozen=True, slots=True)
class Options:
    """Query parameters that all of the API shares. `ordering` is checked and otherwise without
    effect: see coordinator/freshness.py."""

    wait: bool = False
    timeout_s: float | None = None
    consistency: str | None = None


@dataclass(slots=True)
class Call:
    """One request on its way to a handler. params: the parts of the path, decoded. headers: of the
    request. written: shard -> sequence number of what the handler has written, for `shoal-token`."""

    coordinator: Coordinator
    params: Mapping[str, str]
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes
    options: Options
    health: Callable[[], HealthReport]
    metrics: Metrics
    written: dict[ShardKey, int] = field(default_factory=dict)

    def header(self, name: bytes) -> str | None:
        """name: in lower case. The first, when it was sent several times."""
        found = next((value for key, value in self.headers if key == name), None)
        return None if found is None else found.decode("latin-1")

    def token(self) -> str | None:
        """The `shoal-token` that the client sent; several are joined."""
        found = [value for name, value in self.headers if name == b"shoal-token"]
        return b",".join(found).decode("latin-1") if found else None

    def token_header(self) -> tuple[tuple[bytes, bytes], ...]:
        return ((b"shoal-token", format_token(self.written).encode()),)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    content_type: bytes = _JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


Handler = Callable[[Call], Awaitable[bytes | Answer]]


@dataclass(frozen=True, slots=True)
class Route:
    """operation  the name in metrics and in /openapi.json.
    writes     refused to the read-only key.
    public     needs no key.
    hot        also matched before FastAPI.
    request, result  models for /openapi.json; a request of bytes is a serialized PointBatch.
    """

    method: str
    path: str
    operation: str
    handler: Handler
    summary: str
    request: Any = None
    result: Any = None
    writes: bool = False
    public: bool = False
    hot: bool = False
    tag: str = "points"
    options: tuple[str, ...] = ()


_DEFAULT_OPTIONS = Options()


class Api:
    """Answers requests of one coordinator."""

    def __init__(
        self,
        coordinator: Coordinator,
        health: Callable[[], HealthReport],
        api_key: str | None,
        read_only_api_key: str | None,
        metrics: Metrics,
    ) -> None:
        self._coordinator = coordinator
        self._health = health
        self._keys = ApiKeys(api_key, read_only_api_key)
        self.metrics = metrics

    async def answer(
        self, route: Route, params: Mapping[str, str], scope: Scope, receive: Receive
    ) -> Answer:
        """Never raises for what the caller or the world did wrong."""
        started = perf_counter()
        metrics = self.metrics
        metrics.in_flight += 1
        try:
            answer = await self._answered(route, params, scope, receive, started)
        except ShoalError as error:
            answer = _refusal(error, perf_counter() - started, writes=route.writes)
        except Exception as error:
            _log.error("request_failed", operation=route.operation, error=error)
            message = (
                "Service internal error: a bug in Shoal, written to its log; the request may have "
                "happened"
            )
            headers = _outcome(maybe_applied=True) if route.writes else ()
            answer = Answer(500, render_error(message, perf_counter() - started), headers=headers)
        finally:
            metrics.in_flight -= 1
        metrics.observe(route.operation, answer.status, perf_counter() - started)
        return answer

    async def _answered(
        self,
        route: Route,
        params: Mapping[str, str],
        scope: Scope,
        receive: Receive,
        started: float,
    ) -> Answer:
        if self._keys.required and not route.public:
            self._keys.check(given_key(scope["headers"]), writes=route.writes)
        if self.metrics.in_flight > PENDING_REQUESTS_MAX and not route.public:
            raise Busy(
                f"Too many requests: {PENDING_REQUESTS_MAX} are being answered: wait a second and "
                "send again"
            )
        body = await _read_body(scope, receive)
        query = scope["query_string"]
        options = _options(query) if query else _DEFAULT_OPTIONS
        call = Call(
            self._coordinator, params, scope["headers"], body, options, self._health, self.metrics
        )
        truncated = count_truncated()
        if options.timeout_s is None:
            result = await self._handled(route, call, truncated)
        else:
            result = await _within(options.timeout_s, self._handled(route, call, truncated))
        if isinstance(result, bytes):
            body = render_result(result, perf_counter() - started)
            headers = call.token_header() if call.written else ()
            if truncated.count:
                headers += ((b"shoal-truncated-texts", b"%d" % truncated.count),)
            return Answer(200, body, headers=headers)
        return result

    async def _handled(self, route: Route, call: Call, truncated: Truncated) -> bytes | Answer:
        """Once more when the collection was another one by the time that its shards were asked, or its
        vectors were: then the request is read anew."""
        for last in (*[False] * (VECTORS_CHANGED_ATTEMPTS - 1), True):
            name = call.params.get("collection_name")
            truncated.count = 0  # the same texts are not told twice
            try:
                return await route.handler(call)
            except ShardGone as gone:
                if last or name is None:
                    raise
                if not await self._coordinator.catalog.replaced(name, gone):
                    raise
            except VectorsChanged as changed:
                if last or name is None or changed.maybe_applied or call.written:
                    raise
                await self._coordinator.catalog.reread(name)
        raise InvariantError("the last attempt returns or raises")


def _outcome(*, maybe_applied: bool) -> tuple[tuple[bytes, bytes], ...]:
    """For programs: whether a write that failed may have happened all the same."""
    return ((b"shoal-maybe-applied", b"true" if maybe_applied else b"false"),)


def _refusal(error: ShoalError, seconds: float, *, writes: bool) -> Answer:
    headers = _outcome(maybe_applied=error.maybe_applied) if writes else ()
    if isinstance(error, Busy):
        headers += ((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))),)
    elif isinstance(error, BodyTooLarge):
        headers += ((b"connection", b"close"),)
    return Answer(error.status_code, render_error(error.message, seconds), headers=headers)


async def _read_body(scope: Scope, receive: Receive) -> bytes:
    message = await receive()
    first: bytes = message.get("body", b"")
    if not message.get("more_body", False):
        if message["type"] == "http.disconnect":
            raise Unavailable("the client went away before its request was complete")
        if len(first) > BODY_BYTES_MAX:
            raise _too_large()
        return first
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > BODY_BYTES_MAX:
            raise _too_large()
    parts, size = [first], len(first)
    while message.get("more_body", False):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Unavailable("the client went away before its request was complete")
        part = message.get("body", b"")
        size += len(part)
        if size <= BODY_BYTES_MAX:
            parts.append(part)
        elif size > BODY_BYTES_MAX + _DRAIN_BYTES_MAX:
            break
        else:
            parts.clear()
    if size > BODY_BYTES_MAX:
        raise _too_large()
    return b"".join(parts)


def _too_large() -> BodyTooLarge:
    return BodyTooLarge(
        f"Payload too large: a request may have {BODY_BYTES_MAX} bytes: send several smaller ones"
    )


async def _within(seconds: float, work: Awaitable[bytes | Answer]) -> bytes | Answer:
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise TimedOut(
            f"Timeout: the request took longer than {seconds:g} s; if it was a write, it may "
            "have happened"
        ) from None


# -- query parameters -----------------------------------------------------------------------------
def _options(query: bytes) -> Options:
    try:
        given = dict(parse_qsl(query.decode(), keep_blank_values=True, errors="strict"))
    except ValueError:
        raise BadRequest("Wrong input: the query parameters are not valid UTF-8") from None
    for name, check, wanted in _CHECKS:
        if name in given and not check(given[name]):
            raise BadRequest(f"Wrong input: query parameter `{name}` must be {wanted}")
    if unknown := given.keys() - _PARAMETERS:
        name = min(unknown)
        raise BadRequest(
            f"Wrong input: there is no query parameter `{name}`.{nearest(name, _PARAMETERS)}"
        )
    timeout = given.get("timeout")
    return Options(
        wait=given.get("wait", "false") == "true",
        timeout_s=None if timeout is None else float(timeout),
        consistency=given.get("consistency"),
    )


def _is_consistency(text: str) -> bool:
    return text in ("majority", "quorum", "all") or _is_count(text)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) >= 1


def _is_timeout(text: str) -> bool:
    return _is_count(text) and int(text) <= REQUEST_TIMEOUT_S_MAX


_CHECKS: tuple[tuple[str, Callable[[str], bool], str], ...] = (
    ("wait", {"true", "false"}.__contains__, "true or false"),
    ("ordering", {"weak", "medium", "strong"}.__contains__, "weak, medium or strong"),
    ("consistency", _is_consistency, "a number of replicas, majority, quorum or all"),
    ("timeout", _is_timeout, f"a number of seconds from 1 to {REQUEST_TIMEOUT_S_MAX}"),
)
# anonymize: of /metrics and /telemetry; there is nothing to anonymize
_PARAMETERS = frozenset((*(name for name, *_ in _CHECKS), "anonymize"))
