"""`Client`: `AsyncClient` for programs without an event loop. It has one, in a thread of its own.

Every method is the asynchronous one with its signature and its documentation, made by `_blocking`;
there is no second implementation.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from shoal.client.aio import AsyncClient
from shoal.client.core import DEFAULT_PORT
from shoal.client.migration import AsyncMigration
from shoal.client.retry import RetryPolicy
from shoal.errors import Unavailable

__all__ = ["Client", "Migration"]

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C")


class _Loop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="shoal-client", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError(
                "a callback may not call the client that calls it: it would wait for itself"
            )
        if not self._thread.is_alive():
            work.close()
            raise Unavailable("this client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: do not go on behind the caller's back
            raise

    def stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()


class _Twin(Generic[C]):
    """What a blocking class has: the asynchronous object, and the loop that it lives on."""

    def __init__(self, client: C, loop: _Loop) -> None:
        self._client, self._loop = client, loop


def _blocking(
    method: Callable[Concatenate[C, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[_Twin[C], P], T]:
    """The method that waits for the end of `method`."""

    @functools.wraps(method)
    def call(self: _Twin[C], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._loop.wait_for(method(self._client, *args, **kwargs))

    return call


def _iterating(
    method: Callable[Concatenate[C, P], AsyncIterator[T]],
) -> Callable[Concatenate[_Twin[C], P], Iterator[T]]:
    @functools.wraps(method)
    def call(self: _Twin[C], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        items = method(self._client, *args, **kwargs)

        async def following() -> tuple[T] | None:
            try:
                return (await anext(items),)
            except StopAsyncIteration:
                return None

        while (found := self._loop.wait_for(following())) is not None:
            yield found[0]

    return call


class Migration(_Twin[AsyncMigration]):
    """The change of the model of one vector; `Client.migration` makes it. It is a name, and holds
    nothing: all state is the server's, so any client may go on with what another began.

        change = client.migration("notes")
        change.start("mine", "text")
        change.wait(timeout_s=3600)
        print(change.compare())
        change.switch()
        change.drop("all-MiniLM-L6-v2")  # until then: rollback

    Retries and keys are those of `AsyncMigration`.
    """

    start = _blocking(AsyncMigration.start)
    status = _blocking(AsyncMigration.status)
    wait = _blocking(AsyncMigration.wait)
    compare = _blocking(AsyncMigration.compare)
    switch = _blocking(AsyncMigration.switch)
    rollback = _blocking(AsyncMigration.rollback)
    drop = _blocking(AsyncMigration.drop)


class Client(_Twin[AsyncClient]):
    """A client of one server or of any coordinators of a cluster. Safe to use from many threads.

        with Client("localhost:6334") as client:
            hits = client.search("films", [0.1, 0.7, 0.2, 0.0], limit=3)

    The arguments, and everything about errors, retries and what reads see, are those of
    `AsyncClient`. Callbacks such as `on_progress` are called in the client's own thread.
    """

    def __init__(
        self,
        addresses: str | Sequence[str] = f"localhost:{DEFAULT_PORT}",
        *,
        api_key: str | None = None,
        tls: bool = False,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 10.0,
        retry: RetryPolicy | None = None,
        in_flight_max: int = 256,
    ) -> None:
        client = AsyncClient(
            addresses,
            api_key=api_key,
            tls=tls,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            retry=retry,
            in_flight_max=in_flight_max,
        )
        super().__init__(client, _Loop())
        # also when nobody closes it: at the end of the program the loop must not be in a call
        self._finalizer = weakref.finalize(self, self._loop.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections and of the thread. Again: nothing."""
        if self._finalizer.alive:
            self._loop.wait_for(self._client.close())
            self._finalizer()

    remember = _blocking(AsyncClient.remember)

    create_collection = _blocking(AsyncClient.create_collection)
    get_collection = _blocking(AsyncClient.get_collection)
    list_collections = _blocking(AsyncClient.list_collections)
    collection_exists = _blocking(AsyncClient.collection_exists)
    delete_collection = _blocking(AsyncClient.delete_collection)

    search = _blocking(AsyncClient.search)
    search_batch = _blocking(AsyncClient.search_batch)
    retrieve = _blocking(AsyncClient.retrieve)
    scroll = _blocking(AsyncClient.scroll)
    iterate = _iterating(AsyncClient.iterate)
    count = _blocking(AsyncClient.count)

    upsert = _blocking(AsyncClient.upsert)
    upload = _blocking(AsyncClient.upload)
    update_vectors = _blocking(AsyncClient.update_vectors)
    delete = _blocking(AsyncClient.delete)
    delete_vectors = _blocking(AsyncClient.delete_vectors)
    set_payload = _blocking(AsyncClient.set_payload)
    overwrite_payload = _blocking(AsyncClient.overwrite_payload)
    delete_payload = _blocking(AsyncClient.delete_payload)
    clear_payload = _blocking(AsyncClient.clear_payload)

    def migration(self, collection: str, vector: str = "") -> Migration:
        """The change of the model of a vector, to begin or under way. Asks nobody yet."""
        return Migration(self._client.migration(collection, vector), self._loop)
