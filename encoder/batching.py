"""Which texts go through the model together, and whose turn it is. Pure: no clock, no thread.

Two ideas, each worth a factor. A forward pass costs rows x longest row, so texts of like length
belong together (`plan_batches`). And a person who waits for one query must not wait for somebody's
ten thousand texts (`WaitingTexts`): few texts form the interactive lane, many the bulk lane, and
the interactive lane is asked first between any two forward passes.

    request of 1 text ───▶ interactive ──┐  all that wait, together
                                         ├──▶ forward passes
    request of 500 texts ▶ bulk ─────────┘  a window of the oldest, one pass at a time
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass
from enum import Enum

from shoal.errors import must
from shoal.limits import ENCODER_QUERY_TEXTS_MAX

__all__ = [
    "Lane",
    "Row",
    "Slice",
    "TokenQueue",
    "WaitingTexts",
    "halves",
    "plan_batches",
]


class Lane(Enum):
    INTERACTIVE = "interactive"
    BULK = "bulk"

    @classmethod
    def of(cls, text_count: int) -> Lane:
        return cls.INTERACTIVE if text_count <= ENCODER_QUERY_TEXTS_MAX else cls.BULK


@dataclass(frozen=True, slots=True)
class Slice:
    """Texts [start, stop) of one request."""

    request_id: int
    start: int
    stop: int


@dataclass(slots=True)
class _Waiting:
    request_id: int
    model: str
    text_count: int
    byte_count: int
    taken: int = 0


class WaitingTexts:
    """The texts that wait, in each lane at most `texts_max` of them and `bytes_max` bytes: imports that
    fill theirs leave room for queries.

    A request that is alone in its lane is let in whatever its size, so that the bounds never make a
    request that the API allows impossible.
    """

    def __init__(self, *, texts_max: int, bytes_max: int) -> None:
        self._texts_max, self._bytes_max = texts_max, bytes_max
        self._lanes: dict[Lane, deque[_Waiting]] = {lane: deque() for lane in Lane}
        self._texts = dict.fromkeys(Lane, 0)
        self._bytes = dict.fromkeys(Lane, 0)

    @property
    def text_count(self) -> int:
        return sum(self._texts.values())

    @property
    def byte_count(self) -> int:
        return sum(self._bytes.values())

    def __len__(self) -> int:
        """Requests that wait."""
        return sum(len(lane) for lane in self._lanes.values())

    def offer(self, request_id: int, model: str, text_count: int, byte_count: int) -> bool:
        """Queue a request of at least one text; False when there is no room."""
        must(text_count > 0, "a request without texts needs no place in the queue")
        lane = Lane.of(text_count)
        if self._lanes[lane] and (
            self._texts[lane] + text_count > self._texts_max
            or self._bytes[lane] + byte_count > self._bytes_max
        ):
            return False
        self._lanes[lane].append(_Waiting(request_id, model, text_count, byte_count))
        self._texts[lane] += text_count
        self._bytes[lane] += byte_count
        return True

    def any_for(self, models: Container[str]) -> bool:
        """Whether something waits for one of these models."""
        return any(waiting.model in models for lane in self._lanes.values() for waiting in lane)

    def take(
        self, lane: Lane, texts_max: int, models: Container[str] | None = None
    ) -> tuple[str, list[Slice]] | None:
        """The oldest texts of a lane, at most `texts_max`, all for one model: (model, slices), or None
        when there are none. A bulk request may be given out over several calls.

        models  those that can be computed now; None: any.
        """
        queue = self._lanes[lane]
        fitting = (w.model for w in queue if models is None or w.model in models)
        model = next(fitting, None)
        if model is None:
            return None
        room, slices = texts_max, []
        for waiting in list(queue):
            if waiting.model != model:
                continue
            stop = min(waiting.text_count, waiting.taken + room)
            slices.append(Slice(waiting.request_id, waiting.taken, stop))
            room -= stop - waiting.taken
            self._texts[lane] -= stop - waiting.taken
            waiting.taken = stop
            if stop == waiting.text_count:
                self._bytes[lane] -= waiting.byte_count
                queue.remove(waiting)
            if not room:
                break
        return model, slices

    def forget(self, request_id: int) -> None:
        """Drop what still waits of a request that nobody wants any more."""
        for lane, queue in self._lanes.items():
            for waiting in queue:
                if waiting.request_id == request_id:
                    queue.remove(waiting)
                    self._texts[lane] -= waiting.text_count - waiting.taken
                    self._bytes[lane] -= waiting.byte_count
                    return

    def of(self, model: str) -> list[int]:
        """The ids of the requests for a model that wait, oldest first in each lane."""
        return [
            waiting.request_id
            for queue in self._lanes.values()
            for waiting in queue
            if waiting.model == model
        ]

    def drain(self) -> list[int]:
        """Empty both lanes; the ids of the requests that waited, oldest first in each lane."""
        ids = [waiting.request_id for queue in self._lanes.values() for waiting in queue]
        for lane, queue in self._lanes.items():
            queue.clear()
            self._texts[lane] = self._bytes[lane] = 0
        return ids


def plan_batches(lengths: Sequence[int], *, tokens_max: int, rows_max: int) -> list[list[int]]:
    """Group texts of like length into forward passes.

    lengths   tokens of each text, at least 1.
    Returns   positions into `lengths`, each in exactly one batch; in every batch
              rows x longest <= tokens_max (a longer text goes alone) and rows <= rows_max.
              Shortest first; texts of equal length keep their order.
    """
    batches: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lengths.__getitem__):
        rows = len(batches[-1]) + 1 if batches else 0
        # Ascending order: the text at hand is the longest of its batch.
        if not rows or rows > rows_max or rows * lengths[position] > tokens_max:
            batches.append([])
        batches[-1].append(position)
    return batches


@dataclass(frozen=True, slots=True)
class Row:
    """One text of a request that waits, as its tokens."""

    request_id: int
    position: int
    token_ids: Sequence[int]


@dataclass(slots=True)
class _Share:
    """What waits of one request."""

    lane: Lane
    texts: int
    tokens: int


class TokenQueue:
    """Texts of a rank group that wait, as tokens, in each lane at most `tokens_max` of them: imports that
    fill theirs leave room for queries.

    A batch is of one lane, and the lanes take turns while both have texts, so that a query waits for
    one batch of an import at most, and an import moves on under a stream of queries. A batch is built
    around the text that waits longest: texts of the window that are most like it in length join it.
    """

    def __init__(self, *, tokens_max: int, window_texts: int = 256) -> None:
        self._tokens_max, self._window_texts = tokens_max, window_texts
        self._lanes: dict[Lane, list[Row]] = {lane: [] for lane in Lane}
        self._shares: dict[int, _Share] = {}  # by request
        self._forgotten = False  # rows of requests that have no share are still in the lanes
        self._last = Lane.BULK
        self._texts = 0
        self._tokens = dict.fromkeys(Lane, 0)

    def __len__(self) -> int:
        """Texts that wait."""
        return self._texts

    @property
    def tokens(self) -> int:
        return sum(self._tokens.values())

    def tokens_in(self, lane: Lane) -> int:
        return self._tokens[lane]

    def has_room(self, tokens: int, lane: Lane) -> bool:
        """Whether a request of so many tokens would be let in."""
        return not self._tokens[lane] or self._tokens[lane] + tokens <= self._tokens_max

    def offer(self, rows: Sequence[Row], lane: Lane) -> bool:
        """Queue all texts of one request; False when there is no room. A request that is alone in its
        lane is let in whatever its size, so that the bound makes no request impossible."""
        tokens = sum(len(row.token_ids) for row in rows)
        if not self.has_room(tokens, lane):
            return False
        if rows:
            self._shares[rows[0].request_id] = _Share(lane, len(rows), tokens)
        self._lanes[lane].extend(rows)
        self._texts += len(rows)
        self._tokens[lane] += tokens
        return True

    def take(self, *, tokens_max: int, rows_max: int) -> list[Row]:
        """The next batch, rows × longest <= tokens_max (a longer text goes alone); [] for none."""
        self._sweep()
        lane = self._turn()
        rows = self._lanes[lane]
        if not rows:
            return []
        self._last = lane
        window = rows[: self._window_texts]
        lengths = [len(row.token_ids) for row in window]
        batches = plan_batches(lengths, tokens_max=tokens_max, rows_max=rows_max)
        chosen = set(next(batch for batch in batches if 0 in batch))
        batch = [window[place] for place in sorted(chosen)]
        self._lanes[lane] = [row for place, row in enumerate(rows) if place not in chosen]
        for row in batch:
            share = self._shares[row.request_id]
            share.texts -= 1
            share.tokens -= len(row.token_ids)
            self._tokens[lane] -= len(row.token_ids)
            if not share.texts:
                del self._shares[row.request_id]
        self._texts -= len(batch)
        return batch

    def _turn(self) -> Lane:
        first = Lane.BULK if self._last is Lane.INTERACTIVE else Lane.INTERACTIVE
        other = Lane.INTERACTIVE if first is Lane.BULK else Lane.BULK
        return first if self._lanes[first] else other

    def forget(self, request_id: int) -> None:
        """Drop what still waits of a request that nobody wants any more. Cheap: a caller that goes away
        leaves hundreds."""
        share = self._shares.pop(request_id, None)
        if share is not None:
            self._texts -= share.texts
            self._tokens[share.lane] -= share.tokens
            self._forgotten = True

    def _sweep(self) -> None:
        if self._forgotten:
            for lane, rows in self._lanes.items():
                self._lanes[lane] = [row for row in rows if row.request_id in self._shares]
            self._forgotten = False

    def clear(self) -> None:
        for rows in self._lanes.values():
            rows.clear()
        self._shares.clear()
        self._texts, self._tokens = 0, dict.fromkeys(Lane, 0)


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """A batch that did not fit in memory, as two: the shorter texts and the longer ones, so that the
    padding of the first goes, too."""
    ordered = sorted(rows, key=lambda row: len(row.token_ids))
    middle = len(ordered) // 2
    return ordered[:middle], ordered[middle:]
