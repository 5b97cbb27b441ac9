"""Many batches, a few at a time: bounded memory, progress, and an error that says how far it came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator

from shoal.client.encode import split
from shoal.client.values import Batch, UploadProgress, WriteResult
from shoal.errors import BadRequest
from shoal.limits import BATCH_POINTS_MAX, MIB

__all__ = ["upload_batches"]

_BATCH_BYTES_TARGET = 4 * MIB  # of vectors: far below what a server takes, payloads come on top


async def upload_batches(
    points: Batch | Iterable[Batch] | AsyncIterable[Batch],
    send: Callable[[Batch], Awaitable[WriteResult]],
    *,
    batch_points: int,
    in_flight: int,
    on_progress: Callable[[UploadProgress], None] | None,
) -> UploadProgress:
    """Send all of `points`. When a batch fails, those on their way are waited for, and no more are
    begun; the error of the first that failed is raised."""
    if not 1 <= batch_points <= BATCH_POINTS_MAX or in_flight < 1:
        raise BadRequest(
            f"Wrong input: batch_points must be from 1 to {BATCH_POINTS_MAX}, in_flight at least 1"
        )
    began = time.monotonic()
    written = batches = truncated = 0
    under_way: dict[asyncio.Task[WriteResult], int] = {}
    failed: BaseException | None = None

    def progress() -> UploadProgress:
        return UploadProgress(written, batches, time.monotonic() - began, truncated)

    async def settle(*, until: int) -> None:
        """Wait until at most `until` are under way."""
        nonlocal written, batches, truncated, failed
        while len(under_way) > until:
            done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                count = under_way.pop(task)
                error = task.exception()
                if error is not None:
                    failed = failed or error
                    continue
                written, batches = written + count, batches + 1
                truncated += task.result().truncated_texts
                if on_progress is not None:
                    on_progress(progress())

    try:
        async for batch in _batches(points):
            for part in split(batch, batch_points, _BATCH_BYTES_TARGET):
                await settle(until=in_flight - 1)
                if failed is not None:
                    break
                under_way[asyncio.ensure_future(send(part))] = len(part.ids)
            if failed is not None:
                break
        await settle(until=0)
    except BaseException:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        raise
    if failed is not None:
        failed.add_note(f"{written} points of this upload, in {batches} batches, are written.")
        raise failed
    return progress()


async def _batches(
    points: Batch | Iterable[Batch] | AsyncIterable[Batch],
) -> AsyncIterator[Batch]:
    if isinstance(points, Batch):
        yield points
    elif isinstance(points, AsyncIterable):
        async for batch in points:
            yield batch
    else:
        iterator = iter(points)
        while (batch_or_end := await asyncio.to_thread(_next, iterator)) is not None:
            yield batch_or_end


def _next(iterator: Iterator[Batch]) -> Batch | None:
    return next(iterator, None)
